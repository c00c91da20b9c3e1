# SPDX-License-Identifier: Apache-2.0
"""A second implementation, of the definitions in RFC 6962 section 2.1 and C2SP's pages alone.

Nothing of d1_signer is imported here, and nothing is done cleverly.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key


def k(n: int) -> int:
    """The largest power of two smaller than n."""
    power = 1
    while power * 2 < n:
        power *= 2
    return power


def mth(entries: Sequence[bytes]) -> bytes:
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = k(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:split]) + mth(entries[split:])).digest()


def path(m: int, entries: Sequence[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    split = k(len(entries))
    if m < split:
        return [*path(m, entries[:split]), mth(entries[split:])]
    return [*path(m - split, entries[split:]), mth(entries[:split])]


def proof(m: int, entries: Sequence[bytes]) -> list[bytes]:
    return subproof(m, entries, b=True)


def subproof(m: int, entries: Sequence[bytes], *, b: bool) -> list[bytes]:
    if m == len(entries):
        return [] if b else [mth(entries)]
    split = k(len(entries))
    if m <= split:
        return [*subproof(m, entries[:split], b=b), mth(entries[split:])]
    return [*subproof(m - split, entries[split:], b=False), mth(entries[:split])]


def climb(entry: bytes, m: int, n: int, hashes: Sequence[bytes]) -> bytes:
    """The root that PATH(m, D[n]) leads to, by undoing its definition."""
    if n == 1:
        assert not hashes
        return hashlib.sha256(b"\x00" + entry).digest()
    split, *below, beside = k(n), *hashes
    if m < split:
        left, right = climb(entry, m, split, below), beside
    else:
        left, right = beside, climb(entry, m - split, n - split, below)
    return hashlib.sha256(b"\x01" + left + right).digest()


def open_note(note: bytes, vkey: str) -> list[str]:
    """The lines of a signed note's text, once the key has verified it; AssertionError else."""
    name, key_id, encoded = vkey.split("+", 2)
    spki = base64.b64decode(encoded)
    assert spki[0] == 2
    spki = spki[1:]
    assert hashlib.sha256(spki).digest()[:4].hex() == key_id
    text, _, signatures = note.decode().rpartition("\n\n")
    for line in signatures.splitlines():
        dash, signer, value = line.split(" ")
        assert dash == "\u2014"
        data = base64.b64decode(value)
        if signer == name and data[:4].hex() == key_id:
            key = load_der_public_key(spki)
            assert isinstance(key, ec.EllipticCurvePublicKey)
            key.verify(data[4:], (text + "\n").encode(), ec.ECDSA(SHA256()))
            return text.split("\n")
    msg = "no signature of this key"
    raise AssertionError(msg)


def verify_proof(proof_file: bytes, entry: bytes, vkey: str) -> int:
    """Verify a tlog-proof of an entry; the number of the entry."""
    head, _, checkpoint = proof_file.partition(b"\n\n")
    lines = head.decode().split("\n")
    assert lines.pop(0) == "c2sp.org/tlog-proof@v1"
    if lines[0].startswith("extra "):
        lines.pop(0)
    index = int(lines.pop(0).removeprefix("index "))
    origin, size, root, *_ = open_note(checkpoint, vkey)
    assert origin == vkey.split("+", maxsplit=1)[0]
    assert climb(entry, index, int(size), [base64.b64decode(x) for x in lines]) == base64.b64decode(
        root
    )
    return index

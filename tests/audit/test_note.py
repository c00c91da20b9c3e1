# SPDX-License-Identifier: Apache-2.0
"""Signed notes, checkpoints and proofs, written by us and read by a second implementation."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.audit import merkle
from d1_signer.audit.note import Checkpoint, Proof, SignedNote, VerifierKey, is_name, split_notes
from d1_signer.errors import AuditError
from d1_signer.es256 import PublicKey
from tests.audit import second

NAME = "bank.example/d1-audit"
PRIVATE = ec.derive_private_key(0x407E, ec.SECP256R1())  # the tests' names hold its identity
KEY = VerifierKey(NAME, PublicKey(PRIVATE.public_key()))
ED25519, NO_KEY = (
    base64.b64encode(data).decode() for data in (b"\x01" + bytes(32), b"\x02" + bytes(91))
)
ENTRIES = [b"%d" % number for number in range(11)]


def raw(text: str, key: ec.EllipticCurvePrivateKey = PRIVATE) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(text.encode(), ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def checkpoint(size: int = len(ENTRIES), *extensions: str) -> SignedNote:
    text = Checkpoint(NAME, size, second.mth(ENTRIES[:size]), extensions).text()
    return SignedNote(text, (KEY.signature(raw(text)),))


def test_verifier_key_is_in_the_form_that_others_read() -> None:
    text = str(KEY)
    name, key_id, encoded = text.split("+", 2)
    spki = KEY.public_key.der()
    assert (name, key_id) == (NAME, hashlib.sha256(spki).digest()[:4].hex())
    assert base64.b64decode(encoded) == b"\x02" + spki
    assert VerifierKey.parse(text + "\n") == KEY


def test_a_checkpoint_is_read_by_the_second_implementation() -> None:
    note = checkpoint(11, "instance one")
    lines = second.open_note(note.encode(), str(KEY))
    root = base64.b64encode(second.mth(ENTRIES)).decode()
    assert lines == [NAME, "11", root, "instance one"]
    again = SignedNote.parse(note.encode())
    assert again == note
    assert again.verified_by([KEY]) == KEY
    told = Checkpoint.parse(again.text)
    assert (told.size, told.root, told.extensions) == (11, second.mth(ENTRIES), ("instance one",))
    assert told.text() == note.text


def test_a_false_signature_and_a_foreign_key_are_refused() -> None:
    note = checkpoint()
    altered = replace(note, text=note.text.replace("11", "12"))
    with pytest.raises(AuditError, match="false"):
        altered.verified_by([KEY])
    with pytest.raises(InvalidSignature):
        second.open_note(altered.encode(), str(KEY))
    other = VerifierKey(NAME, PublicKey(ec.generate_private_key(ec.SECP256R1()).public_key()))
    with pytest.raises(AuditError, match="None of the given keys"):
        note.verified_by([other])
    # A signature of somebody else is none of our business, whatever it says.
    witnessed = replace(note, signatures=(("witness.example", b"1234", b"?"), *note.signatures))  # type: ignore[arg-type]
    assert SignedNote.parse(witnessed.encode()).verified_by([other, KEY]) == KEY


def test_notes_stand_one_behind_the_other() -> None:
    notes = [checkpoint(size, "instance one").encode() for size in (1, 5, 11)]
    data = b"".join(notes)
    assert split(data) == [(note, True) for note in notes]
    for cut in range(len(notes[0]) + len(notes[1]) + 1, len(data)):
        torn = notes[2][: cut - len(notes[0]) - len(notes[1])]
        assert split(data[:cut]) == [(notes[0], True), (notes[1], True), (torn, False)]
    assert not split(b"")


def split(data: bytes) -> list[tuple[bytes, bool]]:
    return list(split_notes(io.BytesIO(data)))


def test_a_proof_is_verified_by_the_second_implementation() -> None:
    note = checkpoint().encode()
    for index, entry in enumerate(ENTRIES):
        path = merkle.inclusion_proof(index, 11, lambda a, b: second.mth(ENTRIES[a:b]))
        proof = Proof(index, tuple(path), note, extra=entry)
        assert Proof.parse(proof.encode()) == proof
        assert second.verify_proof(proof.encode(), entry, str(KEY)) == index
        with pytest.raises(AssertionError):
            second.verify_proof(proof.encode(), entry + b" ", str(KEY))


@pytest.mark.parametrize("name", ["", " ", "a b", "a+b", " a", "a\u00a0b", "a\nb", "a\u2028", "\t"])
def test_names_have_no_blank_and_no_plus_sign(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(AuditError):
        VerifierKey.parse(str(KEY).replace(NAME, name))


@pytest.mark.parametrize(
    "text",
    [
        "",
        NAME,
        str(KEY).replace("+", " "),
        str(KEY)[:-4],
        str(KEY) + "=",
        f"{NAME}+00000000+{str(KEY).split('+', 2)[2]}",
        f"{NAME}+{KEY.key_id.hex().upper()}A+AQ==",
        f"{NAME}+{KEY.key_id.hex()}+{ED25519}",
        f"{NAME}+{KEY.key_id.hex()}+{NO_KEY}",
    ],
    ids=range(9),  # the key is another one in each process
)
def test_what_is_no_verifier_key_is_refused(text: str) -> None:
    with pytest.raises(AuditError, match="verifier key"):
        VerifierKey.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "o\n1\n\n",
        "o\n1\nAAAA\n",
        "o\n01\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n-1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n\u0661\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "\n1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n1\n" + base64.b64encode(bytes(32)).decode(),
        "o\n1\n" + base64.b64encode(bytes(32)).decode() + "\n\nx\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(AuditError):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xe2\x80\x94 ", b"- "),
        (b"\n\n", b"\n"),
        (b"\n", b"\r\n"),
        (b"\n\n\xe2", b"\n\n\xff"),
        (b"bank", b"\x07ank"),
        (b"\n\n\xe2\x80\x94 bank", b"\n\n\xe2\x80\x94 ba+k"),
    ],
)
def test_what_is_no_signed_note_is_refused(old: bytes, new: bytes) -> None:
    with pytest.raises(AuditError):
        SignedNote.parse(checkpoint().encode().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"@v1", b"@v2"),
        (b"index 3", b"index 03"),
        (b"index 3\n", b""),
        (b"\n\n", b"\n"),
        (b"extra Mw==", b"extra Mx=="),
        (b"index", b"\xff"),
    ],
)
def test_what_is_no_proof_is_refused(old: bytes, new: bytes) -> None:
    path = merkle.inclusion_proof(3, 11, lambda a, b: second.mth(ENTRIES[a:b]))
    data = Proof(3, tuple(path), checkpoint().encode(), extra=b"3").encode()
    with pytest.raises(AuditError):
        Proof.parse(data.replace(old, new, 1))

# SPDX-License-Identifier: Apache-2.0
"""Signed notes, checkpoints and proofs, as C2SP has them. Pure code, no I/O.

The formats are c2sp.org/signed-note, c2sp.org/tlog-checkpoint and c2sp.org/tlog-proof; the only
signatures are those of type 0x02, ECDSA on P-256 with SHA-256 in DER.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from d1_signer import es256
from d1_signer.audit.merkle import HASH_LENGTH
from d1_signer.errors import AuditError, InvalidKeyError, InvalidSignatureError
from d1_signer.es256 import PublicKey

PROOF_HEADER = "c2sp.org/tlog-proof@v1"
LARGEST_NOTE = 65_536
"""Bytes of a signed note at most."""

_ECDSA = b"\x02"
_DASH = "\u2014 "
_ID_LENGTH = 4
_MOST_SIGNATURES = 64
_MOST_HASHES = 64  # of a path in a tree of 2**63 leaves
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_HEX_ID = re.compile(r"[0-9a-f]{8}", re.ASCII)


def is_name(text: str) -> bool:
    """Whether a text may name a key: printable, no blank and no plus sign."""
    return text.isprintable() and "+" not in text and text.split() == [text]


class Signature(NamedTuple):
    """One signature of a note: the key's name, its four bytes of identity, the signature."""

    name: str
    key_id: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key as verifiers are given it: ``NAME+HHHHHHHH+BASE64``.

    Attributes:
        name: The key's name, which is the origin of its checkpoints.
        public_key: On P-256.
    """

    name: str
    public_key: PublicKey

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the one line.

        Raises:
            AuditError: Not a verifier key of type 0x02 on P-256.
        """
        name, _, rest = text.removesuffix("\n").partition("+")
        key_id, _, encoded = rest.partition("+")
        if not is_name(name) or not _HEX_ID.fullmatch(key_id):
            raise _no_key("it is not NAME+HHHHHHHH+BASE64")
        data = _base64(encoded, "the verifier key")
        if data[:1] != _ECDSA:
            raise _no_key("it is not of type 0x02 (ECDSA on P-256)")
        try:
            found = cls(name, PublicKey.from_der(data[1:]))
        except InvalidKeyError:
            raise _no_key("it holds no public key on P-256") from None
        if found.key_id.hex() != key_id:
            raise _no_key("its identity is not the hash of its public key")
        return found

    @property
    def key_id(self) -> bytes:
        """The first four bytes of SHA-256 of the SubjectPublicKeyInfo."""
        return hashlib.sha256(self.public_key.der()).digest()[:_ID_LENGTH]

    def __str__(self) -> str:
        encoded = base64.b64encode(_ECDSA + self.public_key.der()).decode()
        return f"{self.name}+{self.key_id.hex()}+{encoded}"

    def signature(self, raw: bytes) -> Signature:
        """The signature of a note by this key, of its raw form r||s."""
        return Signature(self.name, self.key_id, es256.der_from_raw(raw))


@dataclass(frozen=True, slots=True)
class SignedNote:
    """A text that ends with a line feed, and who signed it."""

    text: str
    signatures: tuple[Signature, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read one signed note.

        Raises:
            AuditError: It is none.
        """
        if len(data) > LARGEST_NOTE:
            raise _no_note(f"it is larger than {LARGEST_NOTE} bytes")
        try:
            whole = data.decode()
        except UnicodeError:
            raise _no_note("it is not UTF-8") from None
        if any(character < " " and character != "\n" for character in whole):
            raise _no_note("it has control characters")
        text, blank, lines = whole.rpartition("\n\n")
        if not blank or not lines.endswith("\n"):
            raise _no_note("it has no signatures behind an empty line")
        signed = lines[:-1].split("\n")
        if len(signed) > _MOST_SIGNATURES:
            raise _no_note(f"it has more than {_MOST_SIGNATURES} signatures")
        return cls(text + "\n", tuple(_signature(line) for line in signed))

    def encode(self) -> bytes:
        """The note's bytes."""
        lines = "".join(
            f"{_DASH}{name} {base64.b64encode(key_id + value).decode()}\n"
            for name, key_id, value in self.signatures
        )
        return f"{self.text}\n{lines}".encode()

    def verified_by(self, keys: Iterable[VerifierKey]) -> VerifierKey:
        """The first of these keys that signed it.

        Raises:
            AuditError: None did, or the signature of one is false.
        """
        found: VerifierKey | None = None
        text = self.text.encode()
        for key in keys:
            for name, key_id, value in self.signatures:
                if (name, key_id) != (key.name, key.key_id):
                    continue
                try:
                    key.public_key.verify(es256.raw_from_der(value), text)
                except InvalidSignatureError:
                    raise AuditError(f"The signature of {name} is false.") from None
                found = found or key
        if found is None:
            raise AuditError("None of the given keys signed it.")
        return found


def split_notes(lines: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Split notes that stand one behind the other.

    A note ends with its last signature, and no checkpoint begins as a signature does.

    Args:
        lines: With their line feeds, as a file gives them.

    Yields:
        A note's bytes, and whether it has a signature: the last one may not be written to its end.
        What is longer than any note is none; enough of it is kept to tell so.
    """
    kept: list[bytes] = []
    size = 0
    blank = signed = False
    dash = _DASH.encode()
    for line in lines:
        if signed and not line.startswith(dash):
            yield b"".join(kept), True
            kept, size, blank, signed = [], 0, False, False
        if size <= LARGEST_NOTE:
            kept.append(line)
        size += len(line)
        blank = blank or line == b"\n"
        signed = blank and line.startswith(dash) and line.endswith(b"\n")
    if kept:
        yield b"".join(kept), signed or size > LARGEST_NOTE


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree at one size.

    Attributes:
        origin: Whose tree it is.
        size: Its number of leaves.
        root: Its root hash, 32 bytes.
        extensions: Further lines, none of them empty.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a note.

        Raises:
            AuditError: It is no checkpoint.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines[-1] or not all(lines[:-1]):  # noqa: PLR2004 (three and the end)
            raise AuditError("The note is no checkpoint: it has not three lines, none empty.")
        origin, size, root, *extensions = lines[:-1]
        if not _DECIMAL.fullmatch(size):
            raise AuditError("The checkpoint's size is not a decimal number.")
        found = _base64(root, "the checkpoint's root hash")
        if len(found) != HASH_LENGTH:
            raise AuditError("The checkpoint's root hash is not 32 bytes.")
        return cls(origin, int(size), found, tuple(extensions))

    def text(self) -> str:
        """What is signed."""
        root = base64.b64encode(self.root).decode()
        return "".join(f"{x}\n" for x in (self.origin, self.size, root, *self.extensions))


@dataclass(frozen=True, slots=True)
class Proof:
    """That an entry is in a tree which a checkpoint tells.

    Attributes:
        index: Number of the entry, from 0.
        path: The proof of inclusion.
        checkpoint: The signed checkpoint, verbatim.
        extra: Opaque data that nothing vouches for.
    """

    index: int
    path: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a proof.

        Raises:
            AuditError: It is none.
        """
        head, blank, checkpoint = data.partition(b"\n\n")
        try:
            lines = head.decode().split("\n")
        except UnicodeError:
            raise _no_proof("it is not UTF-8") from None
        if not blank or lines.pop(0) != PROOF_HEADER:
            raise _no_proof(f"it does not begin with {PROOF_HEADER}, or has no checkpoint")
        extra: bytes | None = None
        if lines and lines[0].startswith("extra "):
            extra = _base64(lines.pop(0).removeprefix("extra "), "the extra data")
        index = lines.pop(0).removeprefix("index ") if lines and lines[0][:6] == "index " else ""
        if not _DECIMAL.fullmatch(index):
            raise _no_proof("it has no index")
        path = tuple(_base64(line, "a hash of the proof") for line in lines)
        if len(path) > _MOST_HASHES or any(len(node) != HASH_LENGTH for node in path):
            raise _no_proof("a hash is not 32 bytes, or there are too many")
        return cls(int(index), path, checkpoint, extra)

    def encode(self) -> bytes:
        """The proof's bytes."""
        lines = [PROOF_HEADER]
        if self.extra is not None:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines.append(f"index {self.index}")
        lines += (base64.b64encode(node).decode() for node in self.path)
        return "".join(f"{line}\n" for line in (*lines, "")).encode() + self.checkpoint


def _signature(line: str) -> Signature:
    name, blank, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not blank or not is_name(name):
        raise _no_note("a line of its signatures is none")
    data = _base64(encoded, "a signature")
    if len(data) <= _ID_LENGTH:
        raise _no_note("a signature is too short")
    return Signature(name, data[:_ID_LENGTH], data[_ID_LENGTH:])


def _base64(text: str, what: str) -> bytes:
    """Decode base64 in its one canonical form."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeError, ValueError):
        data = b""
    if not data or base64.b64encode(data).decode() != text:
        raise AuditError(f"It cannot be read: {what} is not base64.")
    return data


def _no_key(reason: str) -> AuditError:
    return AuditError(
        f"The verifier key cannot be read: {reason}.",
        hint="It is what AuditTrail.verifier_key() tells, on one line.",
    )


def _no_note(reason: str) -> AuditError:
    return AuditError(f"The signed note cannot be read: {reason}.")


def _no_proof(reason: str) -> AuditError:
    return AuditError(f"The proof cannot be read: {reason}.")

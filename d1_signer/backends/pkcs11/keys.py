# SPDX-License-Identifier: Apache-2.0
"""Finding the one private key that a URI describes, and its public half."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from pkcs11 import Attribute, KeyType, ObjectClass, exceptions as sdk

from d1_signer.backends.pkcs11.failures import Recovery, answer_of, recovery_for
from d1_signer.backends.pkcs11.module.cryptoki import shown
from d1_signer.backends.pkcs11.public_keys import candidates
from d1_signer.backends.pkcs11.returns import code_of, is_vendors
from d1_signer.backends.pkcs11.session import attributes
from d1_signer.backends.pkcs11.session.session import Session
from d1_signer.backends.pkcs11.tokens import listed
from d1_signer.backends.pkcs11.uri import Pkcs11Uri, id_in_uri
from d1_signer.errors import (
    AmbiguousKeyError,
    InvalidKeyError,
    KeyMismatchError,
    KeyNotFoundError,
    SignerError,
)
from d1_signer.es256 import PublicKey

P256 = bytes.fromhex("06082a8648ce3d030107")  # the OID secp256r1 in DER, as in CKA_EC_PARAMS
_P256_BY_NAME = {b"\x13" + bytes((len(name),)) + name for name in (b"secp256r1", b"prime256v1")}
_NAMED_CURVE = (0x06, 0x13)  # an OID, or a name as PKCS#11 v3.0 allows; else it is spelt out
_PROOF = b"d1_signer/pkcs11/proof-of-key/v1\0"  # no JWT and no TLS handshake begins so


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundKey:
    """A private key on a token, and what may be its public half.

    Attributes:
        private: Its handle.
        publics: Public keys, one at least; with one that was given or pinned, that one alone.
        id: ``CKA_ID``; may be empty.
        always_authenticate: It wants a login with each signature.
    """

    private: int
    publics: frozenset[PublicKey]
    id: bytes
    always_authenticate: bool


def find_key(session: Session, uri: Pkcs11Uri, given: PublicKey | None) -> FoundKey:
    """Find the one private key that the URI describes, and its public key.

    Args:
        session: A session; the caller is inside its module, and the user logged in.
        uri: What to look for.
        given: The public key, for a token that does not tell it.

    Raises:
        KeyNotFoundError: No key fits, or its public key is nowhere.
        AmbiguousKeyError: More than one fits.
        InvalidKeyError: It is no P-256 key that may sign, or its public key cannot be read.
        KeyMismatchError: The public key on the token is another than the given one.
    """
    private = _private_key(session, uri)
    key_id = attributes.octets(session, private, Attribute.ID) or b""
    label = attributes.text(session, private, Attribute.LABEL) or uri.object
    seen = candidates(session, private, key_id, label)
    if given is not None and seen.keys and given not in seen.keys:
        raise _another(seen.keys)
    publics = {given} if given is not None else seen.keys
    if not publics:
        kind, answer = _key_type(session, private)
        untold = [] if kind else [f"CKA_KEY_TYPE ({answer})"]
        raise _no_public_key(uri.location(key_id), untold + seen.unreadable)
    always = attributes.flag(session, private, Attribute.ALWAYS_AUTHENTICATE) is True
    return FoundKey(
        private=private, publics=frozenset(publics), id=key_id, always_authenticate=always
    )


def digest_to_prove() -> bytes:
    """What a key signs to prove that it fits its public key: a digest of 32 bytes."""
    return hashlib.sha256(_PROOF + os.urandom(32)).digest()


def _private_key(session: Session, uri: Pkcs11Uri) -> int:
    """The one key that fits and can be used; others of the same name are passed over."""
    found = session.find(ObjectClass.PRIVATE_KEY, label=uri.object, key_id=uri.id)
    if not found:
        raise _none(session, uri)
    reasons = {item: _unfit(session, item) for item in found}
    fit = [item for item, reason in reasons.items() if reason is None]
    if len(fit) == 1:
        return fit[0]
    if not fit:
        told = {reason for reason in reasons.values() if reason}
        raise InvalidKeyError(
            f"The key {' and '.join(sorted(told))}: {uri.location()}.",
            hint="D1 takes ES256 only: use a key on P-256 that was made for signing.",
            details={"step": "key", "keys": len(found)},
        )
    both = uri.object is not None and uri.id is not None
    raise AmbiguousKeyError(
        f"{len(fit)} private keys fit {uri.location()}; seen: {_listed(session, fit)}.",
        hint="Give one of them another id with the vendor's tool."
        if both
        else "Name the key by both its label (object) and its id.",
        details={"step": "key", "keys": len(fit)},
    )


def _none(session: Session, uri: Pkcs11Uri) -> SignerError:
    others = session.find(ObjectClass.PRIVATE_KEY)
    hint = "Check object and id in the key URI; d1-signer generate-key makes a key."
    if not others:
        hint = "The token shows no private key to this user at all: check the user and the PIN."
    elif (octets := _read_as_hex(uri.id)) is not None and session.find(
        ObjectClass.PRIVATE_KEY, key_id=octets
    ):
        hint = (
            f"An id in a URI is bytes, not hexadecimal: {id_in_uri(uri.id or b'')} was asked for; "
            f"write {id_in_uri(octets)}."
        )
    return KeyNotFoundError(
        f"No private key fits {uri.location()}; seen: {_listed(session, others)}.",
        hint=hint,
        details={"step": "key", "keys": 0},
    )


def _read_as_hex(key_id: bytes | None) -> bytes | None:
    """What an id is if it was written as other tools print it: ``01:a0`` or ``01A0``."""
    try:
        return bytes.fromhex((key_id or b"").decode("ascii").replace(":", "")) or None
    except ValueError:
        return None


def _listed(session: Session, items: Iterable[int]) -> str:
    return listed(described(session, item) for item in items)


def described(session: Session, item: int) -> str:
    """A key by its label, id and type, as the token tells them."""
    label = attributes.text(session, item, Attribute.LABEL) or ""
    key_id = attributes.octets(session, item, Attribute.ID)
    named = id_in_uri(key_id) if key_id else "no id"
    return f"{shown(label)!r} ({named}, {_kind(session, item)})"


def _kind(session: Session, item: int) -> str:
    number = attributes.number(session, item, Attribute.KEY_TYPE)
    if number is None:
        return "of unknown type"
    try:
        return KeyType(number).name
    except ValueError:
        return f"type {number:#x}"


def _unfit(session: Session, item: int) -> str | None:
    """Why a private key cannot be used; None where nothing speaks against it."""
    told, _ = _key_type(session, item)
    if told:
        kind = attributes.ulong(told)
        if kind is None:
            return f"is of a type that cannot be read (CKA_KEY_TYPE of {len(told)} bytes)"
        if kind != KeyType.EC:
            return f"is no EC key but {_kind(session, item)}"
    # A curve that is spelt out, or not told, is left to the public key, which is on P-256 or not.
    curve = attributes.octets(session, item, Attribute.EC_PARAMS)
    if curve and curve[0] in _NAMED_CURVE and curve not in {P256, *_P256_BY_NAME}:
        return "is on another curve than P-256"
    sign = attributes.octets(session, item, Attribute.SIGN)
    if sign and len(sign) != 1:
        return f"may sign or not (CKA_SIGN of {len(sign)} bytes cannot be read)"
    return "may not sign (CKA_SIGN)" if sign == b"\0" else None


def _key_type(session: Session, item: int) -> tuple[bytes, str]:
    """``CKA_KEY_TYPE``; where it is not told, nothing and the module's answer.

    The first signature decides then: it is made by CKM_ECDSA and verified on P-256.
    """
    try:
        return session.attribute(item, Attribute.KEY_TYPE), "0 bytes"
    except sdk.PKCS11Error as failure:
        code = code_of(failure)
        if recovery_for(failure) is not Recovery.NONE and not is_vendors(code or 0):
            raise
        return b"", answer_of(failure)


def _no_public_key(location: str, unreadable: list[str]) -> SignerError:
    if unreadable:
        return InvalidKeyError(
            f"The public key of {location} cannot be read: {listed(unreadable)}.",
            hint="Give the public key (public_key=PEM); the first signature checks it.",
            details={"step": "key"},
        )
    return KeyNotFoundError(
        f"The token has no public key and no certificate for {location}.",
        hint="Store one of them with the key's id, or give the public key (public_key=PEM).",
        details={"step": "key"},
    )


def _another(seen: set[PublicKey]) -> KeyMismatchError:
    thumbprints = ", ".join(sorted(key.thumbprint() for key in seen))
    return KeyMismatchError(
        "The public key on the token is not the one that was given.",
        hint=f"Its thumbprint is {thumbprints}.",
        details={"step": "key"},
    )

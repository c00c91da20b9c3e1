# SPDX-License-Identifier: Apache-2.0
"""The public half of a private key on a token: where it may be, and in which forms.

A token tells it in a public key object, in a certificate, or with the private key itself. Which
object belongs to the key is only a matter of ids and labels, so what is found here are candidates:
the first signature decides among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from asn1crypto.x509 import Certificate
from pkcs11 import Attribute, ObjectClass

from d1_signer.backends.pkcs11.session.attributes import PUBLIC_KEY_INFO, octets
from d1_signer.backends.pkcs11.session.session import Session
from d1_signer.errors import InvalidKeyError
from d1_signer.es256 import PublicKey

_OCTET_STRING, _BIT_STRING, _SEQUENCE = 0x04, 0x03, 0x30
_LAYERS = 3  # of DER around a point
_SHOWN = 4  # first bytes of what cannot be read


@dataclass(kw_only=True, slots=True)
class Candidates:
    """What was found.

    Attributes:
        keys: Public keys on P-256.
        unreadable: What is there beside them and cannot be read, in words.
    """

    keys: set[PublicKey] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


def candidates(session: Session, private: int, key_id: bytes, label: str | None) -> Candidates:
    """Look in one place after the other, until one has a public key on P-256.

    Args:
        session: The user is logged in.
        private: The private key.
        key_id: Its ``CKA_ID``; may be empty.
        label: Its ``CKA_LABEL``, if any.
    """
    seen = Candidates()
    for values in _places(session, private, key_id, label):
        for what, value, read in values:
            if not value:
                continue
            key = read(value)
            if key is None:
                begin = value[:_SHOWN].hex(" ")
                seen.unreadable.append(f"{what} of {len(value)} bytes, beginning {begin}")
            else:
                seen.keys.add(key)
        if seen.keys:
            break
    return seen


_Value = tuple[str, bytes | None, Callable[[bytes], PublicKey | None]]


def _places(
    session: Session, private: int, key_id: bytes, label: str | None
) -> Iterator[Iterator[_Value]]:
    if key_id:
        yield _points(session, session.find(ObjectClass.PUBLIC_KEY, key_id=key_id))
        yield _certificates(session, session.find(ObjectClass.CERTIFICATE, key_id=key_id))
    yield _with_the_private_key(session, private)
    if label:
        yield _points(session, session.find(ObjectClass.PUBLIC_KEY, label=label))
        yield _certificates(session, session.find(ObjectClass.CERTIFICATE, label=label))


def _points(session: Session, items: list[int]) -> Iterator[_Value]:
    for item in items:
        yield "CKA_EC_POINT", octets(session, item, Attribute.EC_POINT), read_point


def _certificates(session: Session, items: list[int]) -> Iterator[_Value]:
    for item in items:
        yield "a certificate", octets(session, item, Attribute.VALUE), _of_certificate


def _with_the_private_key(session: Session, private: int) -> Iterator[_Value]:
    yield "CKA_PUBLIC_KEY_INFO", octets(session, private, PUBLIC_KEY_INFO), read_point
    yield "CKA_EC_POINT", octets(session, private, Attribute.EC_POINT), read_point


def read_point(value: bytes) -> PublicKey | None:
    """The key in a ``CKA_EC_POINT``; None unless it can be read in exactly one way.

    The standard asks for a DER OCTET STRING with the point as in SEC 1. Modules also give the point
    bare, in a BIT STRING, as x||y without the byte for its form, or a SubjectPublicKeyInfo. Each
    reading counts only if its point is on the curve.
    """
    read = {_on_the_curve(form) for form in (value, *_inside(value))}
    if value and value[0] == _SEQUENCE:
        read.add(_key(PublicKey.from_der, value))
    read.discard(None)
    return read.pop() if len(read) == 1 else None


def _on_the_curve(form: bytes) -> PublicKey | None:
    match len(form), form[:1]:
        case 64, _:
            form = b"\x04" + form
        case 65, b"\x06" | b"\x07" if form[0] & 1 == form[-1] & 1:  # hybrid: y and its parity
            form = b"\x04" + form[1:]
        case (65, b"\x04") | (33, b"\x02" | b"\x03"):
            pass
        case _:
            return None
    return _key(PublicKey.from_point, form)


def _inside(value: bytes) -> Iterator[bytes]:
    """What is in an OCTET STRING or a BIT STRING, and what is in that."""
    for _ in range(_LAYERS):
        if len(value) < 2 or value[0] not in {_OCTET_STRING, _BIT_STRING}:  # noqa: PLR2004
            return
        long_form = value[1] & 0x7F if value[1] & 0x80 else 0
        start = 2 + long_form
        length = int.from_bytes(value[2:start], "big") if long_form else value[1]
        if not length or length != len(value) - start:
            return
        value = value[start + (value[0] == _BIT_STRING) :]  # its first byte counts unused bits
        yield value


def _of_certificate(der: bytes) -> PublicKey | None:
    try:
        info = Certificate.load(der)["tbs_certificate"]["subject_public_key_info"].dump()
    except (ValueError, TypeError, KeyError):
        return None
    return _key(PublicKey.from_der, info)


def _key(read: Callable[[bytes], PublicKey], value: bytes) -> PublicKey | None:
    try:
        return read(value)
    except InvalidKeyError:
        return None

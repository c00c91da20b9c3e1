# SPDX-License-Identifier: Apache-2.0
"""Finding the token and the key, the public key, and what the token claims about the key."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pkcs11
from asn1crypto.x509 import Certificate
from pkcs11 import Attribute, KeyType, ObjectClass, SlotFlag, exceptions as sdk
from pkcs11.attributes import AttributeMapper

from d1_signer.backends.pkcs11.failures import told
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.module.slots import tokens
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.custody.evidence import Evidence, Fact, FactValue
from d1_signer.errors import (
    AmbiguousKeyError,
    InvalidKeyError,
    KeyMismatchError,
    KeyNotFoundError,
    SignerError,
)
from d1_signer.es256 import PublicKey

P256 = bytes.fromhex("06082a8648ce3d030107")  # the OID secp256r1 in DER, as in CKA_EC_PARAMS
_PROOF = b"d1_signer/pkcs11/proof-of-key/v1\0"  # no JWT and no TLS handshake begins so
_SHOWN = 10  # candidates listed in an error

_UNREADABLE = (
    sdk.AttributeTypeInvalid,
    sdk.AttributeSensitive,
    sdk.AttributeValueInvalid,
    sdk.FunctionFailed,
    NotImplementedError,  # the binding knows no type for it
    ValueError,  # the module's value is not of that type
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundKey:
    """A private key on a token, and its public half."""

    private: pkcs11.SignMixin = field(repr=False)  # its repr would call the module
    public: PublicKey
    id: bytes
    always_authenticate: bool


# -- the token --------------------------------------------------------------------------------


def find_token(module: Module, uri: Pkcs11Uri) -> pkcs11.Token:
    """Find the one token that the URI describes; the caller is inside the module.

    Raises:
        KeyNotFoundError: None fits.
        AmbiguousKeyError: More than one fits.
    """
    present, answers = tokens(module.binding, module.cryptoki)
    silent = _listed(f"{slot} ({told(error)})" for slot, error in answers.items())
    fitting = [token for token in present if _token_fits(token, uri)]
    if uri.library_version is not None or _library_texts(uri):
        fitting = fitting if _library_fits(module, uri) else []
    if len(fitting) == 1:
        return fitting[0]
    kind = AmbiguousKeyError if fitting else KeyNotFoundError
    how = "More than one token fits" if fitting else "No token fits"
    passed_over = f"; slots that do not tell: {silent}" if answers else ""
    raise kind(
        f"{how} {uri.token_location()}; seen: {_listed(map(_token_text, fitting or present))}"
        f"{passed_over}.",
        hint="Name the token by its label or serial number in the key URI.",
        # A slot that does not tell may be the right one, in use by others for now.
        retryable=bool(answers) and not fitting,
        details={
            "step": "token",
            "tokens": len(fitting),
            **({"silent_slots": silent} if answers else {}),
        },
    )


def _token_fits(token: pkcs11.Token, uri: Pkcs11Uri) -> bool:
    wanted = {
        "token": token.label,
        "manufacturer": token.manufacturer_id,
        "serial": token.serial.decode("utf-8", "replace"),
        "model": token.model,
        "slot-description": token.slot.slot_description,
        "slot-manufacturer": token.slot.manufacturer_id,
    }
    if uri.slot_id not in {None, token.slot.slot_id}:
        return False
    return all(uri.texts.get(name) in {None, value.rstrip()} for name, value in wanted.items())


def _library_texts(uri: Pkcs11Uri) -> bool:
    return bool({"library-manufacturer", "library-description"} & uri.texts.keys())


def _library_fits(module: Module, uri: Pkcs11Uri) -> bool:
    info = module.cryptoki.info()
    major, minor = uri.library_version or info.version
    return (
        uri.texts.get("library-manufacturer") in {None, info.manufacturer}
        and uri.texts.get("library-description") in {None, info.description}
        and major == info.version[0]
        and minor in {None, info.version[1]}
    )


def _token_text(token: pkcs11.Token) -> str:
    serial = token.serial.decode("utf-8", "replace")
    return f"{token.label!r} (serial {serial}, slot {token.slot.slot_id})"


class _AsItIs(AttributeMapper):
    """Takes values that are packed already, without a line of Python.

    A signal's handler may raise in any function that is written in Python, and python-pkcs11
    (0.10.1) frees pointers that it has not set where packing raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pack_attribute = {}.get  # type: ignore[method-assign, assignment]  # its second argument


_as_it_is, _packing = _AsItIs(), AttributeMapper()


def opened(token: pkcs11.Token) -> pkcs11.Session:
    """A session for `objects` and for signing; it makes none."""
    return token.open(attribute_mapper=_as_it_is)


@contextlib.contextmanager
def session_on(token: pkcs11.Token) -> Iterator[pkcs11.Session]:
    """As `opened`, closed; that a dead one cannot be closed does not hide why it died."""
    session = opened(token)
    try:
        yield session
    finally:
        with contextlib.suppress(sdk.PKCS11Error):
            session.close()


# -- the key ----------------------------------------------------------------------------------


def find_key(session: pkcs11.Session, uri: Pkcs11Uri, given: PublicKey | None) -> FoundKey:
    """Find the one private key that the URI describes, and its public key.

    Args:
        session: A session; the caller is inside its module, and the user logged in.
        uri: What to look for.
        given: The public key, for a token that holds neither it nor a certificate.

    Raises:
        KeyNotFoundError: No key fits, or its public key is nowhere.
        AmbiguousKeyError: More than one fits.
        InvalidKeyError: It is no P-256 key that may sign.
        KeyMismatchError: The public key on the token is another than the given one.
    """
    found = objects(session, ObjectClass.PRIVATE_KEY, label=uri.object, key_id=uri.id)
    if len(found) != 1:
        raise _not_one(session, uri, found)
    private = found[0]
    key_id = attribute(private, Attribute.ID) or b""
    _check_signing_key(private, uri.location(key_id))
    public = _public_key(session, private, key_id, uri)
    if public is None:
        public = given
    if public is None:
        raise KeyNotFoundError(
            f"The token has no public key and no certificate for {uri.location(key_id)}.",
            hint="Store one of them with the key's id, or give the option public_key.",
            details={"step": "key"},
        )
    if given is not None and public != given:
        raise KeyMismatchError(
            "The public key on the token is not the one that was given.",
            hint=f"Its thumbprint is {public.thumbprint()}.",
            details={"step": "key"},
        )
    return FoundKey(
        private=private,
        public=public,
        id=key_id,
        always_authenticate=attribute(private, Attribute.ALWAYS_AUTHENTICATE) is True,
    )


def digest_to_prove() -> bytes:
    """What a key signs to prove that it fits its public key: a digest of 32 bytes."""
    return hashlib.sha256(_PROOF + os.urandom(32)).digest()


def objects(
    session: pkcs11.Session,
    kind: ObjectClass,
    *,
    label: str | None = None,
    key_id: bytes | None = None,
) -> list[Any]:
    """All objects of a class with this label and id, by a session of `opened`.

    A list, always: while a search is open, it holds the session's lock against other threads. One
    that could not begin calls the module once more when it is freed, so that is done here, inside
    the module, and not whenever the error's traceback goes.
    """
    wanted = {Attribute.CLASS: kind, Attribute.LABEL: label, Attribute.ID: key_id}
    template = {
        name: _packing.pack_attribute(name, value)
        for name, value in wanted.items()
        if value is not None
    }
    try:
        return list(session.get_objects(template))
    except sdk.PKCS11Error as failure:
        raise failure.with_traceback(None) from None


def attribute(item: Any, name: Attribute) -> Any:
    """An attribute's value; None where the token does not tell."""
    try:
        return item[name]
    except _UNREADABLE:
        return None
    except sdk.PKCS11Error as error:
        # "Cannot be told" under a return value that the binding has no name for.
        if type(error) is sdk.PKCS11Error and "initialized" not in str(error):
            return None
        raise


def _not_one(session: pkcs11.Session, uri: Pkcs11Uri, found: list[Any]) -> SignerError:
    others = found or objects(session, ObjectClass.PRIVATE_KEY)
    listed = _listed(map(_key_text, others))
    details: dict[str, str | int | float] = {"step": "key", "keys": len(found)}
    if found:
        return AmbiguousKeyError(
            f"{len(found)} private keys fit {uri.location()}; seen: {listed}.",
            hint="Name the key by both its label (object) and its id.",
            details=details,
        )
    return KeyNotFoundError(
        f"No private key fits {uri.location()}; seen: {listed}.",
        hint="Check object and id in the key URI; d1-signer generate-key makes a key.",
        details=details,
    )


def _key_text(item: Any) -> str:
    label = attribute(item, Attribute.LABEL)
    key_id = attribute(item, Attribute.ID) or b""
    return f"{label!r} (id {key_id.hex() or 'none'})"


def _listed(texts: Iterable[str]) -> str:
    shown = list(texts)
    more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "none") + more


def _check_signing_key(private: Any, location: str) -> None:
    curve = attribute(private, Attribute.EC_PARAMS)
    if attribute(private, Attribute.KEY_TYPE) != KeyType.EC or curve not in {None, P256}:
        raise InvalidKeyError(
            f"The key is no EC key on P-256: {location}.",
            hint="D1 takes ES256 only: use a key on P-256.",
            details={"step": "key"},
        )
    if not isinstance(private, pkcs11.SignMixin):
        raise InvalidKeyError(
            f"The key may not sign (CKA_SIGN): {location}.",
            hint="Use a key that was made for signing.",
            details={"step": "key"},
        )


def _public_key(
    session: pkcs11.Session, private: Any, key_id: bytes, uri: Pkcs11Uri
) -> PublicKey | None:
    """The public key that the token tells: a public object, else a certificate with the same id."""
    label = attribute(private, Attribute.LABEL) or uri.object
    by: dict[str, Any] = {"key_id": key_id} if key_id else {"label": label}
    points = (
        attribute(item, Attribute.EC_POINT)
        for item in objects(session, ObjectClass.PUBLIC_KEY, **by)
    )
    found = _distinct(points, PublicKey.from_point)
    if not found:
        certificates = (
            attribute(item, Attribute.VALUE)
            for item in objects(session, ObjectClass.CERTIFICATE, **by)
        )
        found = _distinct(certificates, _of_certificate)
    if len(found) > 1:
        raise AmbiguousKeyError(
            f"The token has {len(found)} different public keys for {uri.location(key_id)}.",
            hint="Remove the wrong ones, or give the right one its own id.",
            details={"step": "key", "keys": len(found)},
        )
    return next(iter(found), None)


def _distinct(values: Iterable[Any], read: Callable[[bytes], PublicKey]) -> set[PublicKey]:
    try:
        return {read(value) for value in values if value}
    except InvalidKeyError as error:
        error.details["step"] = "key"
        raise


def _of_certificate(der: bytes) -> PublicKey:
    try:
        info = Certificate.load(der)["tbs_certificate"]["subject_public_key_info"].dump()
    except (ValueError, TypeError, KeyError):
        raise InvalidKeyError("The certificate on the token cannot be read.") from None
    return PublicKey.from_der(info)


# -- custody ----------------------------------------------------------------------------------

_ATTRIBUTES = (
    Attribute.LOCAL,
    Attribute.SENSITIVE,
    Attribute.ALWAYS_SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.NEVER_EXTRACTABLE,
    Attribute.KEY_GEN_MECHANISM,
    Attribute.SIGN,
    Attribute.DECRYPT,
    Attribute.DERIVE,
    Attribute.UNWRAP,
    Attribute.ALWAYS_AUTHENTICATE,
)


def evidence(module: Module, token: pkcs11.Token, found: FoundKey, uri: Pkcs11Uri) -> Evidence:
    """What the token claims about the key; the caller is inside the module."""
    values = {name: attribute(found.private, name) for name in _ATTRIBUTES}
    facts = [
        Fact(name=f"CKA_{name.name}", value=_plain(value), source="PKCS#11 attribute")
        for name, value in values.items()
    ]
    info = module.cryptoki.info()
    of_token: dict[str, FactValue] = {
        "token label": token.label,
        "token serial": token.serial.decode("utf-8", "replace"),
        "token manufacturer": token.manufacturer_id,
        "token model": token.model,
        "token flags": _flags(token.slot.get_token().flags),
        "CKF_HW_SLOT": bool(token.slot.flags & SlotFlag.HW_SLOT),
        "library description": info.description,
        "library version": f"{info.version[0]}.{info.version[1]}",
    }
    facts += [Fact(name=name, value=value, source="PKCS#11") for name, value in of_token.items()]
    facts.append(Fact(name="locking", value=str(module.locking), source="d1_signer"))
    return Evidence(
        location=uri.location(found.id),
        exportable=_exportable(
            sensitive=values[Attribute.SENSITIVE], extractable=values[Attribute.EXTRACTABLE]
        ),
        generated_in_place=values[Attribute.LOCAL],
        hardware=bool(token.slot.flags & SlotFlag.HW_SLOT),
        facts=tuple(facts),
    )


def _exportable(*, sensitive: bool | None, extractable: bool | None) -> bool | None:
    """PKCS#11 section 4.9: a sensitive key never leaves in clear, an extractable one wrapped."""
    if sensitive is False or extractable is True:
        return True
    return None if sensitive is None or extractable is None else False


def _plain(value: Any) -> FactValue:
    if value is None or isinstance(value, bool | str):
        return value
    return str(getattr(value, "name", value))


def _flags(flags: Any) -> str:
    return " ".join(f"CKF_{flag.name}" for flag in type(flags) if flags & flag)

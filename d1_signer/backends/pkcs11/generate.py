# SPDX-License-Identifier: Apache-2.0
"""Making a key on a token."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from pkcs11 import Attribute, KeyType, ObjectClass, exceptions as sdk

from d1_signer.backends.pkcs11.failures import translated
from d1_signer.backends.pkcs11.keys import P256, described
from d1_signer.backends.pkcs11.module import owners
from d1_signer.backends.pkcs11.module.token import Token
from d1_signer.backends.pkcs11.public_keys import read_point
from d1_signer.backends.pkcs11.returns import Ckr, code_of
from d1_signer.backends.pkcs11.session import attributes
from d1_signer.backends.pkcs11.session.at_exit import kept_threads
from d1_signer.backends.pkcs11.session.login import Login
from d1_signer.backends.pkcs11.session.pin import Pin
from d1_signer.backends.pkcs11.session.session import Session, Template, session_on
from d1_signer.backends.pkcs11.settings import Settings
from d1_signer.backends.pkcs11.tokens import find_token
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.errors import InvalidKeyError, KeyExistsError, SignerError, SignerTimeout
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret
from d1_signer.signing import forks
from d1_signer.signing.backend import GeneratedKey

_ID_LENGTH = 8

_PROTECTION = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
}
_USES = {
    Attribute.SIGN: True,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
_PUBLIC_USES = {Attribute.VERIFY: True, Attribute.ENCRYPT: False, Attribute.WRAP: False}

# Modules refuse single uses, even those that are false, most often of the public key, whose uses
# tpm2-pkcs11 sets by itself. Each next template leaves out more; what was made is checked after.
_TEMPLATES: tuple[tuple[Template, Template], ...] = (
    (_USES, _PUBLIC_USES),
    (_USES, {Attribute.VERIFY: True}),
    (_USES, {}),
    ({Attribute.SIGN: True}, {Attribute.VERIFY: True}),
    ({Attribute.SIGN: True}, {}),
)
_REFUSALS = {
    Ckr.ARGUMENTS_BAD,
    Ckr.ATTRIBUTE_READ_ONLY,
    Ckr.ATTRIBUTE_TYPE_INVALID,
    Ckr.ATTRIBUTE_VALUE_INVALID,
    Ckr.FUNCTION_FAILED,
    Ckr.GENERAL_ERROR,
    Ckr.KEY_FUNCTION_NOT_PERMITTED,
    Ckr.TEMPLATE_INCOMPLETE,
    Ckr.TEMPLATE_INCONSISTENT,
}
_DEMANDED = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
}
_FORBIDDEN = (Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DERIVE)
# Not every module tells them; one that says no has made the key in another way than was asked for.
# CKA_LOCAL is not among them: NSS denies it of every key.
_NOT_DENIED = (Attribute.ALWAYS_SENSITIVE, Attribute.NEVER_EXTRACTABLE)


def generate(settings: Settings, pin: Pin, timeout: float) -> GeneratedKey:
    """Make a P-256 key where the settings' URI says; see the package's ``generate_key``."""
    forks.notice()
    secret = pin.read()
    deadline = time.monotonic() + timeout
    try:
        return kept_threads.run(lambda: _made(settings, secret, deadline), deadline)
    except SignerTimeout as error:
        error.hint = "Look whether the key is there before you try again: it may still be made."
        raise


def _made(settings: Settings, secret: Secret | None, deadline: float) -> GeneratedKey:
    module = owners.acquire(
        settings.module_path,
        locking=settings.locking,
        reserved=settings.init_reserved,
        deadline=deadline,
    )

    def inside() -> GeneratedKey:
        token = find_token(module.cryptoki, settings.uri)
        login = Login.shared(module, token, settings.user_type)
        try:
            login.ensure(secret, pin_pad=settings.pin_pad, known=False)
            key_id = _free_id(token, settings.uri)
            with session_on(token, rw=True) as session:
                return _generate(session, settings.uri, key_id)
        finally:
            login.release()

    try:
        return module.run(inside, deadline)
    except sdk.PKCS11Error as failure:
        raise translated(failure, step="key") from None
    finally:
        module.release()


def _free_id(token: Token, uri: Pkcs11Uri) -> bytes:
    """The new key's id, which no key has, as none has its label."""
    key_id = uri.id if uri.id is not None else secrets.token_bytes(_ID_LENGTH)
    with session_on(token) as session:
        for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
            for name, found in (
                ("label (object)", session.find(kind, label=uri.object)),
                ("id", session.find(kind, key_id=key_id)),
            ):
                if found:
                    raise KeyExistsError(
                        f"A key with this {name} exists: {described(session, found[0])}.",
                        hint=f"Nothing was changed; choose another {name}.",
                        details={"step": "key"},
                    )
    return key_id


def _generate(session: Session, uri: Pkcs11Uri, key_id: bytes) -> GeneratedKey:
    public, private = _pair(session, str(uri.object), key_id)
    try:
        wrong = _wrong(session, private)
        if not wrong:
            return GeneratedKey(uri=uri.generated(key_id), public_key=_public_key(session, public))
    except BaseException:
        _removed(session, private, public)
        raise
    gone = _removed(session, private, public)
    raise SignerError(
        f"The token made a key with another {' and '.join(wrong)} than asked for.",
        hint=("It was removed." if gone else f"Remove it from the token: {uri.location(key_id)}.")
        + " Check the token's policy on the attributes of new keys.",
        details={"step": "key"},
    )


def _pair(session: Session, label: str, key_id: bytes) -> tuple[int, int]:
    refusal: sdk.PKCS11Error | None = None
    for public, private in _templates(label, key_id):
        try:
            return session.generate_pair(public, private)
        except sdk.PKCS11Error as failure:
            first, refusal = refusal, refusal or failure.with_traceback(None)
            if code_of(failure) not in _REFUSALS or session.find(
                ObjectClass.PRIVATE_KEY, key_id=key_id
            ):
                raise first or failure from None
    assert refusal is not None  # noqa: S101 (there are templates)
    raise refusal


def _templates(label: str, key_id: bytes) -> Iterator[tuple[Template, Template]]:
    """Of the public and of the private key, from the one that says most to the shortest."""
    both: Template = {
        Attribute.TOKEN: True,
        Attribute.KEY_TYPE: KeyType.EC,
        Attribute.LABEL: label,
        Attribute.ID: key_id,
    }
    for uses, public_uses in _TEMPLATES:
        public = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, **both, Attribute.EC_PARAMS: P256}
        private = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, **both, **_PROTECTION}
        yield {**public, **public_uses}, {**private, **uses}


def _wrong(session: Session, private: int) -> list[str]:
    """The attributes that are not as demanded, by name."""
    names = (*_DEMANDED, *_FORBIDDEN, *_NOT_DENIED)
    told = {name: attributes.flag(session, private, name) for name in names}
    wrong = [name for name, value in _DEMANDED.items() if told[name] is not value]
    wrong += [name for name in _FORBIDDEN if told[name] is True]
    wrong += [name for name in _NOT_DENIED if told[name] is False]
    return [f"CKA_{name.name}" for name in wrong]


def _public_key(session: Session, public: int) -> PublicKey:
    point = session.attribute(public, Attribute.EC_POINT)
    key = read_point(point)
    if key is None:
        raise InvalidKeyError(
            f"The token made a key whose CKA_EC_POINT, of {len(point)} bytes, cannot be read.",
            hint="It was removed. Make one with the vendor's tool, and give its public key.",
            details={"step": "key"},
        )
    return key


def _removed(session: Session, *items: int) -> bool:
    gone = True
    for item in items:
        try:
            session.destroy(item)
        except sdk.PKCS11Error:
            gone = False
    return gone

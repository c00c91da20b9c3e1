# SPDX-License-Identifier: Apache-2.0
"""Making a key on a token."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass, exceptions as sdk

from d1_signer.backends.pkcs11 import keys
from d1_signer.backends.pkcs11.failures import translated
from d1_signer.backends.pkcs11.keys import P256
from d1_signer.backends.pkcs11.module import forks, owners
from d1_signer.backends.pkcs11.session.at_exit import kept_threads
from d1_signer.backends.pkcs11.session.login import Login, Pin
from d1_signer.backends.pkcs11.settings import Settings
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.errors import KeyExistsError, SignerError, SignerTimeout
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret
from d1_signer.signing.backend import GeneratedKey

_ID_LENGTH = 8

_PRIVATE = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
_PUBLIC = {Attribute.VERIFY: True, Attribute.ENCRYPT: False, Attribute.WRAP: False}
# For a module that refuses to be told what its keys are not for; what it made is checked after.
_LESS = {Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
_REFUSALS = (
    sdk.AttributeTypeInvalid,
    sdk.AttributeValueInvalid,
    sdk.AttributeReadOnly,
    sdk.TemplateIncomplete,
    sdk.TemplateInconsistent,
)
_DEMANDED = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
}
_FORBIDDEN = (Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DERIVE)


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
        token = keys.find_token(module, settings.uri)
        login = Login.shared(module, token, settings.user_type)
        try:
            login.ensure(secret, pin_pad=settings.pin_pad, known=False)
            key_id = _free_id(token, settings.uri)
            session = token.open(rw=True)
            try:
                return _generate(session, settings, key_id)
            finally:
                with contextlib.suppress(sdk.PKCS11Error):
                    session.close()
        finally:
            login.release()

    try:
        return module.run(inside, deadline)
    except sdk.PKCS11Error as failure:
        raise translated(failure, step="key") from None
    finally:
        module.release()


def _free_id(token: pkcs11.Token, uri: Pkcs11Uri) -> bytes:
    """The new key's id, which no key has, as none has its label."""
    key_id = uri.id if uri.id is not None else secrets.token_bytes(_ID_LENGTH)
    with keys.session_on(token) as session:
        for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
            if keys.objects(session, kind, label=uri.object) or keys.objects(
                session, kind, key_id=key_id
            ):
                raise KeyExistsError(
                    f"A key with that label or that id exists: {uri.location(key_id)}.",
                    hint="Nothing was changed; choose another object and id.",
                    details={"step": "key"},
                )
    return key_id


def _generate(session: pkcs11.Session, settings: Settings, key_id: bytes) -> GeneratedKey:
    uri = settings.uri
    public, private = _pair(session, str(uri.object), key_id)
    try:
        wrong = _wrong(private)
        if not wrong:
            point = keys.attribute(public, Attribute.EC_POINT)
            return GeneratedKey(uri=uri.generated(key_id), public_key=PublicKey.from_point(point))
    except BaseException:
        _removed(private, public)
        raise
    gone = _removed(private, public)
    raise SignerError(
        f"The token made a key with another {' and '.join(wrong)} than asked for.",
        hint=("It was removed." if gone else f"Remove it from the token: {uri.location(key_id)}.")
        + " Check the token's policy on the attributes of new keys.",
        details={"step": "key"},
    )


def _pair(session: pkcs11.Session, label: str, key_id: bytes) -> tuple[Any, Any]:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
    )
    common: dict[str, Any] = {"id": key_id, "label": label, "store": True}
    try:
        return parameters.generate_keypair(
            capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
            private_template=_PRIVATE,
            public_template=_PUBLIC,
            **common,
        )
    except _REFUSALS:
        # The capabilities: without them, python-pkcs11 asks for a key that derives others too.
        return parameters.generate_keypair(
            capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
            private_template=_LESS,
            **common,
        )


def _wrong(private: Any) -> list[str]:
    """The attributes that are not as demanded, by name."""
    wrong = [
        name for name, value in _DEMANDED.items() if keys.attribute(private, name) is not value
    ]
    wrong += [name for name in _FORBIDDEN if keys.attribute(private, name) is True]
    return [f"CKA_{name.name}" for name in wrong]


def _removed(*items: Any) -> bool:
    gone = True
    for item in items:
        try:
            item.destroy()
        except sdk.PKCS11Error:
            gone = False
    return gone

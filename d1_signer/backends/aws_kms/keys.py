# SPDX-License-Identifier: Apache-2.0
"""What AWS KMS says of a key, and making one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from d1_signer.backends.aws_kms.client import Client
from d1_signer.backends.aws_kms.failures import AWS_KMS, STATES, details
from d1_signer.errors import (
    D1SignerError,
    InvalidKeyError,
    KeyDisabledError,
    KeyExistsError,
    KeyMismatchError,
    KeyNotFoundError,
    SignerThrottled,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.transport.foreign import quoted

R = TypeVar("R")

ALGORITHM: Final = "ECDSA_SHA_256"
_KEY_SPEC: Final = "ECC_NIST_P256"
_KEY_USAGE: Final = "SIGN_VERIFY"
_LOOK_UP: Final = "look-up"
_MAKING: Final = "generation"
# The states in which KMS signs (AWS KMS Developer Guide, "Key states of AWS KMS keys").
_USABLE_STATES = frozenset({"Enabled", "Updating"})
_ARN = re.compile(r"arn:[a-z0-9-]{1,32}:kms:[a-z0-9-]{1,32}:\d{12}:key/[A-Za-z0-9-]{1,128}")

# AWS KMS does not know of a new key everywhere at once; and it may be busy, or away.
_PASSING = (KeyNotFoundError, KeyDisabledError, SignerUnavailable)
# Seconds between two questions for a key that was made just now.
_PAUSE = 0.5


def shown_arn(arn: str) -> str:
    """An ARN as it is where it looks like one of a key, else quoted."""
    return arn if _ARN.fullmatch(arn) else quoted(arn)


def describe(client: Client, key_id: str, until: float) -> Mapping[str, Any]:
    """What AWS KMS says of a key that can sign for D1.

    Raises:
        InvalidKeyError: Of another kind.
        KeyDisabledError: In a state in which it does not sign.
        IntegrityError: The answer cannot be one of AWS KMS.
    """
    answer = client.call(
        until, "to describe the key", _LOOK_UP, client.kms.describe_key, KeyId=key_id
    )
    metadata = answer.get("KeyMetadata")
    arn = metadata.get("Arn") if isinstance(metadata, Mapping) else None
    if not isinstance(metadata, Mapping) or not isinstance(arn, str) or not _ARN.fullmatch(arn):
        raise AWS_KMS.altered("gave a description of the key that is not complete.", _told(answer))
    spec, usage = metadata.get("KeySpec"), metadata.get("KeyUsage")
    if spec != _KEY_SPEC or usage != _KEY_USAGE:
        raise InvalidKeyError(
            f"The key {arn} is of spec {quoted(str(spec))} for {quoted(str(usage))}.",
            hint=f"D1 takes ES256 only: use a key of spec {_KEY_SPEC} for {_KEY_USAGE}.",
            details=_told(answer),
        )
    state = str(metadata.get("KeyState"))
    if state not in _USABLE_STATES:
        hint, retryable = STATES.get(state, ("Look at the key's state in AWS KMS.", False))
        shown = state if state in STATES else quoted(state)
        raise KeyDisabledError(
            f"The key {arn} is in the state {shown}.",
            hint=hint,
            retryable=retryable,
            details=_told(answer),
        )
    return metadata


def public_key(client: Client, key_id: str, arn: str, until: float) -> PublicKey:
    """The public key, which must be the one of ``arn``.

    Raises:
        KeyMismatchError: Another key.
        IntegrityError: The answer cannot be one of AWS KMS.
    """
    answer = client.call(
        until, "to give the public key", _LOOK_UP, client.kms.get_public_key, KeyId=key_id
    )
    der, answered = answer.get("PublicKey"), answer.get("KeyId")
    if not isinstance(der, bytes) or not isinstance(answered, str) or not answered:
        raise AWS_KMS.altered("gave a public key that is not complete.", _told(answer))
    if answered != arn:
        raise KeyMismatchError(
            f"{key_id} was {arn} and is {shown_arn(answered)} a moment later.",
            hint="The alias was pointed at another key just now; open the signer anew.",
            details=_told(answer),
        )
    return PublicKey.from_der(der)


def _told(answer: Mapping[str, Any]) -> dict[str, str | int | float]:
    return {"phase": _LOOK_UP, **details(answer)}


def make(client: Client, alias: str, description: str, until: float) -> PublicKey:
    """Make a key, and give it an alias.

    Raises:
        KeyExistsError: The alias exists.
        D1SignerError: With ``details["made"]``, where a key was made before it failed.
    """
    if _pointed_at(client, alias, until) is not None:
        raise KeyExistsError(
            f"{alias} exists.", hint="It is not pointed at another key; choose another alias."
        )
    arn = _create(client, description, until)
    try:
        _asked_again(until, _PASSING, partial(_give_alias, client, alias, arn, until))
        # A new alias is not seen at once everywhere.
        return _asked_again(until, _PASSING, partial(public_key, client, arn, arn, until))
    except D1SignerError as error:
        failure = error.with_traceback(None)
    # Outside of the block, so that the look at the alias does not have it as its context.
    found = _alias_after(client, alias, until)
    what = f"it is {alias}" if found == arn else "it has no alias, as far as is known"
    failure.hint = (
        f"{failure.hint} The key {arn} was made before that, and {what}: keep or delete it."
    )
    failure.details["made"] = arn
    raise failure


def _create(client: Client, description: str, until: float) -> str:
    ask = partial(
        client.call,
        until,
        "to make a key",
        _MAKING,
        client.kms.create_key,
        KeySpec=_KEY_SPEC,
        KeyUsage=_KEY_USAGE,
        Description=description,
    )
    try:
        answer = _asked_again(until, (SignerThrottled,), ask)
    except SignerUnavailable as error:
        if not isinstance(error, SignerThrottled):
            error.hint = (
                f"{error.hint} It may have made a key whose answer was lost: look for one without "
                f"an alias, made now, with the description {quoted(description)}."
            )
        raise
    metadata = answer.get("KeyMetadata")
    arn = metadata.get("Arn") if isinstance(metadata, Mapping) else None
    if not isinstance(arn, str) or not _ARN.fullmatch(arn):
        raise AWS_KMS.altered(
            "answered without the key that it made: look for one without an alias.", _told(answer)
        )
    return arn


def _give_alias(client: Client, alias: str, arn: str, until: float) -> None:
    try:
        client.call(
            until,
            f"to make {alias}",
            _MAKING,
            client.kms.create_alias,
            AliasName=alias,
            TargetKeyId=arn,
        )
    except KeyExistsError:
        # As where the answer to an attempt before this one was lost.
        if _pointed_at(client, alias, until) != arn:
            raise


def _pointed_at(client: Client, alias: str, until: float) -> str | None:
    """The ARN of the key that an alias names; None where it names none."""
    try:
        answer = client.call(
            until, f"to look for {alias}", _LOOK_UP, client.kms.describe_key, KeyId=alias
        )
    except KeyNotFoundError:
        return None
    metadata = answer.get("KeyMetadata")
    return str(metadata.get("Arn")) if isinstance(metadata, Mapping) else ""


def _alias_after(client: Client, alias: str, until: float) -> str | None:
    try:
        return _pointed_at(client, alias, until)
    except D1SignerError:
        return None


def _asked_again(until: float, passing: tuple[type[D1SignerError], ...], ask: Callable[[], R]) -> R:
    while True:
        try:
            return ask()
        except passing:
            if time.monotonic() + _PAUSE >= until:
                raise
        time.sleep(_PAUSE)

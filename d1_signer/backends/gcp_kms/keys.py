# SPDX-License-Identifier: Apache-2.0
"""What Cloud KMS says of a key, and making one."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from typing import Final, TypeVar

import google_crc32c
from google.cloud import kms_v1 as kms

from d1_signer.attestation import Statement
from d1_signer.backends.gcp_kms.client import Client
from d1_signer.backends.gcp_kms.failures import CLOUD_KMS, STATES
from d1_signer.backends.gcp_kms.place import Place
from d1_signer.backends.remote import facts_of
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidKeyError,
    KeyDisabledError,
    KeyNotFoundError,
    SignerThrottled,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import GeneratedKey

R = TypeVar("R")

VERSIONS: Final = "/cryptoKeyVersions/"
ALGORITHM = kms.CryptoKeyVersion.CryptoKeyVersionAlgorithm.EC_SIGN_P256_SHA256
_LOOK_UP: Final = "look-up"
_MAKING: Final = "generation"
_SOURCE = "Cloud KMS CryptoKeyVersion"
_State = kms.CryptoKeyVersion.CryptoKeyVersionState
_Level = kms.ProtectionLevel
# By name: an older SDK does not have all of them.
_HARDWARE = {"SOFTWARE": False, "HSM": True, "HSM_SINGLE_TENANT": True}

# Seconds between two questions for a key that was made just now.
_PAUSE = 0.5


def make(client: Client, place: Place, protection_level: str, until: float) -> GeneratedKey:
    """Make a key with one version.

    Raises:
        KeyExistsError: The key exists.
        ConfigurationError: An unknown protection level.
        D1SignerError: With ``details["made"]``, where a key was, or may have been, made.
    """
    if protection_level not in _Level.__members__:
        raise ConfigurationError(
            "The protection level is unknown.", hint=f"Known: {', '.join(_Level.__members__)}."
        )
    template = kms.CryptoKeyVersionTemplate(
        algorithm=ALGORITHM, protection_level=getattr(_Level, protection_level)
    )
    request = kms.CreateCryptoKeyRequest(
        parent=place.ring,
        crypto_key_id=place.key,
        crypto_key=kms.CryptoKey(
            purpose=kms.CryptoKey.CryptoKeyPurpose.ASYMMETRIC_SIGN, version_template=template
        ),
    )
    name = f"{place.ring}/cryptoKeys/{place.key}{VERSIONS}1"
    try:
        client.call(
            until, "to make a key", _MAKING, lambda sdk: sdk.create_crypto_key, request, attempts=1
        )
    except SignerThrottled:
        raise
    except SignerUnavailable as error:
        error.hint = f"{error.hint} It may have made {place.name}: look for it in Cloud KMS."
        error.details["made"] = place.name
        raise
    try:
        asked_again(until, lambda: _enabled(client, name, until))
        made, _ = asked_again(until, lambda: public_key(client, name, until))
    except D1SignerError as error:
        error.hint = f"{error.hint} The key {place.name} was made: open {name} once it is enabled."
        error.details["made"] = name
        raise
    return GeneratedKey(uri=place.uri(name), public_key=made)


def _enabled(client: Client, name: str, until: float) -> None:
    version = describe(client, name, "for the state of the new key", until)
    if version.state != _State.ENABLED:
        state = _named(version.state)
        hint, retryable = STATES.get(state, ("Look at it in Cloud KMS.", False))
        raise KeyDisabledError(
            f"The new key {name} is in the state {state}.", hint=hint, retryable=retryable
        )


def asked_again(until: float, ask: Callable[[], R]) -> R:
    """Ask until a new key is known everywhere and enabled, or a moment has come."""
    while True:
        try:
            return ask()
        except D1SignerError as error:
            passing = error.retryable or isinstance(error, KeyNotFoundError)
            # Right after a version was enabled it may be refused still.
            passing |= error.details.get("grpc_status") == "FAILED_PRECONDITION"
            if not passing or time.monotonic() + _PAUSE >= until:
                raise
        time.sleep(_PAUSE)


def describe(client: Client, name: str, doing: str, until: float) -> kms.CryptoKeyVersion:
    """What Cloud KMS says of a version."""
    request = kms.GetCryptoKeyVersionRequest(name=name)
    return client.call(until, doing, _LOOK_UP, lambda sdk: sdk.get_crypto_key_version, request)


def newest(client: Client, key: str, until: float) -> str:
    """The newest version of a key that can sign for D1.

    Raises:
        KeyNotFoundError: There is none.
    """
    request = kms.ListCryptoKeyVersionsRequest(parent=key, filter="state=ENABLED")
    found = client.call(
        until,
        "to list the key's versions",
        _LOOK_UP,
        lambda sdk: lambda **options: list(sdk.list_crypto_key_versions(**options)),
        request,
    )
    usable = [v.name for v in found if (v.state, v.algorithm) == (_State.ENABLED, ALGORITHM)]
    if not usable:
        raise KeyNotFoundError(
            f"{key} has no enabled version for {_named(ALGORITHM)}.",
            hint="Enable or make a version, or name another key.",
        )
    number = max(int(name.rpartition("/")[2]) for name in usable)
    return f"{key}{VERSIONS}{number}"


def public_key(client: Client, version: str, until: float) -> tuple[PublicKey, int]:
    """The public key of a version, and its protection level.

    Raises:
        InvalidKeyError: For another algorithm.
        IntegrityError: The answer was altered.
    """
    request = kms.GetPublicKeyRequest(name=version)
    answer = client.call(
        until, "to give the public key", _LOOK_UP, lambda sdk: sdk.get_public_key, request
    )
    pem = answer.pem.encode()
    check(
        _LOOK_UP,
        ("name", answer.name == version),
        ("pem_crc32c", answer.pem_crc32c == google_crc32c.value(pem)),
    )
    if answer.algorithm != ALGORITHM:
        raise InvalidKeyError(
            f"The key {version} is for {_named(answer.algorithm)}.",
            hint=f"D1 takes ES256 only: use a key for {_named(ALGORITHM)}.",
        )
    return PublicKey.from_pem(pem), answer.protection_level


def check(phase: str, *fields: tuple[str, bool]) -> None:
    """Refuse an answer of which a field is not as it must be.

    Raises:
        IntegrityError: With ``details["field"]``.
    """
    for field, fits in fields:
        if not fits:
            raise CLOUD_KMS.altered(
                f"gave an answer whose {field} does not fit.", {"phase": phase, "field": field}
            )


def evidence(version: kms.CryptoKeyVersion) -> Evidence:
    """What the description of a version says about custody."""
    level = _named(version.protection_level)
    imported = bool(version.import_job)
    held_by_google = level in _HARDWARE
    told = {
        "protectionLevel": level,
        "algorithm": _named(version.algorithm),
        "generateTime": str(version.generate_time),
        "importJob": version.import_job or None,
    }
    facts = facts_of(_SOURCE, told)
    attestation = version.attestation
    statements: tuple[Statement, ...] | None = None
    if attestation.content:
        content = bytes(attestation.content)
        told = {
            "attestation.format": _named(attestation.format),
            "attestation.content": b64encode(content).decode(),
        }
        facts += facts_of(_SOURCE, told)
        chains = attestation.cert_chains
        certificates = tuple(
            text.encode()
            for name in ("cavium_certs", "google_card_certs", "google_partition_certs")
            for text in getattr(chains, name)
        )
        statements = (Statement(format="marvell", content=content, certificates=certificates),)
    return Evidence(
        location=f"gcpkms://{version.name}",
        exportable=False if held_by_google and not imported else None,
        generated_in_place=not imported if held_by_google else None,
        hardware=_HARDWARE.get(level),
        facts=tuple(facts),
        statements=statements,
        never_exportable=False if imported else (True if held_by_google else None),
    )


def _named(value: int) -> str:
    # A value that this version of the SDK does not know is a bare number.
    return str(getattr(value, "name", value))

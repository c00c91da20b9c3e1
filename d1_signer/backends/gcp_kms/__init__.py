# SPDX-License-Identifier: Apache-2.0
"""Keys in Google Cloud KMS.

``gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V``; without the
version, the newest enabled one is taken when the key is opened, and stays.

Credentials are the application default credentials. They need, on this one key:

- ``roles/cloudkms.signerVerifier``, or ``cloudkms.cryptoKeyVersions.viewPublicKey`` (once, when the
  key is opened) and ``cloudkms.cryptoKeyVersions.useToSign`` (for each signature);
- ``roles/cloudkms.viewer``, or ``cloudkms.cryptoKeyVersions.get`` for `GcpKmsBackend.custody`, and
  ``cloudkms.cryptoKeyVersions.list`` where the URI names no version;
- ``cloudkms.cryptoKeys.create`` on the key ring, and ``get`` and ``viewPublicKey`` as above, for
  `generate_key` only.

Each request carries its CRC32C and each answer's is checked, with the name of the version, as
Google's guide "Verify end-to-end data integrity" asks; the SDK checks neither.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable

from d1_signer.backends.remote import RemoteBackend, client_for, facts_of
from d1_signer.custody.evidence import Assurance, Evidence, Fact
from d1_signer.errors import (
    ConfigurationError,
    InvalidKeyError,
    KeyNotFoundError,
    KeyUriError,
    MissingExtraError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding

try:
    import google_crc32c
    from google.cloud import kms_v1 as kms

    from d1_signer.backends.gcp_kms.client import Client, Sdk, clients, read_uri
    from d1_signer.backends.gcp_kms.failures import CLOUD_KMS
except ModuleNotFoundError:
    raise MissingExtraError.of("google-cloud-kms", "gcp") from None

_SOURCE = "Cloud KMS CryptoKeyVersion"
_VERSIONS = "/cryptoKeyVersions/"
_ALGORITHM = kms.CryptoKeyVersion.CryptoKeyVersionAlgorithm.EC_SIGN_P256_SHA256
_State = kms.CryptoKeyVersion.CryptoKeyVersionState
_Level = kms.ProtectionLevel
# By name: an older SDK does not have all of them.
_HARDWARE = {"SOFTWARE": False, "HSM": True, "HSM_SINGLE_TENANT": True}


class GcpKmsBackend(RemoteBackend[Client]):
    """A key version in Cloud KMS; see `open_backend`."""

    name = "gcpkms"
    encoding = SignatureEncoding.DER
    _evidence: Evidence | None = None

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        if _VERSIONS not in self._key:
            self._key = _newest(client, self._key, until)
        public_key, self._level = _public_key(client, self._key, until)
        return self._key, public_key

    @property
    def version(self) -> str:
        """Resource name of the key version that signs."""
        return self._key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes with one call of ``AsymmetricSign``; the answer is DER."""
        client, until = self._begin(deadline)
        request = kms.AsymmetricSignRequest(
            name=self._key,
            digest=kms.Digest(sha256=digest),
            digest_crc32c=google_crc32c.value(digest),
        )
        # The plain message below the SDK's wrapper, whose every field costs a conversion.
        answer = kms.AsymmetricSignResponse.pb(
            client.call(until, "to sign", client.sdk.asymmetric_sign, request)
        )
        signature: bytes = answer.signature
        _check(
            ("verified_digest_crc32c", answer.verified_digest_crc32c is True),
            ("name", answer.name == self._key),
            ("protection_level", answer.protection_level == self._level),
            (
                "signature_crc32c",
                answer.HasField("signature_crc32c")
                and answer.signature_crc32c.value == google_crc32c.value(signature),
            ),
        )
        return signature

    def custody(self) -> Evidence:
        """Report what Cloud KMS says of the version, asked once: it does not change.

        An attestation is delivered as it is. It is signed by the HSM's manufacturer and by Google;
        this package does not verify it, so what it says is still no more than claimed here.
        """
        if self._evidence is None:
            client, until = self._begin(None)
            version = _version(client, self._key, "to describe the key", until)
            _check(("name", version.name == self._key))
            _check(("protection_level", version.protection_level == self._level))
            self._evidence = _evidence(version)
        return self._evidence


def open_backend(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    timeout: float = 10.0,
    client: Sdk | Callable[[], Sdk] | None = None,
) -> GcpKmsBackend:
    """Open a key version in Cloud KMS: ``GetPublicKey``, once.

    Args:
        uri: ``gcpkms://`` and the resource name of a key version, or of a key: then the newest
            enabled version is taken. Optionally ``?endpoint=HOST[:PORT]``, ``proxy=``.
        endpoint: A private or regional endpoint, as ``HOST[:PORT]``.
        proxy: ``http://HOST:PORT`` of a proxy through which Cloud KMS is reached.
        timeout: Seconds for one call with all its attempts, and for the opening.
        client: A KMS client that is used as it is and stays the caller's, or a function that makes
            one, called once in each process. Only the function also works after a fork.

    Raises:
        KeyUriError: The URI is not of this form.
        KeyNotFoundError: No such version, or the key has no enabled version for ES256.
        AccessDeniedError: A permission is missing.
        LoginError: No credentials, or they are refused.
        InvalidKeyError: Not a key for EC_SIGN_P256_SHA256.
        KeyDisabledError: The version is disabled or destroyed.
        IntegrityError: An answer was altered on its way; retryable.
        SignerUnavailable: Cloud KMS cannot be reached, or throttles; retryable.
    """
    place = read_uri(uri, endpoint, proxy)
    return GcpKmsBackend(place.name, clients(place, client), timeout)


def generate_key(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    protection_level: str = "HSM",
    timeout: float = 60.0,
    client: Sdk | None = None,
) -> GeneratedKey:
    """Make a key for EC_SIGN_P256_SHA256 in an existing key ring.

    ``uri`` is that of `open_backend` without a version, and so are the other options;
    ``protection_level`` is ``"HSM"``, ``"SOFTWARE"`` or another name that Cloud KMS knows, and
    ``timeout`` the seconds until the first version must be ready.

    Raises:
        KeyExistsError: The key exists.
        KeyUriError: The URI names a version, or is not of this form.
        ConfigurationError: An unknown protection level.
        SignerError: As for `open_backend`.
    """
    place = read_uri(uri, endpoint, proxy)
    if place.version is not None:
        raise KeyUriError(
            "A new key is named without a version.", hint="Cloud KMS counts versions itself."
        )
    if protection_level not in _Level.__members__:
        raise ConfigurationError(
            "The protection level is unknown.", hint=f"Known: {', '.join(_Level.__members__)}."
        )
    template = kms.CryptoKeyVersionTemplate(
        algorithm=_ALGORITHM, protection_level=getattr(_Level, protection_level)
    )
    request = kms.CreateCryptoKeyRequest(
        parent=place.ring,
        crypto_key_id=place.key,
        crypto_key=kms.CryptoKey(
            purpose=kms.CryptoKey.CryptoKeyPurpose.ASYMMETRIC_SIGN, version_template=template
        ),
    )
    with client_for(clients(place, client), timeout) as (one, until):
        made = one.call(until, "to make a key", one.sdk.create_crypto_key, request)
        name = f"{made.name}{_VERSIONS}1"
        _wait_until_enabled(one, name, until)
        public_key, _ = _public_key(one, name, until)
    settings = {"endpoint": place.endpoint, "proxy": place.proxy}
    query = "&".join(f"{name}={value}" for name, value in settings.items() if value)
    return GeneratedKey(uri=f"gcpkms://{name}{'?' if query else ''}{query}", public_key=public_key)


def _wait_until_enabled(client: Client, name: str, until: float) -> None:
    while True:
        version = _version(client, name, "for the state of the new key", until)
        if version.state == _State.ENABLED:
            return
        if version.state != _State.PENDING_GENERATION or time.monotonic() + 1 > until:
            raise SignerUnavailable(
                f"The new key {name} is in the state {_named(version.state)}.",
                hint="Look at it in Cloud KMS; it is opened by its name once it is enabled.",
            )
        time.sleep(0.5)


def _version(client: Client, name: str, doing: str, until: float) -> kms.CryptoKeyVersion:
    request = kms.GetCryptoKeyVersionRequest(name=name)
    return client.call(until, doing, client.sdk.get_crypto_key_version, request)


def _newest(client: Client, key: str, until: float) -> str:
    request = kms.ListCryptoKeyVersionsRequest(parent=key, filter="state=ENABLED")
    found = client.call(
        until,
        "to list the key's versions",
        lambda **options: list(client.sdk.list_crypto_key_versions(**options)),
        request,
    )
    usable = [v.name for v in found if (v.state, v.algorithm) == (_State.ENABLED, _ALGORITHM)]
    if not usable:
        raise KeyNotFoundError(
            f"{key} has no enabled version for {_named(_ALGORITHM)}.",
            hint="Enable or make a version, or name another key.",
        )
    newest = max(int(name.rpartition("/")[2]) for name in usable)
    return f"{key}{_VERSIONS}{newest}"


def _public_key(client: Client, version: str, until: float) -> tuple[PublicKey, int]:
    request = kms.GetPublicKeyRequest(name=version)
    answer = client.call(until, "to give the public key", client.sdk.get_public_key, request)
    pem = answer.pem.encode()
    _check(
        ("name", answer.name == version),
        ("pem_crc32c", answer.pem_crc32c == google_crc32c.value(pem)),
    )
    if answer.algorithm != _ALGORITHM:
        raise InvalidKeyError(
            f"The key {version} is for {_named(answer.algorithm)}.",
            hint=f"D1 takes ES256 only: use a key for {_named(_ALGORITHM)}.",
        )
    return PublicKey.from_pem(pem), answer.protection_level


def _check(*fields: tuple[str, bool]) -> None:
    for field, fits in fields:
        if not fits:
            raise CLOUD_KMS.altered(f"gave an answer whose {field} does not fit.", {"field": field})


def _evidence(version: kms.CryptoKeyVersion) -> Evidence:
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
    if attestation.content:
        facts += facts_of(_SOURCE, {"attestation.format": _named(attestation.format)})
        facts.append(
            Fact(
                name="attestation.content",
                value=b64encode(attestation.content).decode(),
                source="statement signed by the HSM, delivered by Cloud KMS, not verified here",
                assurance=Assurance.ATTESTED,
            )
        )
        for name in ("cavium_certs", "google_card_certs", "google_partition_certs"):
            chain = "".join(getattr(attestation.cert_chains, name))
            facts += facts_of(_SOURCE, {f"attestation.certChains.{name}": chain or None})
    return Evidence(
        location=f"gcpkms://{version.name}",
        exportable=False if held_by_google and not imported else None,
        generated_in_place=not imported if held_by_google else None,
        hardware=_HARDWARE.get(level),
        facts=tuple(facts),
    )


def _named(value: int) -> str:
    # A value that this version of the SDK does not know is a bare number.
    return str(getattr(value, "name", value))

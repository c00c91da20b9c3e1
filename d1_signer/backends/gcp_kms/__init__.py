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

import logging
import time
from base64 import b64encode
from collections.abc import Callable

from d1_signer.custody.evidence import Assurance, Evidence, Fact, FactValue
from d1_signer.errors import (
    ConfigurationError,
    IntegrityError,
    InvalidKeyError,
    KeyNotFoundError,
    KeyUriError,
    MissingExtraError,
    SignerClosedError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding

try:
    import google_crc32c
    from google.cloud import kms_v1 as kms

    from d1_signer.backends.gcp_kms.client import Caller, Client, clients, read_uri
    from d1_signer.backends.gcp_kms.failures import ALTERED
except ModuleNotFoundError:
    raise MissingExtraError.of("google-cloud-kms", "gcp") from None

_log = logging.getLogger(__name__)

_ALGORITHM = kms.CryptoKeyVersion.CryptoKeyVersionAlgorithm.EC_SIGN_P256_SHA256
_State = kms.CryptoKeyVersion.CryptoKeyVersionState
_Level = kms.ProtectionLevel
# By name: an older SDK does not have all of them.
_HARDWARE = {"SOFTWARE": False, "HSM": True, "HSM_SINGLE_TENANT": True}


class GcpKmsBackend:
    """A key version in Cloud KMS; see `open_backend`."""

    name = "gcpkms"
    encoding = SignatureEncoding.DER

    def __init__(self, version: str, caller: Caller, *, owned: bool) -> None:
        """Read the public key, and pin it.

        Args:
            version: Resource name of the key version.
            caller: How to call Cloud KMS.
            owned: Whether `close` closes the client.
        """
        self._version = version
        self._caller = caller
        self._owned = owned
        self._closed = False
        self._evidence: Evidence | None = None
        self._public_key, self._level = _public_key(caller, version)
        _log.info("gcpkms.opened key=%s thumbprint=%s", version, self._public_key.thumbprint())

    @property
    def version(self) -> str:
        """Resource name of the key version that signs."""
        return self._version

    def public_key(self) -> PublicKey:
        """The public key as it was when the backend was opened."""
        return self._public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes with one call of ``AsymmetricSign``; the answer is DER."""
        if self._closed:
            raise SignerClosedError("The key is closed.")
        request = kms.AsymmetricSignRequest(
            name=self._version,
            digest=kms.Digest(sha256=digest),
            digest_crc32c=google_crc32c.value(digest),
        )
        # The plain message below the SDK's wrapper, whose every field costs a conversion.
        answer = kms.AsymmetricSignResponse.pb(
            self._caller.call("to sign", _asymmetric_sign, request, deadline)
        )
        signature: bytes = answer.signature
        _check(
            ("verified_digest_crc32c", answer.verified_digest_crc32c is True),
            ("name", answer.name == self._version),
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
            request = kms.GetCryptoKeyVersionRequest(name=self._version)
            version = self._caller.call("to describe the key", _get_version, request)
            _check(("name", version.name == self._version))
            _check(("protection_level", version.protection_level == self._level))
            self._evidence = _evidence(version)
        return self._evidence

    def close(self) -> None:
        """Close the client's channel, unless the client was given."""
        self._closed = True
        client = self._caller.clients.made_here()
        if self._owned and client is not None:
            client.transport.close()  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"<GcpKmsBackend {self._version}>"


def open_backend(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    timeout: float = 10.0,
    client: Client | Callable[[], Client] | None = None,
) -> GcpKmsBackend:
    """Open a key version in Cloud KMS: ``GetPublicKey``, once.

    Args:
        uri: ``gcpkms://`` and the resource name of a key version, or of a key: then the newest
            enabled version is taken. Optionally ``?endpoint=HOST[:PORT]``, ``proxy=``.
        endpoint: A private or regional endpoint, as ``HOST[:PORT]``.
        proxy: ``http://HOST:PORT`` of a proxy through which Cloud KMS is reached.
        timeout: Seconds for one call with all its attempts.
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
    caller = Caller(clients(place, client), timeout)
    name = f"{place.ring}/cryptoKeys/{place.key}"
    number = _newest(caller, name) if place.version is None else place.version
    return GcpKmsBackend(f"{name}/cryptoKeyVersions/{number}", caller, owned=client is None)


def generate_key(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    protection_level: str = "HSM",
    timeout: float = 60.0,
    client: Client | None = None,
) -> GeneratedKey:
    """Make a key for EC_SIGN_P256_SHA256 in an existing key ring.

    Args:
        uri: As for `open_backend`, without a version.
        endpoint: As for `open_backend`.
        proxy: As for `open_backend`.
        protection_level: ``"HSM"`` or ``"SOFTWARE"``, or another name that Cloud KMS knows.
        timeout: Seconds until the first version must be ready.
        client: As for `open_backend`.

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
    deadline = time.monotonic() + timeout
    caller = Caller(clients(place, client), timeout)
    made = caller.call("to make a key", lambda client: client.create_crypto_key, request, deadline)
    name = f"{made.name}/cryptoKeyVersions/1"
    _wait_until_enabled(caller, name, deadline)
    public_key, _ = _public_key(caller, name)
    settings = {"endpoint": place.endpoint, "proxy": place.proxy}
    query = "&".join(f"{name}={value}" for name, value in settings.items() if value)
    return GeneratedKey(uri=f"gcpkms://{name}{'?' if query else ''}{query}", public_key=public_key)


def _wait_until_enabled(caller: Caller, name: str, deadline: float) -> None:
    request = kms.GetCryptoKeyVersionRequest(name=name)
    while True:
        version = caller.call("for the state of the new key", _get_version, request, deadline)
        if version.state == _State.ENABLED:
            return
        if version.state != _State.PENDING_GENERATION or time.monotonic() + 1 > deadline:
            raise SignerUnavailable(
                f"The new key {name} is in the state {_named(version.state)}.",
                hint="Look at it in Cloud KMS; it is opened by its name once it is enabled.",
            )
        time.sleep(0.5)


def _asymmetric_sign(client: Client) -> Callable[..., kms.AsymmetricSignResponse]:
    return client.asymmetric_sign


def _get_version(client: Client) -> Callable[..., kms.CryptoKeyVersion]:
    return client.get_crypto_key_version


def _newest(caller: Caller, key: str) -> int:
    request = kms.ListCryptoKeyVersionsRequest(parent=key, filter="state=ENABLED")
    found = caller.call(
        "to list the key's versions",
        lambda client: lambda **options: list(client.list_crypto_key_versions(**options)),
        request,
    )
    usable = [v.name for v in found if (v.state, v.algorithm) == (_State.ENABLED, _ALGORITHM)]
    if not usable:
        raise KeyNotFoundError(
            f"{key} has no enabled version for {_named(_ALGORITHM)}.",
            hint="Enable or make a version, or name another key.",
        )
    return max(int(name.rpartition("/")[2]) for name in usable)


def _public_key(caller: Caller, version: str) -> tuple[PublicKey, int]:
    request = kms.GetPublicKeyRequest(name=version)
    answer = caller.call("to give the public key", lambda client: client.get_public_key, request)
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
            raise IntegrityError(
                f"Cloud KMS gave an answer whose {field} does not fit.",
                hint=ALTERED,
                details={"field": field},
            )


def _evidence(version: kms.CryptoKeyVersion) -> Evidence:
    level = _named(version.protection_level)
    imported = bool(version.import_job)
    held_by_google = level in _HARDWARE
    facts = [
        _fact("protectionLevel", level),
        _fact("algorithm", _named(version.algorithm)),
        _fact("generateTime", str(version.generate_time)),
        _fact("importJob", version.import_job or None),
    ]
    attestation = version.attestation
    if attestation.content:
        facts.append(_fact("attestation.format", _named(attestation.format)))
        facts.append(
            Fact(
                name="attestation.content",
                value=b64encode(attestation.content).decode(),
                source="statement signed by the HSM, delivered by Cloud KMS, not verified here",
                assurance=Assurance.ATTESTED,
            )
        )
        chains = attestation.cert_chains
        for name in ("cavium_certs", "google_card_certs", "google_partition_certs"):
            chain = "".join(getattr(chains, name))
            facts.append(_fact(f"attestation.certChains.{name}", chain or None))
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


def _fact(name: str, value: FactValue) -> Fact:
    return Fact(name=name, value=value, source="Cloud KMS CryptoKeyVersion")

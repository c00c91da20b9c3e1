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

from collections.abc import Callable

from d1_signer.backends.remote import RemoteBackend, client_for
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import KeyUriError, MissingExtraError
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding

try:
    import google_crc32c
    from google.cloud import kms_v1 as kms

    from d1_signer.backends.gcp_kms.channel import Sdk
    from d1_signer.backends.gcp_kms.client import Client, clients
    from d1_signer.backends.gcp_kms.keys import (
        VERSIONS,
        check,
        describe,
        evidence,
        make,
        newest,
        public_key,
    )
    from d1_signer.backends.gcp_kms.place import read_uri
except ModuleNotFoundError:
    raise MissingExtraError.of("google-cloud-kms", "gcp") from None


class GcpKmsBackend(RemoteBackend[Client]):
    """A key version in Cloud KMS; see `open_backend`."""

    name = "gcpkms"
    encoding = SignatureEncoding.DER
    _evidence: Evidence | None = None

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        if VERSIONS not in self._key:
            self._key = newest(client, self._key, until)
        opened, self._level = public_key(client, self._key, until)
        return self._key, opened

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
            client.call(until, "to sign", "signature", lambda sdk: sdk.asymmetric_sign, request)
        )
        signature: bytes = answer.signature
        check(
            "signature",
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

        An attestation is passed on for the `Signer` to verify.
        """
        if self._evidence is None:
            client, until = self._begin(None)
            version = describe(client, self._key, "to describe the key", until)
            check(
                "look-up",
                ("name", version.name == self._key),
                ("protection_level", version.protection_level == self._level),
            )
            self._evidence = evidence(version)
        return self._evidence


def open_backend(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
    ca_file: str | None = None,
    universe_domain: str | None = None,
    timeout: float = 10.0,
    client: Sdk | Callable[[], Sdk] | None = None,
) -> GcpKmsBackend:
    """Open a key version in Cloud KMS: ``GetPublicKey``, once.

    Args:
        uri: ``gcpkms://`` and the resource name of a key version, or of a key: then the newest
            enabled version is taken. Optionally ``?endpoint=HOST[:PORT]``, ``proxy=``,
            ``proxy-credentials-source=``, ``ca-file=``, ``universe-domain=``.
        endpoint: A private or regional endpoint, as ``HOST[:PORT]``.
        proxy: ``http://HOST:PORT`` of a proxy through which Cloud KMS is reached.
        proxy_credentials_source: Source of its ``USER:PASSWORD``, for Basic authentication.
        ca_file: PEM file of the authorities to trust for Cloud KMS; None: certifi's.
        universe_domain: The domain of another cloud than Google's own (Trusted Partner Cloud).
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
    place = read_uri(
        uri,
        endpoint,
        proxy,
        ca_file,
        universe_domain,
        proxy_credentials_source=proxy_credentials_source,
    )
    return GcpKmsBackend(place.name, clients(place, client), timeout)


def generate_key(
    uri: str,
    *,
    endpoint: str | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
    ca_file: str | None = None,
    universe_domain: str | None = None,
    protection_level: str = "HSM",
    timeout: float = 60.0,
    client: Sdk | None = None,
) -> GeneratedKey:
    """Make a key for EC_SIGN_P256_SHA256 in an existing key ring.

    ``uri`` is that of `open_backend` without a version, and so are the other options;
    ``protection_level`` is ``"HSM"``, ``"SOFTWARE"`` or another name that Cloud KMS knows, and
    ``timeout`` the seconds until the first version must be ready. Where it fails after the key was
    made, or may have been, ``details["made"]`` of the error names it.

    Raises:
        KeyExistsError: The key exists.
        KeyUriError: The URI names a version, or is not of this form.
        ConfigurationError: An unknown protection level.
        SignerError: As for `open_backend`.
    """
    place = read_uri(
        uri,
        endpoint,
        proxy,
        ca_file,
        universe_domain,
        proxy_credentials_source=proxy_credentials_source,
    )
    if place.version is not None:
        raise KeyUriError(
            "A new key is named without a version.", hint="Cloud KMS counts versions itself."
        )
    with client_for(clients(place, client), timeout) as (opened, until):
        return make(opened, place, protection_level, until)

# SPDX-License-Identifier: Apache-2.0
"""Keys in AWS KMS: ``awskms:///alias/NAME``, ``awskms:///KEY-ID``, ``awskms:///ARN``.

Credentials come from where boto3 takes them: the environment, a profile, the instance's or the
container's role. The role needs, on this one key:

- ``kms:DescribeKey`` and ``kms:GetPublicKey``, once when the key is opened;
- ``kms:Sign``, for each signature; it can be narrowed with the conditions
  ``kms:SigningAlgorithm = ECDSA_SHA_256`` and ``kms:MessageType = DIGEST``;
- ``kms:CreateKey`` and ``kms:CreateAlias``, for `generate_key` only.

A key that is named by an alias is asked for by that alias each time. Where the alias is pointed at
another key, signing stops with `KeyMismatchError`: D1 knows only the key that was registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d1_signer.backends.remote import RemoteBackend, client_for, facts_of
from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.errors import D1SignerError, KeyMismatchError, KeyUriError, MissingExtraError
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding

try:
    from d1_signer.backends.aws_kms.client import Client, clients
    from d1_signer.backends.aws_kms.failures import AWS_KMS, details
    from d1_signer.backends.aws_kms.keys import ALGORITHM, describe, make, public_key, shown_arn
    from d1_signer.backends.aws_kms.settings import read_settings
except ModuleNotFoundError:
    raise MissingExtraError.of("boto3", "aws") from None

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

_TIME_TO_GENERATE = 60.0  # seconds
# What cannot change in a key's life.
_FACTS = (
    *("Arn", "Origin", "KeySpec", "KeyUsage", "KeyManager", "MultiRegion"),
    *("CustomKeyStoreId", "CloudHsmClusterId", "CreationDate"),
)
# What is imported has a copy elsewhere; of an external key store AWS does not know.
_NEVER_EXPORTABLE = {"AWS_KMS": True, "AWS_CLOUDHSM": True, "EXTERNAL": False}


class AwsKmsBackend(RemoteBackend[Client]):
    """A key in AWS KMS; see `open_backend`."""

    name = "awskms"
    encoding = SignatureEncoding.DER

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        until += client.open(until)
        self._metadata = describe(client, self._key, until)
        self._arn: str = self._metadata["Arn"]
        return self._arn, public_key(client, self._key, self._arn, until)

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes with one call of ``Sign``; the answer is DER."""
        client, until = self._begin(deadline)
        answer = client.call(
            until,
            "to sign",
            "signature",
            client.kms.sign,
            KeyId=self._key,
            Message=digest,
            MessageType="DIGEST",
            SigningAlgorithm=ALGORITHM,
        )
        arn, signature = answer.get("KeyId"), answer.get("Signature")
        if arn != self._arn and isinstance(arn, str):
            raise self._other_key(shown_arn(arn), answer)
        if (
            not isinstance(arn, str)
            or answer.get("SigningAlgorithm") != ALGORITHM
            or not isinstance(signature, bytes)
        ):
            raise AWS_KMS.altered(
                "answered without the signature that was asked for.",
                {"phase": "signature", **details(answer)},
            )
        return signature

    def _other_key(self, arn: str, answer: Mapping[str, Any]) -> D1SignerError:
        if "alias/" in self._key:
            text = f"{self._key} now points to {arn}; it pointed to {self._arn} at opening."
            hint = "Point it back; or register the new key with D1 and open the signer anew."
        else:
            text = f"AWS KMS signed with {arn} and not with {self._arn}."
            hint = AWS_KMS.altered_hint
        return KeyMismatchError(
            f"{text} The signature was not used.",
            hint=hint,
            details={"phase": "signature", **details(answer)},
        )

    def custody(self) -> Evidence:
        """Report what ``DescribeKey`` said at opening: what cannot change in a key's life."""
        metadata = self._metadata
        told = {name: metadata.get(name) for name in _FACTS}
        facts = facts_of("AWS KMS DescribeKey", told)
        _, _, _, region, account, _ = self._arn.split(":", 5)
        facts += facts_of("AWS KMS key ARN", {"account": account, "region": region})
        # Imported key material has a copy elsewhere, and for what is in an external key store AWS
        # does not speak.
        origin = metadata.get("Origin")
        inside = origin in {"AWS_KMS", "AWS_CLOUDHSM"}
        if inside:
            facts.append(
                Fact(
                    name="key material",
                    value="made in validated HSMs, never outside them unencrypted",
                    source="AWS KMS documentation",
                )
            )
        return Evidence(
            location=f"awskms:///{self._arn}",
            exportable=False if inside else None,
            generated_in_place=inside,
            hardware=True if inside else None,
            facts=tuple(facts),
            never_exportable=_NEVER_EXPORTABLE.get(str(origin)),
        )


def open_backend(
    uri: str,
    *,
    region: str | None = None,
    profile: str | None = None,
    endpoint: str | None = None,
    fips: bool | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
    ca_file: str | None = None,
    timeout: float = 10.0,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
    max_attempts: int = 3,
    client: KMSClient | Callable[[], KMSClient] | None = None,
) -> AwsKmsBackend:
    """Open a key in AWS KMS: ``DescribeKey`` and ``GetPublicKey``, once.

    Args:
        uri: ``awskms:///`` and a key id, a key ARN, ``alias/NAME`` or an alias ARN; optionally
            ``?region=``, ``endpoint=``, ``profile=``, ``fips=true``, ``proxy=``,
            ``proxy-credentials-source=``, ``ca-file=``.
        region: AWS region; None: the ARN's, else boto3's own search.
        profile: Profile in the AWS configuration files.
        endpoint: URL of a private endpoint; https, or http on loopback.
        fips: Use the region's FIPS endpoint, or do not; None: as the AWS configuration says.
        proxy: ``http://HOST:PORT`` of a proxy through which AWS KMS is reached.
        proxy_credentials_source: Source of its ``USER:PASSWORD``, for Basic authentication.
        ca_file: PEM file of the authorities to trust for AWS KMS; None: certifi's.
        timeout: Seconds for one call with all its attempts, and for the opening. Where the profile
            demands an MFA code, the time in which it is typed does not count.
        connect_timeout: Seconds for each attempt to connect.
        read_timeout: Seconds for each wait for bytes.
        max_attempts: Attempts of one call in all, where AWS KMS is busy or away.
        client: A KMS client that is used as it is and stays the caller's, or a function that makes
            one, called once in each process. Only the function also works after a fork. Of the
            settings above only ``timeout`` holds for it.

    Raises:
        KeyUriError: The URI names no key.
        ConfigurationError: No region, an unknown profile, or settings that contradict each other.
        KeyNotFoundError: No such key or alias in this account and region.
        AccessDeniedError: The role lacks a permission.
        LoginError: No credentials, or they are refused.
        InvalidKeyError: Not an ECC_NIST_P256 key for SIGN_VERIFY.
        KeyDisabledError: Disabled, pending deletion or import.
        SignerUnavailable: KMS cannot be reached, or throttles; retryable.
    """
    settings = replace(
        read_settings(
            uri,
            region=region,
            profile=profile,
            endpoint=endpoint,
            fips=fips,
            proxy=proxy,
            proxy_credentials_source=proxy_credentials_source,
            ca_file=ca_file,
        ),
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        max_attempts=max_attempts,
    )
    return AwsKmsBackend(settings.key_id, clients(settings, client), timeout)


def generate_key(
    uri: str,
    *,
    region: str | None = None,
    profile: str | None = None,
    endpoint: str | None = None,
    fips: bool | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
    ca_file: str | None = None,
    description: str = "ES256 signing key for Thales D1",
    client: KMSClient | None = None,
) -> GeneratedKey:
    """Make an ECC_NIST_P256 key for SIGN_VERIFY and give it an alias.

    ``uri`` is ``awskms:///alias/NAME``, since key ids are AWS KMS's to choose; ``description`` is
    shown in the AWS console; the other options are those of `open_backend`.

    What AWS KMS does not know yet of the new key is asked for again, for a minute. Where it fails
    after that, ``details["made"]`` of the error is the ARN of the key that was made.

    Raises:
        KeyExistsError: The alias exists.
        KeyUriError: The URI names no alias.
        SignerError: As for `open_backend`.
    """
    settings = read_settings(
        uri,
        region=region,
        profile=profile,
        endpoint=endpoint,
        fips=fips,
        proxy=proxy,
        proxy_credentials_source=proxy_credentials_source,
        ca_file=ca_file,
    )
    if not settings.key_id.startswith("alias/"):
        raise KeyUriError(
            "A new AWS KMS key is named by an alias.", hint="Write awskms:///alias/NAME."
        )
    # One attempt: where the answer to CreateKey is lost, another would make a second key.
    own = replace(settings, max_attempts=1)
    with client_for(clients(own, client), _TIME_TO_GENERATE) as (opened, until):
        made = make(opened, settings.key_id, description, until + opened.open(until))
    return GeneratedKey(uri=uri, public_key=made)

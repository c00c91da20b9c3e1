# SPDX-License-Identifier: Apache-2.0
"""Which key of AWS KMS, and how it is reached."""

from __future__ import annotations

import re
from dataclasses import dataclass

from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.secret import SecretSource
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.proxies import Proxy, optional_proxy

# An option's name may be written as other schemes write theirs.
_QUERY = frozenset(
    {
        *("region", "endpoint", "profile", "fips", "ca-file", "ca_file"),
        *("proxy", "proxy-credentials-source", "proxy_credentials_source"),
    }
)
_KEY_ID = re.compile(r"[A-Za-z0-9/_:-]{1,2048}")
_ARN = re.compile(r"arn:[a-z0-9-]+:kms:([a-z0-9-]+):\d{12}:(?:key|alias)/.+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Which key, and how to reach AWS KMS: the options of `open_backend`, put together."""

    key_id: str
    region: str | None
    profile: str | None
    endpoint: str | None
    fips: bool | None
    proxy: Proxy | None
    ca_file: str | None
    connect_timeout: float = 2.0
    read_timeout: float = 5.0
    max_attempts: int = 3

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        arn = _ARN.fullmatch(self.key_id)
        if self.key_id.startswith("arn:") and not arn:
            raise KeyUriError(f"{self.key_id} is not the ARN of a KMS key or alias.")
        if arn and self.region != arn.group(1):
            raise ConfigurationError(
                f"The region is {self.region}, and the key's ARN says {arn.group(1)}."
            )
        if self.endpoint:
            check_endpoint(self.endpoint, "AWS KMS endpoint")
            if self.fips:
                raise ConfigurationError(
                    "Both an endpoint and the FIPS endpoint are asked for.",
                    hint="Name the FIPS endpoint's URL as the endpoint, or leave it out.",
                )
        if self.max_attempts < 1:
            raise ConfigurationError("max_attempts is less than 1.")


def read_settings(
    uri: str,
    *,
    region: str | None,
    profile: str | None,
    endpoint: str | None,
    fips: bool | None,
    proxy: str | None,
    proxy_credentials_source: SecretSource | None,
    ca_file: str | None,
) -> Settings:
    """Read a key URI; an argument that is not None wins over the URI's query.

    Raises:
        KeyUriError: The URI names no key.
        ConfigurationError: Settings that contradict each other.
    """
    parsed = KeyUri.parse(uri, query_names=_QUERY)
    key_id = parsed.path.removeprefix("/")
    if parsed.authority or not _KEY_ID.fullmatch(key_id):
        raise KeyUriError(
            "The awskms: URI names no key.",
            hint="Write awskms:///alias/NAME, awskms:///KEY-ID or awskms:///ARN.",
        )
    if fips is None and "fips" in parsed.query:
        if parsed.query["fips"] not in {"true", "false"}:
            raise KeyUriError("fips in the awskms: URI is neither true nor false.")
        fips = parsed.query["fips"] == "true"
    arn = _ARN.fullmatch(key_id)
    return Settings(
        key_id=key_id,
        region=region or parsed.query.get("region") or (arn.group(1) if arn else None),
        profile=profile or parsed.query.get("profile"),
        endpoint=endpoint or parsed.query.get("endpoint"),
        fips=fips,
        proxy=optional_proxy(
            proxy or parsed.query.get("proxy"),
            proxy_credentials_source
            or parsed.query.get("proxy-credentials-source")
            or parsed.query.get("proxy_credentials_source"),
        ),
        ca_file=ca_file or parsed.query.get("ca-file") or parsed.query.get("ca_file"),
    )

# SPDX-License-Identifier: Apache-2.0
"""Settings of an AWS KMS client, and the client itself."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from d1_signer.backends.aws_kms.failures import ask
from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.key_uri import KeyUri
from d1_signer.remote import PerProcess, check_endpoint, no_time_left, only_in_this_process

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

_QUERY = frozenset({"region", "endpoint", "profile", "fips"})
_KEY_ID = re.compile(r"[A-Za-z0-9/_:-]{1,2048}")
_ARN = re.compile(r"arn:[a-z0-9-]+:kms:([a-z0-9-]+):\d{12}:(?:key|alias)/.+")

# More threads than connections would work too, but warn for each connection thrown away.
_CONNECTIONS = 128

_call = threading.local()


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Which key, and how to reach AWS KMS.

    Attributes:
        key_id: Key id, ARN, alias name or alias ARN, as the API takes it.
        region: AWS region; None: boto3's own search.
        profile: Profile in the AWS configuration files, or None.
        endpoint: URL of a private endpoint, or None.
        fips: Use the FIPS endpoint.
        connect_timeout: Seconds for each attempt to connect.
        read_timeout: Seconds for each wait for an answer.
        max_attempts: Attempts of one call in all.
    """

    key_id: str
    region: str | None
    profile: str | None
    endpoint: str | None
    fips: bool
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


def read_settings(
    uri: str, *, region: str | None, profile: str | None, endpoint: str | None, fips: bool | None
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
    if fips is None:
        if parsed.query.get("fips") not in {None, "true", "false"}:
            raise KeyUriError("fips in the awskms: URI is neither true nor false.")
        fips = parsed.query.get("fips") == "true"
    arn = _ARN.fullmatch(key_id)
    return Settings(
        key_id=key_id,
        region=region or parsed.query.get("region") or (arn.group(1) if arn else None),
        profile=profile or parsed.query.get("profile"),
        endpoint=endpoint or parsed.query.get("endpoint"),
        fips=fips,
    )


def clients(
    settings: Settings, client: KMSClient | Callable[[], KMSClient] | None
) -> PerProcess[KMSClient]:
    """The client of each process: the caller's, the caller's function's, or one of our own."""
    if client is None:
        return PerProcess(lambda: ask("to be set up", _client, settings))
    if callable(client):
        return PerProcess(client)
    return PerProcess(only_in_this_process(client, "KMS client"))


# Making boto3 clients in two threads at once is not safe, whatever the session.
_making = threading.Lock()


def _new_lock() -> None:
    global _making  # noqa: PLW0603 (the parent's lock may have been held at the moment of the fork)
    _making = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def _client(settings: Settings) -> KMSClient:
    config = Config(
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        use_fips_endpoint=settings.fips or None,
    )
    # A session of its own: boto3's default session is shared, and sessions are not thread-safe.
    with _making:
        session = boto3.Session(profile_name=settings.profile, region_name=settings.region)
    with _making:
        client: KMSClient = session.client("kms", endpoint_url=settings.endpoint, config=config)
    client.meta.events.register("before-send.kms", _refuse_late_attempt)
    return client


def set_deadline(deadline: float) -> None:
    """Let this thread begin no attempt after ``deadline``, a moment on ``time.monotonic()``."""
    _call.deadline = deadline


def _refuse_late_attempt(**_: object) -> None:
    deadline = getattr(_call, "deadline", None)
    if deadline is not None and time.monotonic() >= deadline:
        raise no_time_left()

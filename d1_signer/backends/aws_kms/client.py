# SPDX-License-Identifier: Apache-2.0
"""Settings of an AWS KMS client, the client itself, and how it is called."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import boto3
import certifi
from botocore import exceptions as sdk
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from urllib3 import exceptions as http

from d1_signer.backends.aws_kms.failures import AWS_KMS
from d1_signer.backends.remote import clients_of
from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.signing import forks
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.deadlines import within
from d1_signer.transport.exchange import Http
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.processes import PerProcess
from d1_signer.transport.proxies import check_proxy
from d1_signer.transport.tls import verifying_context

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_kms import KMSClient

P = ParamSpec("P")
R = TypeVar("R")

_QUERY = frozenset({"region", "endpoint", "profile", "fips", "proxy"})
_KEY_ID = re.compile(r"[A-Za-z0-9/_:-]{1,2048}")
_ARN = re.compile(r"arn:[a-z0-9-]+:kms:([a-z0-9-]+):\d{12}:(?:key|alias)/.+")

# Until when the call of this thread may take; botocore passes nothing of ours on to its hooks.
_call = threading.local()


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Which key, and how to reach AWS KMS: the options of `open_backend`, put together."""

    key_id: str
    region: str | None
    profile: str | None
    endpoint: str | None
    fips: bool | None
    proxy: str | None
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
        if self.proxy:
            check_proxy(self.proxy, credentials=False)


def read_settings(
    uri: str,
    *,
    region: str | None,
    profile: str | None,
    endpoint: str | None,
    fips: bool | None,
    proxy: str | None,
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
        proxy=proxy or parsed.query.get("proxy"),
    )


@dataclass(frozen=True, slots=True)
class Client:
    """A client of boto3; with what sends its requests, where it is one of ours."""

    kms: KMSClient
    http: Http | None = None
    credentials: Credentials | None = None

    def is_bounded(self) -> bool:
        """Whether a call is over by its limit by itself, the SDK's pauses apart."""
        refresh_needed = getattr(self.credentials, "refresh_needed", None)
        return self.http is not None and not (refresh_needed and refresh_needed())

    def close(self) -> None:
        """Close the connections; those of a client that was given stay open."""
        if self.http is not None:
            self.kms.close()
            self.http.close()


def clients(
    settings: Settings, client: KMSClient | Callable[[], KMSClient] | None
) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own."""
    return clients_of(
        client, "KMS client", Client, lambda: AWS_KMS.ask("to be set up", _client, settings)
    )


def call(
    until: float, doing: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a function of the SDK, which sends nothing after a moment; see `Service.ask`."""
    _call.until = until
    return AWS_KMS.ask(doing, function, *args, **kwargs)


def call_within(
    until: float, doing: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a function of the SDK and be back by a moment.

    botocore looks for credentials, and waits between its attempts, under no limit of ours: so it
    does that in a thread of its own.
    """
    return within(until, lambda: call(until, doing, function, *args, **kwargs))


# Making boto3 clients in two threads at once is not safe, whatever the session.
_making = threading.Lock()


def _new_lock() -> None:
    global _making  # noqa: PLW0603 (the parent's lock may have been held at the moment of the fork)
    _making = threading.Lock()


forks.in_child(_new_lock)


def _client(settings: Settings) -> Client:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
        use_fips_endpoint=settings.fips,
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # not in its stubs
    )
    # A session of its own: boto3's default session is shared, and sessions are not thread-safe.
    with _making:
        session = boto3.Session(profile_name=settings.profile, region_name=settings.region)
    # Kept by the session. This may ask a server that hangs, which must hold up nobody else.
    credentials = session.get_credentials()
    with _making:
        client: KMSClient = session.client("kms", endpoint_url=settings.endpoint, config=config)
    sender = _Sender(settings)
    client.meta.events.register("before-send.kms", sender.send)  # type: ignore[arg-type]
    return Client(client, sender.http, credentials)


# In this order: a class before the classes it derives from.
_FAILURES: tuple[tuple[type[http.HTTPError], type[sdk.BotoCoreError]], ...] = (
    (http.SSLError, sdk.SSLError),
    (http.NewConnectionError, sdk.EndpointConnectionError),
    (http.ProxyError, sdk.ProxyConnectionError),
    (http.ConnectTimeoutError, sdk.ConnectTimeoutError),
    (http.ReadTimeoutError, sdk.ReadTimeoutError),
    (http.ProtocolError, sdk.ConnectionClosedError),
    (http.HTTPError, sdk.HTTPClientError),
)


class _Sender:
    """Sends what boto3 has signed.

    botocore's own sender has no limit for a whole answer and none for its size; and it uses the
    proxies, the authorities and the file for session keys that the environment names.
    """

    def __init__(self, settings: Settings) -> None:
        self._proxy = settings.proxy
        self.http = Http(
            "AWS KMS",
            verifying_context(certifi.where()),
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            proxy=settings.proxy,
        )

    def send(self, request: Any, **_: object) -> AWSResponse:
        """Answer the event ``before-send``; what it raises is what botocore knows to repeat."""
        url = str(request.url)
        check_endpoint(url, "AWS KMS endpoint")
        try:
            told = self.http.exchange(
                request.method, url, headers=request.headers, body=request.body, until=_call.until
            )
        except http.HTTPError as error:
            failure = next(failure for kind, failure in _FAILURES if isinstance(error, kind))
            raise failure(endpoint_url=url, proxy_url=self._proxy, error=error) from error
        return AWSResponse(url, told.status, told.headers, _Body(told.body))  # type: ignore[arg-type]


class _Body(io.BytesIO):
    def stream(self) -> Iterator[bytes]:
        """The body, as botocore reads it."""
        yield self.getvalue()

# SPDX-License-Identifier: Apache-2.0
"""The client of AWS KMS in one process, and how it is called."""

from __future__ import annotations

import io
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import certifi
from botocore import exceptions as sdk
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from urllib3 import exceptions as http

from d1_signer.backends.aws_kms import credentials as in_hand
from d1_signer.backends.aws_kms.credentials import AwsCredentials, InHand, Keys, ask_on_terminal
from d1_signer.backends.aws_kms.failures import AWS_KMS, this_call
from d1_signer.backends.aws_kms.settings import Settings
from d1_signer.backends.remote import clients_of
from d1_signer.errors import ConfigurationError, D1SignerError, LoginError, SignerUnavailable
from d1_signer.secret import shown_path
from d1_signer.transport.deadlines import no_time_left, within
from d1_signer.transport.exchange import Http
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.processes import PerProcess
from d1_signer.transport.proxies import TunnelRefused
from d1_signer.transport.tls import verifying_context

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

Method = Callable[..., Mapping[str, Any]]

# Seconds, doubled with each attempt, between two attempts of a call.
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Client:
    """A client of boto3; with what sends its requests and its credentials, where it is ours.

    Attributes:
        kms: The client.
        http: What sends its requests.
        credentials: What it signs them with.
        attempts: How often a service that is busy or away is asked.
    """

    kms: KMSClient
    http: Http | None = None
    credentials: AwsCredentials | None = None
    attempts: int = 1

    def open(self, until: float) -> float:
        """Have credentials by a moment on ``time.monotonic()``.

        Returns:
            Seconds in which a person typed: they count against no limit.
        """
        return self.credentials.open(until, ask_on_terminal) if self.credentials else 0.0

    def call(
        self,
        until: float,
        doing: str,
        phase: str,
        method: Method,
        **arguments: object,
    ) -> Mapping[str, Any]:
        """Call a method of the SDK, and be back by a moment.

        Where AWS KMS refuses the credentials, it is asked once more with others, if there are any.

        Args:
            until: The moment, on ``time.monotonic()``.
            doing: What is asked for, such as ``"to sign"``.
            phase: The word for it in an error's details.
            method: The SDK's method.
            arguments: Those of the method.
        """
        try:
            if self.credentials is None:
                # A client that was given may look for credentials and wait as long as it likes.
                return within(until, partial(_call, until, doing, None, method, arguments))
            keys = self.credentials.get(until)
            try:
                return self._ask(until, doing, keys, method, arguments)
            except LoginError:
                if not self.credentials.replaced(keys, until):
                    raise
            keys = self.credentials.get(until)
            return self._ask(until, doing, keys, method, arguments)
        except D1SignerError as error:
            if error.details.setdefault("phase", phase) == phase:  # else the source has its own
                error.details["endpoint"] = self.kms.meta.endpoint_url
            raise

    def _ask(
        self,
        until: float,
        doing: str,
        keys: Keys,
        method: Method,
        arguments: Mapping[str, object],
    ) -> Mapping[str, Any]:
        # Not by boto3: its pauses know no time limit.
        for attempt in range(1, self.attempts + 1):
            try:
                return _call(until, doing, keys, method, arguments)
            except SignerUnavailable as error:
                pause = _PAUSE * 2**attempt * random.uniform(0.5, 1)  # noqa: S311 (no secret)
                late = time.monotonic() + pause >= until
                if late or attempt == self.attempts or not error.retryable:
                    raise
            time.sleep(pause)
        raise no_time_left()  # only where no attempt was allowed

    def close(self) -> None:
        """Close the connections; those of a client that was given stay open."""
        if self.http is not None:
            self.kms.close()
            self.http.close()


def _call(
    until: float,
    doing: str,
    keys: Keys | None,
    method: Method,
    arguments: Mapping[str, object],
) -> Mapping[str, Any]:
    this_call.until = until
    this_call.sent = keys.secrets() if keys else ()
    answer = AWS_KMS.ask(doing, method, **arguments)
    if not isinstance(answer, Mapping):
        raise AWS_KMS.altered("gave an answer of another kind.")
    return answer


def clients(
    settings: Settings, given: KMSClient | Callable[[], KMSClient] | None
) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own.

    Our own have their credentials in common: a child of a fork goes on with what its parent held.
    """
    credentials = AwsCredentials(settings)

    def make() -> Client:
        return AWS_KMS.ask("to be set up", _client, settings, credentials)

    return clients_of(given, "KMS client", Client, make)


def _client(settings: Settings, credentials: AwsCredentials) -> Client:
    sender = _Sender(settings)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        use_fips_endpoint=settings.fips,
        # Else botocore may take a bearer token of the environment instead, or no signature.
        signature_version="v4",
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # not in its stubs
    )
    with in_hand.making:
        session = in_hand.new_session(settings)
        session.register_component("credential_provider", InHand(credentials))
        # A session of its own: boto3's default one is shared, and sessions are not thread-safe.
        boto = boto3.Session(botocore_session=session)
        client: KMSClient = boto.client("kms", endpoint_url=settings.endpoint, config=config)
    sender.only_to(client.meta.endpoint_url)
    client.meta.events.register("before-send.kms", sender.send)  # type: ignore[arg-type]
    return Client(client, sender.http, credentials, settings.max_attempts)


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
        self._proxy = settings.proxy.url if settings.proxy else None
        self._only = ("", "")
        self.http = Http(
            "AWS KMS",
            _context(settings.ca_file),
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            proxy=settings.proxy,
        )
        self._limits = (settings.connect_timeout, settings.read_timeout)

    def only_to(self, endpoint: str) -> None:
        """Send to this endpoint and to no other."""
        check_endpoint(endpoint, "AWS KMS endpoint")
        self._only = urlsplit(endpoint)[:2]

    def send(self, request: Any, **_: object) -> AWSResponse:
        """Answer the event ``before-send``; what it raises is what botocore knows to repeat."""
        url = str(request.url)
        if urlsplit(url)[:2] != self._only:
            raise ConfigurationError(
                f"botocore would send a request to another endpoint than {'://'.join(self._only)}.",
                hint="Look at what changes clients of botocore in this process.",
            )
        this_call.limits = self._limits
        try:
            told = self.http.exchange(
                request.method,
                url,
                headers=request.headers,
                body=request.body,
                until=this_call.until,
            )
        except http.HTTPError as error:
            if isinstance(error, TunnelRefused) and not error.passes:
                raise  # which botocore does not know, and does not repeat
            failure = next(failure for kind, failure in _FAILURES if isinstance(error, kind))
            raise failure(endpoint_url=url, proxy_url=self._proxy, error=error) from error
        return AWSResponse(url, told.status, told.headers, _Body(told.body))  # type: ignore[arg-type]


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return verifying_context(ca_file or certifi.where())
    except (OSError, ssl.SSLError):
        raise ConfigurationError(
            f"The CA file for AWS KMS cannot be read: {shown_path(ca_file or certifi.where())}.",
            hint="ca_file names a file with certificates in PEM.",
        ) from None


class _Body(io.BytesIO):
    def stream(self) -> Iterator[bytes]:
        """The body, as botocore reads it."""
        yield self.getvalue()

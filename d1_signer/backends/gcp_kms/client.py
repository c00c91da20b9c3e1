# SPDX-License-Identifier: Apache-2.0
"""Which key of Cloud KMS, a client of it in one process, and calls that end by a moment."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import certifi
import grpc
from google.api_core.client_options import ClientOptions
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceGrpcTransport as Transport,
)

from d1_signer.backends.gcp_kms.credentials import GcpCredentials
from d1_signer.backends.gcp_kms.failures import CLOUD_KMS, this_call
from d1_signer.backends.remote import clients_of
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    KeyUriError,
    LoginError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.secret import SecretSource, shown_path, unreadable
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.deadlines import no_time_left, within
from d1_signer.transport.processes import PerProcess, fork_gate
from d1_signer.transport.proxies import Proxy, TunnelRefused, optional_proxy
from d1_signer.transport.tls import read_authorities

R = TypeVar("R")

Sdk = kms.KeyManagementServiceClient

_NAME = re.compile(
    r"(projects/[a-z0-9.:-]+/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]+)"
    r"/cryptoKeys/([A-Za-z0-9_-]+)(?:/cryptoKeyVersions/([1-9][0-9]*))?"
)
_FORM = "gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"
_ENDPOINT = re.compile(rf"{_HOST}(:[0-9]{{1,5}})?")
_UNIVERSE = re.compile(_HOST)
# An option's name may be written as other schemes write theirs.
_QUERY = frozenset(
    {
        *("endpoint", "ca-file", "ca_file", "universe-domain", "universe_domain"),
        *("proxy", "proxy-credentials-source", "proxy_credentials_source"),
    }
)

_GOOGLE = "googleapis.com"

# The addresses that are reached through the proxy GRPC_ADDRESS_HTTP_PROXY: none, and not empty,
# which would mean those that the environment names.
_NOWHERE = "255.255.255.255/32"

# Seconds before the second and the third attempt, at most; then the failure is the caller's.
_PAUSES = (0.1, 0.4)

_CONNECTION = (
    # A connection that passes nothing any more is found out and replaced.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # gRPC would wait for up to two minutes before it connects anew, half of one before it looks
    # the name up again, and a third of one for a connection.
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 4_000),
    ("grpc.min_reconnect_backoff_ms", 4_000),
    ("grpc.dns_min_time_between_resolutions_ms", 4_000),
    ("grpc.address_http_proxy_enabled_addresses", _NOWHERE),
)

_FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
# As gRPC reads it, once.
_FORKS_BREAK_IT = os.environ.get(_FORK_VARIABLE, "").lower() in {"0", "f", "false", "n", "no"}


@dataclass(frozen=True, slots=True)
class Place:
    """What a key URI names, and how to reach it.

    Attributes:
        name: Resource name of the key or the key version.
        ring: Resource name of the key ring.
        key: Name of the key in it.
        version: Number of the version, or None.
        endpoint: ``HOST[:PORT]``, or None.
        proxy: The proxy through which Cloud KMS is reached, or None.
        ca_file: PEM file of the authorities to trust, or None.
        universe: The domain of the cloud.
    """

    name: str
    ring: str
    key: str
    version: str | None
    endpoint: str | None
    proxy: Proxy | None
    ca_file: str | None
    universe: str

    @property
    def target(self) -> str:
        """Where calls go, as ``HOST:PORT``: what is named, and nothing of the environment."""
        host = self.endpoint or f"cloudkms.{self.universe}"
        return host if ":" in host else f"{host}:443"

    def uri(self, name: str) -> str:
        """The URI of a key version that is reached in the same way."""
        settings = {
            "endpoint": self.endpoint,
            "proxy": self.proxy.url if self.proxy else None,
            "ca-file": self.ca_file,
            "universe-domain": None if self.universe == _GOOGLE else self.universe,
        }
        query = "&".join(
            f"{name}={quote(value, safe='/:')}" for name, value in settings.items() if value
        )
        return f"gcpkms://{name}{'?' if query else ''}{query}"


def read_uri(
    uri: str,
    endpoint: str | None = None,
    proxy: str | None = None,
    ca_file: str | None = None,
    universe_domain: str | None = None,
    *,
    proxy_credentials_source: SecretSource | None = None,
) -> Place:
    """Read a key URI; an argument that is not None wins over the URI's query.

    Raises:
        KeyUriError: Not the resource name of a key or a key version.
        ConfigurationError: The endpoint is not ``HOST[:PORT]``, or the proxy cannot be used.
    """
    parsed = KeyUri.parse(uri, query_names=_QUERY)
    name = _NAME.fullmatch(parsed.authority + parsed.path)
    if name is None:
        raise KeyUriError("The gcpkms: URI names no key.", hint=f"Write {_FORM}.")
    query = {name.replace("_", "-"): value for name, value in parsed.query.items()}
    endpoint = endpoint or query.get("endpoint")
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigurationError("The Cloud KMS endpoint is not of the form HOST[:PORT].")
    source = proxy_credentials_source or query.get("proxy-credentials-source")
    through = optional_proxy(proxy or query.get("proxy"), source)
    universe = universe_domain or query.get("universe-domain") or _GOOGLE
    if not _UNIVERSE.fullmatch(universe):
        raise ConfigurationError("The universe domain is not a host name.")
    return Place(
        name=name.group(),
        ring=name.group(1),
        key=name.group(2),
        version=name.group(3),
        endpoint=endpoint,
        proxy=through,
        ca_file=ca_file or query.get("ca-file"),
        universe=universe,
    )


class _Used:
    """The process in which gRPC was first used by this module."""

    pid: int | None = None


class Client:
    """A client of google-cloud-kms; with its credentials, where it is one of ours."""

    def __init__(
        self,
        sdk: Sdk | None = None,
        *,
        place: Place | None = None,
        credentials: GcpCredentials | None = None,
    ) -> None:
        """Take a client that stays the caller's; or make one where a key is.

        Args:
            sdk: The caller's.
            place: The key, for one of ours.
            credentials: For one of ours.
        """
        self._sdk = sdk
        self._place = place
        self._proxy = None if place is None else place.proxy
        self.credentials = credentials

    @property
    def sdk(self) -> Sdk:
        """The SDK's client."""
        made = self._sdk
        if made is None:
            if self._place is None or self.credentials is None:
                raise ConfigurationError("The Cloud KMS client that was given is none.")
            made = self._sdk = _sdk_for(self._place, self.credentials)
        return made

    def call(
        self,
        until: float,
        doing: str,
        phase: str,
        method: Callable[..., R],
        request: object,
        *,
        attempts: int = 3,
    ) -> R:
        """Call a method of the SDK; the moment holds for all attempts together.

        Where Cloud KMS refuses the access token, it is asked once more with another, if there is
        one.

        Args:
            until: The moment, on ``time.monotonic()``.
            doing: What is asked for, such as ``"to sign"``.
            phase: The word for it in an error's details.
            method: The SDK's method.
            request: The request's message.
            attempts: How often an unavailable service is asked.
        """
        attempt = partial(_attempts, until, doing, method, request, attempts)
        ask = partial(CLOUD_KMS.ask, doing, self._through_proxy, until, attempt)
        try:
            _check_fork()
            if self.credentials is None:
                return self._ask(until, ask)
            token = self.credentials.get(until)
            this_call.sent = token.secrets()
            this_call.proxy = self._proxy.url if self._proxy else None
            try:
                return ask()
            except LoginError:
                if not self.credentials.replaced(token, until):
                    raise
            this_call.sent = self.credentials.get(until).secrets()
            return ask()
        except D1SignerError as error:
            if error.details.setdefault("phase", phase) == phase:  # else the source has its own
                own = self._place  # whose channel may be closed
                error.details["endpoint"] = own.target if own else str(self.sdk.transport.host)
            raise

    def _through_proxy(self, until: float, ask: Callable[[], R]) -> R:
        if self._proxy is None or self._place is None:
            return ask()
        target = self._place.target
        try:
            with self._proxy.asking(target, until) as credentials:
                try:
                    answer = ask()
                except D1SignerError as error:
                    status = error.details.get("proxy_status")
                    if isinstance(status, int):
                        self._proxy.answered(target, credentials, status, Message())
                    raise
                self._proxy.answered(target, credentials, 200, Message())
                return answer
        except TunnelRefused as refused:
            if not refused.passes:
                self._let_go()
            raise

    def _let_go(self) -> None:
        """Close the channel, which would ask a proxy that has refused again and again by itself."""
        made, self._sdk = self._sdk, None
        if made is not None:
            made.transport.close()  # type: ignore[no-untyped-call]

    def _ask(self, until: float, ask: Callable[[], R]) -> R:
        this_call.sent, this_call.proxy = (), None
        # Over REST a time limit bounds each wait for bytes and not the call.
        return ask() if getattr(self.sdk.transport, "kind", "") == "grpc" else within(until, ask)

    def close(self) -> None:
        """Close the channel; that of a client that was given stays open."""
        if self.credentials is not None and self._sdk is not None:
            self._sdk.transport.close()  # type: ignore[no-untyped-call]


def _check_fork() -> None:
    if not _FORKS_BREAK_IT:
        return
    if _Used.pid is None:
        _Used.pid = os.getpid()
    elif _Used.pid != os.getpid():
        raise ConfigurationError(
            f"{_FORK_VARIABLE} is off, and this process was forked from one that used gRPC: here "
            "gRPC would hang for ever, or crash.",
            hint=f"Unset {_FORK_VARIABLE}, or open the key after the fork only.",
        )


def _attempts(
    until: float, doing: str, method: Callable[..., R], request: object, attempts: int
) -> R:
    for pause in (*_PAUSES[: attempts - 1], None):
        try:
            with fork_gate.call(until):
                remaining = until - time.monotonic()
                if remaining <= 0:
                    break
                # The SDK's own retry ignores `timeout`: it runs for a minute.
                return CLOUD_KMS.ask(doing, method, request=request, retry=None, timeout=remaining)
        except TimeoutError:
            break
        except (SignerTimeout, SignerThrottled):
            raise
        except SignerUnavailable as error:
            if not error.retryable or pause is None or time.monotonic() + pause >= until:
                raise
        time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 (spreads load, no secret)
    raise no_time_left()


def clients(place: Place, given: Sdk | Callable[[], Sdk] | None) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own.

    Our own have their credentials in common: a child of a fork goes on with what its parent held.
    """
    make = partial(_client, place, GcpCredentials(place.universe, place.target))
    return clients_of(
        given, "Cloud KMS client", Client, lambda: CLOUD_KMS.ask("to be set up", make)
    )


def _client(place: Place, credentials: GcpCredentials | None = None) -> Client:
    _check_fork()
    if os.environ.get("GOOGLE_API_USE_CLIENT_CERTIFICATE", "").lower() == "true":
        raise ConfigurationError(
            "GOOGLE_API_USE_CLIENT_CERTIFICATE is set, and the calls would show no certificate.",
            hint="Unset it; or give a function that makes a client which shows one.",
        )
    credentials = credentials or GcpCredentials(place.universe, place.target)
    client = Client(place=place, credentials=credentials)
    client.sdk  # noqa: B018 (so that a wrong setting shows now)
    return client


def _sdk_for(place: Place, credentials: GcpCredentials) -> Sdk:
    tls = grpc.ssl_channel_credentials(_authorities(place.ca_file))
    bearer = grpc.metadata_call_credentials(_Bearer(credentials))
    channel = grpc.secure_channel(
        place.target,
        grpc.composite_channel_credentials(tls, bearer),
        options=[*_way(place.proxy), *_CONNECTION],
    )
    transport = Transport(channel=channel, host=place.target)
    # The transport has its endpoint already; the SDK would take one of the environment's here.
    settled = ClientOptions(universe_domain=Sdk._DEFAULT_UNIVERSE)  # noqa: SLF001
    return Sdk(transport=transport, client_options=settled)


def _way(proxy: Proxy | None) -> list[tuple[str, Any]]:
    # gRPC would use the proxy that the environment names.
    if proxy is None:
        return [("grpc.enable_http_proxy", 0)]
    # And a new channel would go on with the failures of a closed one, whatever its credentials.
    return [("grpc.http_proxy", proxy.revealed_url()), ("grpc.use_local_subchannel_pool", 1)]


def _authorities(ca_file: str | None) -> bytes:
    path = ca_file or certifi.where()
    try:
        # gRPC would take an empty one for its own default, which the environment may name.
        return read_authorities(path)
    except (OSError, ValueError) as error:
        reason = unreadable(error)
    raise ConfigurationError(
        f"The CA file for Cloud KMS cannot be read: {shown_path(path)}: {reason}.",
        hint="ca_file names a file with certificates in PEM.",
    )


class _Bearer(grpc.AuthMetadataPlugin):
    """Shows the access token in hand; it renews nothing itself."""

    def __init__(self, credentials: GcpCredentials) -> None:
        super().__init__()
        self._credentials = credentials

    def __call__(
        self, _context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback
    ) -> None:
        """See `grpc.AuthMetadataPlugin`."""
        held = self._credentials.held()
        headers: Any = held.headers if held is not None else ()
        callback(headers, None)

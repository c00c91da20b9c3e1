# SPDX-License-Identifier: Apache-2.0
"""Which key of Cloud KMS, a client of it, and calls that end by a moment."""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import certifi
import grpc
from google.api_core.client_options import ClientOptions
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceGrpcTransport as Transport,
)

from d1_signer.backends.gcp_kms.failures import CLOUD_KMS
from d1_signer.backends.remote import clients_of
from d1_signer.errors import (
    ConfigurationError,
    KeyUriError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.deadlines import no_time_left, within
from d1_signer.transport.processes import PerProcess, fork_gate
from d1_signer.transport.proxies import check_proxy

R = TypeVar("R")

Sdk = kms.KeyManagementServiceClient

_NAME = re.compile(
    r"(projects/[a-z0-9.:-]+/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]+)"
    r"/cryptoKeys/([A-Za-z0-9_-]+)(?:/cryptoKeyVersions/([1-9][0-9]*))?"
)
_FORM = "gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V"
_ENDPOINT = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?")

# The addresses that are reached through the proxy GRPC_ADDRESS_HTTP_PROXY: none, and not empty,
# which would mean those that the environment names.
_NOWHERE = "255.255.255.255/32"

# Seconds before the second and the third attempt, at most; then the failure is the caller's.
_PAUSES = (0.1, 0.4)


@dataclass(frozen=True, slots=True)
class Client:
    """A client of google-cloud-kms, and whether it is one of ours."""

    sdk: Sdk
    owned: bool = False

    def call(self, until: float, doing: str, method: Callable[..., R], request: object) -> R:
        """Call a method of the SDK; the moment holds for all attempts together.

        Args:
            until: The moment, on ``time.monotonic()``.
            doing: What is asked for, such as ``"to sign"``.
            method: The SDK's method.
            request: The request's message.
        """
        if getattr(self.sdk.transport, "kind", "") == "grpc":
            return _attempts(until, doing, method, request)
        # Over REST a time limit bounds each wait for bytes and not the call.
        return within(until, lambda: _attempts(until, doing, method, request))

    def close(self) -> None:
        """Close the channel; that of a client that was given stays open."""
        if self.owned:
            self.sdk.transport.close()  # type: ignore[no-untyped-call]


def _attempts(until: float, doing: str, method: Callable[..., R], request: object) -> R:
    for pause in (*_PAUSES, None):
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
        except SignerUnavailable:
            if pause is None or time.monotonic() + pause >= until:
                raise
        time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 (spreads load, no secret)
    raise no_time_left()


@dataclass(frozen=True, slots=True)
class Place:
    """What a key URI names, and how to reach it.

    Attributes:
        name: Resource name of the key or the key version.
        ring: Resource name of the key ring.
        key: Name of the key in it.
        version: Number of the version, or None.
        endpoint: ``HOST[:PORT]``, or None.
        proxy: URL of the proxy through which Cloud KMS is reached, or None.
    """

    name: str
    ring: str
    key: str
    version: str | None
    endpoint: str | None
    proxy: str | None


def read_uri(uri: str, endpoint: str | None, proxy: str | None) -> Place:
    """Read a key URI; an argument that is not None wins over the URI's query.

    Raises:
        KeyUriError: Not the resource name of a key or a key version.
        ConfigurationError: The endpoint is not ``HOST[:PORT]``, or the proxy cannot be used.
    """
    parsed = KeyUri.parse(uri, query_names=frozenset({"endpoint", "proxy"}))
    name = _NAME.fullmatch(parsed.authority + parsed.path)
    if name is None:
        raise KeyUriError("The gcpkms: URI names no key.", hint=f"Write {_FORM}.")
    endpoint = endpoint or parsed.query.get("endpoint")
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigurationError("The Cloud KMS endpoint is not of the form HOST[:PORT].")
    proxy = proxy or parsed.query.get("proxy")
    if proxy:
        check_proxy(proxy, credentials=False)
    return Place(name.group(), name.group(1), name.group(2), name.group(3), endpoint, proxy)


def clients(place: Place, given: Sdk | Callable[[], Sdk] | None) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own."""
    return clients_of(
        given, "Cloud KMS client", Client, lambda: CLOUD_KMS.ask("to be set up", _client, place)
    )


def _client(place: Place) -> Client:
    # gRPC would use the proxies and the authorities that the environment names; and the SDK lifts
    # gRPC's limit for an answer's size, 4 MiB.
    options = [
        ("grpc.http_proxy", place.proxy) if place.proxy else ("grpc.enable_http_proxy", 0),
        ("grpc.address_http_proxy_enabled_addresses", _NOWHERE),
    ]

    def channel(host: str, **settings: Any) -> grpc.Channel:
        return Transport.create_channel(host, **{**settings, "options": options})

    transport = functools.partial(
        Transport,
        channel=channel,
        ssl_channel_credentials=grpc.ssl_channel_credentials(Path(certifi.where()).read_bytes()),
    )
    options_of_sdk = ClientOptions(api_endpoint=place.endpoint)
    return Client(Sdk(client_options=options_of_sdk, transport=transport), owned=True)

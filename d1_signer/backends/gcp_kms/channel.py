# SPDX-License-Identifier: Apache-2.0
"""A channel of gRPC to Cloud KMS: whom it trusts, what it shows, which way it goes."""

from __future__ import annotations

from typing import Any

import certifi
import grpc
from google.api_core.client_options import ClientOptions
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceGrpcTransport as Transport,
)

from d1_signer.backends.gcp_kms.credentials import GcpCredentials
from d1_signer.backends.gcp_kms.place import Place
from d1_signer.errors import ConfigurationError
from d1_signer.secret import Secret, shown_path, unreadable
from d1_signer.transport.proxies import Proxy
from d1_signer.transport.tls import read_authorities

Sdk = kms.KeyManagementServiceClient

# The addresses that are reached through the proxy GRPC_ADDRESS_HTTP_PROXY: none, and not empty,
# which would mean those that the environment names.
_NOWHERE = "255.255.255.255/32"

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


def sdk_for(place: Place, credentials: GcpCredentials, shown: Secret | None) -> Sdk:
    """A client of google-cloud-kms with a channel of its own.

    Args:
        place: Where it goes.
        credentials: Whose access tokens it shows.
        shown: What it shows the proxy for as long as it lives; see `Proxy.asking`.

    Raises:
        ConfigurationError: The authorities cannot be read.
    """
    tls = grpc.ssl_channel_credentials(_authorities(place.ca_file))
    bearer = grpc.metadata_call_credentials(_Bearer(credentials))
    channel = grpc.secure_channel(
        place.target,
        grpc.composite_channel_credentials(tls, bearer),
        options=[*_way(place.proxy, shown), *_CONNECTION],
    )
    transport = Transport(channel=channel, host=place.target)
    # The transport has its endpoint already; the SDK would take one of the environment's here.
    settled = ClientOptions(universe_domain=Sdk._DEFAULT_UNIVERSE)  # noqa: SLF001
    return Sdk(transport=transport, client_options=settled)


def _way(proxy: Proxy | None, shown: Secret | None) -> list[tuple[str, Any]]:
    # gRPC would use the proxy that the environment names.
    if proxy is None:
        return [("grpc.enable_http_proxy", 0)]
    # And a new channel would go on with the failures of a closed one, whatever its credentials.
    return [("grpc.http_proxy", proxy.revealed_url(shown)), ("grpc.use_local_subchannel_pool", 1)]


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

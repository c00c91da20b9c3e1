# SPDX-License-Identifier: Apache-2.0
"""Which endpoints may be used, and which hosts may be spoken to without TLS. Pure."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from d1_signer.errors import ConfigurationError


def is_address(host: str) -> bool:
    """Whether a host is an IP address, so that there is no name to look up."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def shown_address(host: str, port: int) -> str:
    """Host and port as texts and CONNECT have them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and nobody else's."""
    if host == "localhost":  # RFC 6761 section 6.3: it always means loopback
        return True
    return is_address(host) and ip_address(host.strip("[]")).is_loopback


def check_endpoint(url: str, what: str) -> None:
    """Refuse an endpoint that is not https; plain http is for loopback addresses only.

    Raises:
        ConfigurationError: Another scheme, no host, user information, or http to another machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"The {what} is not a URL.") from None
    if parts.scheme not in {"https", "http"} or not host or "@" in parts.netloc:
        raise ConfigurationError(
            f"The {what} is not a URL of the form https://HOST[:PORT].",
            hint="Credentials never stand in it.",
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"The {what} is plain http to {host}.",
            hint="Use https; plain http is taken for a loopback address only.",
        )

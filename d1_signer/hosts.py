# SPDX-License-Identifier: Apache-2.0
"""Which hosts may be spoken to without TLS. Pure."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and nobody else's."""
    if host == "localhost":  # RFC 6761 section 6.3: it always means loopback
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

# SPDX-License-Identifier: Apache-2.0
"""Which proxies can be used. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

from d1_signer.errors import ConfigurationError


def check_proxy(url: object, *, credentials: bool) -> None:
    """Refuse a proxy that is not ``http://HOST:PORT``.

    A proxy that is itself reached by TLS would need a trust of its own.

    Args:
        url: What was given.
        credentials: Whether ``http://USER:PASSWORD@HOST:PORT`` is taken too; never where the URL
            stands in a key URI, which is logged.

    Raises:
        ConfigurationError: Another form.
    """
    try:
        parts = urlsplit(url)  # type: ignore[call-overload]  # whatever a caller gives
        good = parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or ("@" in str(url) and not credentials):
        raise ConfigurationError(
            "The proxy cannot be used.",
            hint=f"Give http://HOST:PORT{'' if credentials else ', without credentials'}.",
        )

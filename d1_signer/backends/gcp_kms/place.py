# SPDX-License-Identifier: Apache-2.0
"""What a key URI of Cloud KMS names, and how that is reached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.secret import SecretSource
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.proxies import Proxy, optional_proxy

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

# SPDX-License-Identifier: Apache-2.0
"""Where Vault is and how it is trusted: options, and the variables of its own clients.

OpenBao's names (``BAO_…``) are read before Vault's (``VAULT_…``), as by its own command line. What
we do not do is refused where a variable asks for it: nothing that is set is ignored in silence.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from d1_signer.errors import ConfigurationError
from d1_signer.secret import read_public_file, shown_path
from d1_signer.transport.client import ClientTls
from d1_signer.transport.credentials import Authorities, ClientCertificate, Hints
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.proxies import Proxy

_PREFIXES = ("BAO_", "VAULT_")
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})  # as Go reads a boolean
_NOT_DONE = {
    "TLS_SERVER_NAME": "Name the server in the address as its certificate does.",
    "PROXY_ADDR": "Name the proxy in the option proxy.",
    "HTTP_PROXY": "Name the proxy in the option proxy.",
}
_NOT_DONE_IF_TRUE = {
    "SKIP_VERIFY": "The server is always verified: name its authority in VAULT_CACERT.",
    "SRV_LOOKUP": "Name host and port in the address.",
}
_CLIENT = "See VAULT_CLIENT_CERT and VAULT_CLIENT_KEY: PEM files, the key unencrypted."
_HINTS = Hints(
    certificate=_CLIENT,
    pair=_CLIENT,
    passphrase=_CLIENT,
    authorities="Vault's authorities are certificates in PEM: see VAULT_CACERT.",
    expiry=None,  # many live for an hour
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where Vault is: the options of `open_backend`, put together.

    Attributes:
        address: ``https://HOST:PORT``, http on loopback, or ``unix:///PATH``.
        namespace: Namespace, or None.
        context: Makes the TLS context of a process.
        client_certificate: Whether a server is shown one.
        proxy: On the way of https, or None.
        connect_timeout: Seconds for each attempt to connect.
        read_timeout: Seconds for each wait for bytes.
    """

    address: str
    namespace: str | None
    context: Callable[[], ssl.SSLContext]
    client_certificate: bool
    proxy: Proxy | None
    connect_timeout: float
    read_timeout: float

    @property
    def socket_path(self) -> str | None:
        """The Unix socket, where the address is one."""
        parts = urlsplit(self.address)
        return unquote(parts.path) if parts.scheme == "unix" else None

    @property
    def endpoint(self) -> str:
        """Host and port, or the socket, as error texts name it."""
        return self.socket_path or urlsplit(self.address).netloc


def variable(name: str) -> str | None:
    """What OpenBao's or Vault's variable of this name says; None where neither is set."""
    values = (os.environ.get(prefix + name) for prefix in _PREFIXES)
    return next((value for value in values if value), None)


def read_settings(
    address: str | None = None,
    namespace: str | None = None,
    ca_file: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    *,
    trusted_owner: int | None = None,
    proxy: Proxy | None = None,
    timeout: float = 10.0,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
) -> Settings:
    """Fill in from the environment what is None, as Vault's and OpenBao's command lines do.

    Raises:
        ConfigurationError: The address is not https, nor http on loopback, nor a Unix socket; the
            authorities cannot be used; or a variable asks for what is not done.
        SecretSourceError: The client certificate or its key cannot be used.
    """
    _refuse_what_is_not_done()
    address = address or variable("AGENT_ADDR") or variable("ADDR") or "https://127.0.0.1:8200"
    _check_address(address)
    certificate = _client_certificate(client_cert, client_key)
    if not address.startswith("https:"):
        if client_cert is not None:
            raise ConfigurationError(
                "A client certificate is given for an address without TLS.",
                hint="Give an https address, or leave the certificate out.",
            )
        certificate = None
    client = certificate and ClientCertificate(*certificate, trusted_owner=trusted_owner)
    tls = ClientTls(client, _authorities(ca_file), hints=_HINTS, patience=timeout)
    return Settings(
        address=address,
        namespace=namespace or variable("NAMESPACE"),
        context=tls.context,
        client_certificate=certificate is not None,
        proxy=proxy,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )


def _refuse_what_is_not_done() -> None:
    for name, hint in {**_NOT_DONE, **_NOT_DONE_IF_TRUE}.items():
        for prefix in _PREFIXES:
            value = os.environ.get(prefix + name, "")
            if value in _TRUE or (value and name in _NOT_DONE):
                raise ConfigurationError(
                    f"The variable {prefix}{name} is set, and asks for what is not done here.",
                    hint=f"{hint} Unset the variable.",
                )


def _check_address(address: str) -> None:
    if not address.startswith("unix:"):
        check_endpoint(address, "address of Vault")
    elif not address.startswith("unix:///"):
        raise ConfigurationError(
            "The address of Vault is not a Unix socket of the form unix:///PATH.",
            hint="The path begins with a slash.",
        )


def _client_certificate(certificate: str | None, key: str | None) -> tuple[str, str] | None:
    if certificate is None and key is None:
        certificate, key = variable("CLIENT_CERT"), variable("CLIENT_KEY")
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigurationError(
            "Of the client certificate for Vault and its key, only one is given.",
            hint="Give both: client_cert and client_key, or VAULT_CLIENT_CERT, VAULT_CLIENT_KEY.",
        )
    return certificate, key


def _authorities(ca_file: str | None) -> Authorities:
    """In the order of Vault's own client."""
    file = ca_file or variable("CACERT")
    if file is not None:
        return Authorities(file=file)
    text = variable("CACERT_BYTES")
    if text is None and (folder := variable("CAPATH")) is not None:
        text = _all_in(folder)
    if text is not None and "-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigurationError(
            "There is no certificate in VAULT_CACERT_BYTES or in the files of VAULT_CAPATH.",
            hint="They hold certificates in PEM.",
        )
    name = "VAULT_CACERT_BYTES or VAULT_CAPATH"
    return Authorities(pem=None if text is None else text.encode(), name=name)


def _all_in(folder: str) -> str:
    try:
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return "\n".join(read_public_file(str(path)).decode(errors="replace") for path in files)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"The folder of authorities for Vault cannot be read: {shown_path(folder)}.",
            hint="See VAULT_CAPATH.",
        ) from None

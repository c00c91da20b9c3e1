# SPDX-License-Identifier: Apache-2.0
"""Where Vault is and how it is trusted: options, and the variables of its own clients.

OpenBao's names (``BAO_…``) are read before Vault's (``VAULT_…``), as by its own command line. What
we do not do is refused where a variable asks for it: nothing that is set is ignored in silence.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.secret import read_private_file, shown_path
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.proxies import Proxy
from d1_signer.transport.tls import VerifyingContext, verifying_context

_log = logging.getLogger(__name__)

_LARGEST_FILE = 1 << 20
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
    proxy: Proxy | None = None,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
) -> Settings:
    """Fill in from the environment what is None, as Vault's and OpenBao's command lines do.

    Raises:
        ConfigurationError: The address is not https, nor http on loopback, nor a Unix socket; a
            file cannot be used; or a variable asks for what is not done.
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
    file, pem = _authorities(ca_file)
    return Settings(
        address=address,
        namespace=namespace or variable("NAMESPACE"),
        context=lambda: _context(file, pem, certificate),
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


def _authorities(ca_file: str | None) -> tuple[str | None, str | None]:
    """A file, or a text in PEM; neither: the system's. In the order of Vault's own client."""
    file = ca_file or variable("CACERT")
    if file is not None:
        return file, None
    text = variable("CACERT_BYTES")
    if text is None and (folder := variable("CAPATH")) is not None:
        text = _all_in(folder)
    if text is not None and "-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigurationError(
            "There is no certificate in VAULT_CACERT_BYTES or in the files of VAULT_CAPATH.",
            hint="They hold certificates in PEM.",
        )
    return None, text


def _all_in(folder: str) -> str:
    try:
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return "\n".join(read_public(str(path)).decode(errors="replace") for path in files)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"The folder of authorities for Vault cannot be read: {shown_path(folder)}.",
            hint="See VAULT_CAPATH.",
        ) from None


def read_public(path: str) -> bytes:
    """Read a file that holds no secret: a regular one, of at most 1 MiB.

    Raises:
        OSError: It cannot be read, or is none.
        ValueError: Not a file name, or too large.
    """
    with open(path, "rb", opener=_without_blocking) as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        content = file.read(_LARGEST_FILE + 1) if regular else b""
    if not regular or len(content) > _LARGEST_FILE:
        raise ValueError(path)
    return content


def _without_blocking(path: str, flags: int) -> int:
    # A FIFO without a writer would hold the caller for ever; it is refused after the open.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _context(
    file: str | None, pem: str | None, certificate: tuple[str, str] | None
) -> ssl.SSLContext:
    try:
        context = verifying_context(file, pem=pem)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        where = "VAULT_CACERT_BYTES or VAULT_CAPATH" if file is None else shown_path(file)
        raise ConfigurationError(
            f"The CA file for Vault cannot be read: {where}.",
            hint="It holds certificates in PEM; see VAULT_CACERT.",
        ) from None
    if certificate is not None:
        _Shown(certificate, context).load()
    return context


class _Shown:
    """A client certificate that is loaded anew when its files change: many live for an hour."""

    def __init__(self, files: tuple[str, str], context: VerifyingContext) -> None:
        self._files = files
        self._context = context
        self._state: list[object] = []
        context.before_each = self._look

    def load(self) -> None:
        certificate, key = self._files
        self._state = self._found()
        read_private_file(key, what="client key file for Vault")
        try:
            with self._context.changing:
                # An empty passphrase keeps OpenSSL from asking on the terminal.
                self._context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError):  # ssl.SSLError is an OSError
            raise ConfigurationError(
                "The client certificate for Vault or its key cannot be read, or they do not belong "
                f"together: {shown_path(certificate)}, {shown_path(key)}.",
                hint="See VAULT_CLIENT_CERT and VAULT_CLIENT_KEY: PEM files, the key unencrypted.",
            ) from None

    def _look(self) -> None:
        if self._state == self._found():
            return
        try:
            self.load()
        except D1SignerError as error:  # half-written: the next connection looks again
            self._state = []
            _log.warning("hashivault.client_certificate_unusable the last is used on: %s", error)

    def _found(self) -> list[object]:
        found: list[object] = []
        for file in self._files:
            try:
                status = Path(file).stat()
            except OSError:
                return []
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return found

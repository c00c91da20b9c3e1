# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS towards D1, and the adapter that carries it into requests.

Verification of the server cannot be switched off, here or by what a caller does to a session.
"""

from __future__ import annotations

import os
import ssl
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, final
from urllib.parse import urlsplit

import certifi
import requests
from requests.adapters import HTTPAdapter

from d1_signer.connections import Connections
from d1_signer.errors import ConfigurationError, SecretSourceError
from d1_signer.hosts import is_loopback
from d1_signer.secret import SecretSource, read_private_file, read_secret, shown_path

_ENCRYPTED_HINT = "Name the source of its passphrase: file:PATH or env:NAME."


@final
@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client certificate that D1's mutual TLS asks for.

    Attributes:
        certificate: Path of the certificate in PEM, its chain behind it.
        key: Path of its private key in PEM; readable by its owner only.
        passphrase: Source of the key's passphrase; None for a key that is not encrypted.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    passphrase: SecretSource | None = field(default=None, repr=False, kw_only=True)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load certificate and key into a context.

        Raises:
            SecretSourceError: A file or the passphrase cannot be read or used.
            ConfigurationError: The key does not belong to the certificate.
        """
        certificate, key = _path(self.certificate), _path(self.key)
        shown = f"{shown_path(certificate)}, {shown_path(key)}"
        read_private_file(key, what="client key file")
        asked = False

        def passphrase() -> str:
            nonlocal asked
            asked = True
            if self.passphrase is None:
                return ""  # an empty answer keeps OpenSSL from asking on the terminal
            return read_secret(self.passphrase, what="client key's passphrase").reveal()

        try:
            context.load_cert_chain(certificate, key, password=passphrase)
        except FileNotFoundError:
            raise SecretSourceError(
                f"The client certificate is missing: {shown_path(certificate)}.",
                hint="Give the file that Thales sent for your CSR.",
            ) from None
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise ConfigurationError(
                    f"The client key does not belong to the client certificate: {shown}.",
                    hint="Give the key from whose CSR Thales signed the certificate.",
                ) from None
            raise SecretSourceError(
                f"The client certificate or its key cannot be read: {shown}.",
                hint=_ENCRYPTED_HINT if asked else "Both must be PEM files.",
            ) from None
        except (OSError, ValueError):
            raise SecretSourceError(
                f"The client certificate or its key cannot be read: {shown}.",
                hint="Check the paths, their permissions, and the passphrase.",
            ) from None


def client_context(
    certificate: ClientCertificate | ssl.SSLContext | None,
    ca_file: str | os.PathLike[str] | None,
) -> ssl.SSLContext:
    """Build the TLS context for D1, or check the caller's.

    Args:
        certificate: The client certificate; or a ready context, which is used as it is.
        ca_file: PEM file of the authorities that may sign the server's certificate, instead of
            the public ones that ``certifi`` lists.

    Raises:
        ConfigurationError: A ready context that does not verify the server, or both a ready
            context and a CA file.
        SecretSourceError: A file cannot be read.
    """
    if isinstance(certificate, ssl.SSLContext):
        if ca_file is not None:
            raise ConfigurationError(
                "A CA file and a ready ssl.SSLContext were both given.",
                hint="Load the CA file into the context.",
            )
        require_verifying(certificate)
        return certificate
    # Not create_default_context(): it would log session keys where SSLKEYLOGFILE says so.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    authorities = certifi.where() if ca_file is None else _path(ca_file)
    try:
        context.load_verify_locations(cafile=authorities)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"The CA file cannot be read: {shown_path(authorities)}.",
            hint="It must hold certificates in PEM.",
        ) from None
    if isinstance(certificate, ClientCertificate):
        certificate.load_into(context)
    elif certificate is not None:
        raise ConfigurationError(
            "The client certificate is neither a ClientCertificate nor an ssl.SSLContext.",
            hint="Give ClientCertificate(certificate, key).",
        )
    return context


def _path(value: object) -> str:
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError("A certificate, key or CA file is not given as a path.") from None


def require_verifying(context: ssl.SSLContext) -> None:
    """Refuse a context that does not verify the server or that writes its keys to a file.

    Raises:
        ConfigurationError: Verification, the host name check or TLS 1.2 is not enforced, or a
            key log file is set.
    """
    if context.verify_mode is not ssl.CERT_REQUIRED or not context.check_hostname:
        raise ConfigurationError(
            "The ssl.SSLContext does not verify the server's certificate and host name.",
            hint="Set verify_mode to CERT_REQUIRED and check_hostname to True.",
        )
    # MINIMUM_SUPPORTED is a negative number: whatever the OpenSSL build allows.
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        raise ConfigurationError(
            "The ssl.SSLContext allows TLS below 1.2.",
            hint="Set minimum_version to ssl.TLSVersion.TLSv1_2.",
        )
    # Such suites authenticate no server by a certificate, whatever verify_mode says; TLS 1.3 has
    # none of them and reads "auth-any".
    if any(_is_anonymous(suite) for suite in context.get_ciphers()):
        raise ConfigurationError(
            "The ssl.SSLContext offers cipher suites that need no server certificate.",
            hint='Leave the ciphers as they are, or add ":!aNULL:!eNULL:!PSK:!SRP" to them.',
        )
    if context.keylog_filename:
        raise ConfigurationError(
            "The ssl.SSLContext logs TLS keys to a file.",
            hint="Unset SSLKEYLOGFILE, or leave keylog_filename unset.",
        )


def _is_anonymous(suite: Mapping[str, Any]) -> bool:
    kind = str(suite["auth"])
    return "null" in kind or "psk" in kind or "srp" in kind or "NULL" in str(suite["name"])


def _require_ours(context: ssl.SSLContext | None) -> None:
    # At each handshake: a caller may have weakened its context since it gave it.
    if context is None:
        raise ConfigurationError("A TLS connection has no context of ours.")
    require_verifying(context)


class TlsAdapter(HTTPAdapter):
    """An adapter for requests that uses exactly the context it was given.

    The usual recipe (``init_poolmanager(ssl_context=…)``) lets requests add certifi's authorities
    to the context at the first call; here nothing is added.
    """

    def __init__(
        self, context: ssl.SSLContext, *, timeouts: tuple[float, float], pool_size: int = 10
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            context: For every https connection.
            timeouts: Seconds to wait for a connection, and for the next bytes, where a call says
                nothing else.
            pool_size: Connections to keep.
        """
        self._context: Final = context
        self._timeouts: Final = timeouts
        self._connections = Connections(_require_ours)
        self._owner = os.getpid()
        super().__init__(pool_maxsize=pool_size, max_retries=0)
        _adapters.add(self)

    def send(
        self, request: requests.PreparedRequest, *args: Any, **kwargs: Any
    ) -> requests.Response:
        """Send one request; see `HTTPAdapter`."""
        self._notice_fork()
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self._timeouts
        try:
            return super().send(request, *args, **kwargs)
        except requests.RequestException as error:
            # Errors of requests hold the request, and travel into logs and crash reports.
            if isinstance(error.request, requests.PreparedRequest):
                error.request = _without_token(error.request)
            raise

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        """Select the pool by our context alone; see `HTTPAdapter`."""
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https":
            return host, {"ssl_context": self._context}
        if not is_loopback(str(host["host"])):
            raise ConfigurationError(
                "A call without TLS to another machine is refused.", hint="Use an https URL."
            )
        return host, pool

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:  # noqa: ARG002
        """Refuse what would weaken or replace the context; see `HTTPAdapter`.

        Raises:
            ConfigurationError: ``verify`` is not True, or ``cert`` is set.
        """
        if verify is not True or cert is not None:
            raise ConfigurationError(
                "TLS verification cannot be switched off or replaced on this session.",
                hint="Give ca_file or an ssl.SSLContext to TokenFetcher instead.",
            )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pools; see `HTTPAdapter`."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._connections.pools()

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Create the pools behind a proxy; see `HTTPAdapter`."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self._connections.pools()
        return manager

    def bounded(self, deadline: float) -> AbstractContextManager[None]:
        """Bound the calls of this thread; see `Connections.bounded`."""
        self._notice_fork()
        return self._connections.bounded(deadline)

    def abort(self) -> None:
        """End every call under way, so that a thread that waits in one comes back."""
        self._notice_fork()
        self._connections.cut()

    def _notice_fork(self) -> None:
        # Of which Python was not told: uWSGI forks in C, and so do others.
        if self._owner != os.getpid():
            self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: begin without a connection.

        Both sides writing into one inherited TLS stream would break it for both, and so would one
        side cutting it.
        """
        self._owner = os.getpid()
        # Dropping the pools closes their connections, and the lock may be a thread's of the parent.
        self._connections.lock = threading.RLock()
        self._connections = Connections(_require_ours)
        self.proxy_manager.clear()
        self.init_poolmanager(self._pool_connections, self._pool_maxsize)  # type: ignore[attr-defined]


_adapters: weakref.WeakSet[TlsAdapter] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for adapter in list(_adapters):
        adapter.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _without_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
    if "Authorization" not in request.headers:
        return request
    shown = request.copy()
    shown.headers["Authorization"] = "****"
    return shown


class _Session(requests.Session):
    """Follows no redirect: a token, an assertion or a card stays with the host it was meant for."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """There is none; the answer is returned as it is."""
        del resp


def checked_proxy(proxy: str | None) -> str | None:
    """Return a proxy's URL that can be used, or None.

    Raises:
        ConfigurationError: Not ``http://HOST:PORT``. A proxy that is itself reached by TLS would
            need a trust of its own.
    """
    if proxy is None:
        return None
    try:
        parts = urlsplit(proxy)
        good = parts.scheme == "http" and bool(parts.hostname) and (parts.port or 80) > 0
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ConfigurationError(
            "The proxy cannot be used.",
            hint="Give http://HOST:PORT; D1 is reached through CONNECT.",
        )
    return proxy


def new_session(adapter: TlsAdapter, *, proxy: str | None) -> requests.Session:
    """A requests session that takes nothing from the process environment and follows no redirect.

    Args:
        adapter: Used for https and, where the environment is a loopback address, for http.
        proxy: URL of a proxy, or None.
    """
    session = _Session()
    # No proxy variables, no netrc, no REQUESTS_CA_BUNDLE: what is used is what was configured.
    session.trust_env = False
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    if proxy is not None:
        session.proxies = {"https": proxy}
    return session

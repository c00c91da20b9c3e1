# SPDX-License-Identifier: Apache-2.0
"""HTTP to the services that hold keys: each exchange ends by a moment and has a limit of size."""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssl_match_hostname import CertificateError

from d1_signer.bounded_response import BoundedReader, BoundedResponse
from d1_signer.errors import IntegrityError
from d1_signer.remote import fork_gate, no_time_left, within

# More threads than connections would work too, but warn for each connection thrown away.
_CONNECTIONS = 128
_LARGEST_ANSWER = 1 << 20

# A firewall forgets idle connections without a word; each one that it forgot would cost a time-out.
_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # Linux: after a minute, and not after two hours
    _KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


def is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused, which stays so; anything else about TLS may pass."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        cause = todo.pop()
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        if isinstance(cause, ssl.SSLCertVerificationError | CertificateError):
            return True
        seen.add(id(cause))
        todo += [cause.__cause__, cause.__context__, *cause.args]
    return False


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Http:
    """HTTP to a service: each exchange ends by a moment, and no answer has more than 1 MiB.

    urllib3's own limit is for each read, which a server that sends byte after byte never reaches.
    Nothing of the environment is used, and no redirect is followed. Thread-safe; one for each
    process.
    """

    def __init__(
        self,
        what: str,
        context: ssl.SSLContext,
        *,
        connect_timeout: float,
        read_timeout: float,
        proxy: str | None = None,
    ) -> None:
        """Prepare connections; none is opened yet.

        Args:
            what: The service, for error texts.
            context: For every https connection.
            connect_timeout: Seconds for each attempt to connect.
            read_timeout: Seconds for each wait for bytes.
            proxy: URL of the proxy for https, or None.
        """
        self._what = what
        self._limits = (connect_timeout, read_timeout)
        options: dict[str, Any] = {
            "maxsize": _CONNECTIONS,
            "ssl_context": context,
            "socket_options": [*HTTPConnection.default_socket_options, *_KEEP_ALIVE],
        }
        direct = PoolManager(**options)
        self._managers = {
            "http": direct,
            "https": direct if proxy is None else ProxyManager(proxy, **options),
        }
        self._pools: dict[tuple[str, ...], HTTPConnectionPool] = {}
        for manager in self._managers.values():
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def exchange(
        self, method: str, url: str, *, headers: Mapping[str, Any], body: bytes | None, until: float
    ) -> Answer:
        """Send one request and read the whole answer.

        Args:
            method: HTTP method.
            url: Where to.
            headers: The request's headers.
            body: Its body, or None.
            until: Moment on ``time.monotonic()``.

        Raises:
            SignerTimeout: The moment has passed, and nothing was sent.
            IntegrityError: The answer is too large.
            urllib3.exceptions.HTTPError: Any other failure.
        """
        left = until - time.monotonic()
        if left <= 0:
            raise no_time_left()
        connect, read = (min(limit, left) for limit in self._limits)
        parts = urlsplit(url)
        reset = _until.set(until)
        try:
            response = self._pool(parts).urlopen(
                method,
                f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}",
                body=body,
                headers=headers,
                redirect=False,
                retries=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=connect, read=read),
            )
            length = response.headers.get("Content-Length", "")
            # What is told counts for nothing where the body comes in chunks.
            told_length = length.isdecimal() and "Transfer-Encoding" not in response.headers
            bounded = told_length and int(length) <= _LARGEST_ANSWER
            # A read with a limit of its own takes much longer: for answers of no known length.
            told = response.read() if bounded else response.read(_LARGEST_ANSWER + 1)
            if len(told) > _LARGEST_ANSWER:
                response.close()
                raise IntegrityError(
                    f"{self._what} gave an answer of more than 1 MiB.",
                    hint=f"Something between this process and {self._what} alters answers.",
                )
            response.release_conn()
            return Answer(response.status, response.headers, told)
        finally:
            _until.reset(reset)

    def _pool(self, parts: SplitResult) -> HTTPConnectionPool:
        # Looking for it in the manager would take a twentieth of a call.
        pool = self._pools.get(parts[:2])
        if pool is None:
            url = f"{parts.scheme}://{parts.netloc}"
            pool = self._pools[parts[:2]] = self._managers[parts.scheme].connection_from_url(url)
        return pool

    def close(self) -> None:
        """Close the connections that are kept."""
        for manager in self._managers.values():
            manager.clear()


def tls_context(authorities: str | None) -> ssl.SSLContext:
    """A context that verifies; ``authorities`` is a PEM file, or None for the system's.

    Raises:
        OSError: The file cannot be read.
        ssl.SSLError: It holds no certificates.
    """
    # Not create_default_context(): it writes session keys to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(authorities)
    return context


# urllib3 passes nothing of ours on to a connection.
_until: ContextVar[float] = ContextVar("d1_signer_until")


class _Response(BoundedResponse):
    def reader(self, raw: io.RawIOBase, sock: socket.socket) -> io.RawIOBase:
        return BoundedReader(raw, sock, _until.get())


class _Connection(HTTPConnection):
    response_class = _Response  # type: ignore[mutable-override]
    _held: list[bytes] | None = None

    def request(self, *args: Any, **options: Any) -> None:
        # urllib3 sends head and body apart, which costs a tenth of a call.
        self._held = []
        try:
            super().request(*args, **options)
        finally:
            held, self._held = self._held, None
        self.send(b"".join(held))

    def send(self, data: Any) -> None:
        if self._held is None:
            super().send(data)
        else:
            self._held.append(data)

    def connect(self) -> None:
        with fork_gate.call(_until.get()):
            super().connect()

    def _new_conn(self) -> socket.socket:
        until = _until.get()
        # In a thread of its own, since a name is resolved in it; it is rare.
        sock = within(until, super()._new_conn)
        left = until - time.monotonic()
        if left <= 0:
            sock.close()
            raise no_time_left()
        # For the handshake, which Python bounds as a whole.
        sock.settimeout(min(left, sock.gettimeout() or left))
        return sock


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[mutable-override]


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection  # type: ignore[mutable-override]

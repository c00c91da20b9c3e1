# SPDX-License-Identifier: Apache-2.0
"""The one connection class: it ends by a moment, can be cut, and survives forks of the process.

requests and urllib3 have a limit for each read, which a server that drips bytes never reaches, and
no way to end a call from another thread.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
)

from d1_signer.signing.steps import Step
from d1_signer.transport.hosts import is_address, shown_address
from d1_signer.transport.names import addresses_of
from d1_signer.transport.processes import fork_gate
from d1_signer.transport.proxies import Proxy, request_for
from d1_signer.transport.reach import Place, place_of, reach
from d1_signer.transport.response import BoundedResponse, Handle, received
from d1_signer.transport.tls import Lent
from d1_signer.transport.verification import require_verified, require_verifying

# Bytes of a request that are kept together; a body that is streamed is sent as it comes.
_HELD = 1 << 16
_LONGEST_CONNECT = 60.0  # seconds, where a call has neither a moment by which it ends nor a limit
# Of Linux (RFC 1122 section 4.2.3.2 lets others wait for half a second).
_ACKNOWLEDGE: int | None = getattr(socket, "TCP_QUICKACK", None)

# A firewall forgets idle connections without a word; each one that it forgot would cost a time-out.
KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # Linux: after a minute, and not after two hours
    KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]
SOCKET_OPTIONS = [*HTTPConnection.default_socket_options, *KEEP_ALIVE]


@dataclass(frozen=True, slots=True)
class _Bounds:
    until: float
    cuts: int


# requests and urllib3 pass nothing of ours on to a connection.
_bounds: ContextVar[_Bounds | None] = ContextVar("d1_signer_bounds", default=None)


class Connections:
    """The connections of one adapter or client."""

    def __init__(
        self, *, proxy: Proxy | None = None, idle: float = math.inf, rest: float = 0.0
    ) -> None:
        """There is none yet.

        Args:
            proxy: Asked for a tunnel by those that are to use one.
            idle: Seconds without a call after which a connection is not used again.
            rest: Seconds that a connection rests between an answer and the next request, so that
                what a server sends behind an answer is seen before that.
        """
        self.proxy = proxy
        self.idle = idle
        self.rest = rest
        # Reentrant: a pool that is collected as garbage closes its connections in whatever thread
        # and line that happens.
        self.lock = threading.RLock()
        self.cuts = 0
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()

    @contextlib.contextmanager
    def bounded(self, deadline: float) -> Iterator[None]:
        """Bound the calls of this thread: their answers, heads and bodies, and by `cut`.

        Args:
            deadline: Moment on ``time.monotonic()``; then reading raises `TimeoutError`.
        """
        reset = _bounds.set(_Bounds(deadline, self.cuts))
        try:
            yield
        finally:
            _bounds.reset(reset)

    def cut(self) -> None:
        """End every call under way, those that are still connecting too."""
        with self.lock:
            self.cuts += 1
            for handle in list(self._handles):
                handle.cut()

    def handle(self, sock: socket.socket) -> Handle:
        """What a socket is cut by, until that is closed."""
        handle = Handle(self, sock)
        with self.lock:
            self._handles.add(handle)
        return handle

    def pools(self, socket_path: str | None = None) -> dict[str, type[HTTPConnectionPool]]:
        """Pool classes of urllib3 whose connections belong here.

        Args:
            socket_path: A Unix socket that connections without TLS go to; None: host and port.
        """

        class Response(_Response):
            owner = self

        class Connection(_Connection):
            owner = self
            unix_socket = socket_path
            response_class = Response  # type: ignore[mutable-override]

        class TlsConnection(_TlsConnection):
            owner = self
            response_class = Response  # type: ignore[mutable-override]

        class Pool(_Pool):
            ConnectionCls = Connection  # type: ignore[mutable-override]

        class TlsPool(_Pool, HTTPSConnectionPool):
            ConnectionCls = TlsConnection  # type: ignore[mutable-override]

        return {"http": Pool, "https": TlsPool}


class _Response(BoundedResponse):
    owner: Connections

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        bounds = _bounds.get()
        super().__init__(sock, *args, until=None if bounds is None else bounds.until, **options)

    def begin(self) -> None:
        super().begin()
        # Then http.client closes the connection, and with it what that is cut by, before the body
        # is read.
        if self.will_close and not self.reader.closed:
            self.reader.held = self.owner.handle(self._sock)

    def _close_conn(self) -> None:
        super()._close_conn()
        # A server may hold back what it has still to say until its answer is acknowledged, which
        # would be with the next request.
        if self.owner.rest and _ACKNOWLEDGE is not None:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, _ACKNOWLEDGE, 1)


class _Pool(HTTPConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if isinstance(conn, _Connection):
            conn.rests_since = (time.monotonic(), time.time())
        super()._put_conn(conn)


class _Connection(HTTPConnection):
    owner: Connections
    rests_since = (math.inf, math.inf)
    unix_socket: str | None = None
    _began = 0
    _handle: Handle | None = None
    _held: bytearray | None = None
    _asked = False
    debuglevel = 0  # else whoever sets it on http.client's class prints assertions and tokens

    @property
    def is_connected(self) -> bool:
        """Whether it can be used again; see urllib3."""
        # The wall clock as well: the other one stands still in a machine that is suspended.
        since, wall = self.rests_since
        if max(time.monotonic() - since, time.time() - wall) >= self.owner.idle:
            return False
        # urllib3 sees neither what TLS has read already nor an answer that nobody read to its end.
        answer: BoundedResponse | None = getattr(self, "_HTTPConnection__response", None)
        if self.sock is None or (answer is not None and not answer.isclosed()):
            return False
        ended_at = answer.ended_at if answer is not None else 0.0
        rest = max(0.0, ended_at + self.owner.rest - time.monotonic())
        try:
            return received(self.sock, within=rest) is None
        except (OSError, ValueError):
            return False

    def _have_quiet(self) -> None:
        """Have a connection that is at its beginning, or as its last answer left it.

        What came before a request is no answer to it (RFC 9112 section 9.2).
        """
        # Once more, for what came since the pool looked; key services' answers are verified anyway.
        if self._asked and self.owner.rest and self.sock is not None and not self.is_connected:
            self._close_for_another()
        if self.sock is None:
            self.connect()
        came = None
        if not self._asked:
            # One that has closed shows when it is written to.
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                came = received(self.sock)
        if came:
            raise ConnectionAbortedError(errno.ECONNABORTED, "it answered before it was asked")
        self._asked = True

    def _close_for_another(self) -> None:
        # urllib3 forgets the tunnel with the connection.
        host, port, scheme = self._tunnel_host, self._tunnel_port, self._tunnel_scheme
        headers: dict[str, str] = dict(self._tunnel_headers)  # type: ignore[attr-defined]
        self.close()
        if host is not None:
            self.set_tunnel(host, port, headers, scheme or "http")

    def request(self, *args: Any, **options: Any) -> None:
        self._have_quiet()
        # urllib3 sends head and body apart, which costs a tenth of a call. What is streamed goes as
        # it comes.
        body = options.get("body", args[2] if len(args) > 2 else None)  # noqa: PLR2004
        self._held = bytearray() if isinstance(body, bytes | str | None) else None
        try:
            super().request(*args, **options)
            self._send_held()
        finally:
            self._held = None

    def send(self, data: Any) -> None:
        if self._held is None:
            self._send(data)
            return
        if isinstance(data, bytes):
            self._held += data
            if len(self._held) >= _HELD:
                self._send_held()
        else:
            self._send_held()
            self._send(data)

    def _send(self, data: Any) -> None:
        try:
            super().send(data)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # Then urllib3 reads on: what the server said before it left is there to be read, an
            # answer or the alert by which TLS 1.3 refuses a client certificate.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None

    def _send_held(self) -> None:
        if self._held:
            held = bytes(self._held)
            self._held.clear()
            self._send(held)

    def connect(self) -> None:
        bounds = _bounds.get()
        self.rests_since = (math.inf, math.inf)
        self._began = self.owner.cuts if bounds is None else bounds.cuts
        self._asked = False
        self._let_go()
        with contextlib.ExitStack() as gate:
            try:
                gate.enter_context(fork_gate.call(self._until()))
            except TimeoutError:
                raise self._out_of_time() from None
            with Step(f"a connection to {shown_address(self.host, self.port)}") as step:
                super().connect()
                step.facts |= self._facts()

    def _facts(self) -> dict[str, object]:
        """What stands at the other end, and how it is spoken to; in detail only."""
        facts: dict[str, object] = {}
        with contextlib.suppress(OSError):
            facts["peer"] = self.sock.getpeername()
        if isinstance(self.sock, ssl.SSLSocket):
            suite = self.sock.cipher()
            facts |= {"tls": self.sock.version(), "cipher": suite and suite[0]}
        return facts

    def _until(self) -> float:
        bounds = _bounds.get()
        if bounds is not None:
            return bounds.until
        return time.monotonic() + self._limit()

    def _limit(self) -> float:
        return self.timeout if isinstance(self.timeout, int | float) else _LONGEST_CONNECT

    def _out_of_time(self) -> ConnectTimeoutError:
        return ConnectTimeoutError(self, f"no connection to {self.host} in time")

    def _new_conn(self) -> socket.socket:
        bounds = _bounds.get()
        places = self._places()
        try:
            return reach(
                places,
                limit=self._limit(),
                until=None if bounds is None else bounds.until,
                options=self.socket_options or (),
                claim=self._claim,
            )
        except OSError as error:
            self._require_not_cut()
            if isinstance(error, TimeoutError):
                raise self._out_of_time() from None
            raise NewConnectionError(self, f"no connection to {self.host}: {error}") from error

    def _places(self) -> list[Place]:
        if self.unix_socket is not None:
            return [(socket.AF_UNIX, self.unix_socket)]
        name = self._dns_host.strip("[]")
        if is_address(name):
            return [place_of(name, self.port)]
        try:
            found = addresses_of(
                name, self.port, min(self._until(), time.monotonic() + self._limit())
            )
        except TimeoutError:
            raise self._out_of_time() from None
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        return [place_of(address, self.port) for address in found]

    def _claim(self, sock: socket.socket) -> None:
        self._let_go()
        self._handle = self.owner.handle(sock)
        self._require_not_cut()

    def _require_not_cut(self) -> None:
        if self.owner.cuts != self._began:
            raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


class _TlsConnection(_Connection, HTTPSConnection):
    def connect(self) -> None:
        # At each handshake: a caller may have weakened its context since it gave it.
        context = self.ssl_context
        require_verifying(context)
        try:
            self.ssl_context = Lent(context)  # type: ignore[arg-type, assignment]
            super().connect()
        except (ConnectionResetError, BrokenPipeError) as error:
            # What comes before has errors of urllib3.
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "closed amid the handshake") from error
        finally:
            self.ssl_context = context
        try:
            require_verified(self.sock, self._tunnel_host or self.host)
        except BaseException:
            self.close()
            raise

    def _tunnel(self) -> None:
        # Instead of http.client's, which has the credentials in its frames, prints them when it is
        # told to debug, and forgets what the proxy says beside the status.
        target = shown_address(str(self._tunnel_host), int(self._tunnel_port or 443))
        proxy = self.owner.proxy
        if proxy is None:  # pragma: no cover (whoever sets a tunnel gives the proxy)
            raise ProxyError("no tunnel", ValueError("no proxy is set"))
        try:
            with proxy.asking(target, self._until()) as credentials:
                self.sock.sendall(request_for(target, credentials))
                answer = self.response_class(self.sock, method="CONNECT")
                with contextlib.closing(answer):
                    answer.begin()
                    proxy.answered(target, credentials, answer.status, answer.headers)
        except (OSError, HTTPException) as error:
            raise ProxyError("no tunnel", error) from error

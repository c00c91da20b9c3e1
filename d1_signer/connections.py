# SPDX-License-Identifier: Apache-2.0
"""HTTP connections that can be cut at any moment, and whose answers end by a moment.

requests and urllib3 have a limit for each read, which a server that drips bytes never reaches, and
no way to end a call from another thread.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from d1_signer.bounded_response import BoundedReader, BoundedResponse


@dataclass(frozen=True, slots=True)
class _Bounds:
    until: float
    cuts: int
    owner: Connections


# requests passes nothing of ours on to a connection.
_bounds: ContextVar[_Bounds | None] = ContextVar("d1_signer_bounds", default=None)


class Connections:
    """The connections of one adapter."""

    def __init__(self, check: Callable[[ssl.SSLContext | None], None]) -> None:
        """There is none yet.

        Args:
            check: Called with the TLS context before each handshake; raises to refuse it.
        """
        self.check = check
        # Reentrant: a pool that is collected as garbage closes its connections in whatever thread
        # and line that happens.
        self.lock = threading.RLock()
        self.cuts = 0
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()

    @contextlib.contextmanager
    def bounded(self, deadline: float) -> Iterator[None]:
        """Bound the calls of this thread: their answers, heads and bodies, and by `cut`.

        Args:
            deadline: Moment on ``time.monotonic()``; then reading raises `TimeoutError`.
        """
        reset = _bounds.set(_Bounds(deadline, self.cuts, self))
        try:
            yield
        finally:
            _bounds.reset(reset)

    def cut(self) -> None:
        """End every call under way; one that is still connecting ends before it sends anything."""
        with self.lock:
            self.cuts += 1
            for handle in list(self._handles):
                handle.cut()

    def handle(self, sock: socket.socket) -> _Handle:
        """What a socket is cut by, until that is closed."""
        handle = _Handle(self, sock)
        with self.lock:
            self._handles.add(handle)
        return handle

    def pools(self) -> dict[str, type[HTTPConnectionPool]]:
        """Pool classes of urllib3 whose connections belong here."""

        class Connection(_Tracked):
            owner = self

        class TlsConnection(_Tracked, HTTPSConnection):
            owner = self

            def connect(self) -> None:
                self.owner.check(self.ssl_context)
                super().connect()

        class Pool(HTTPConnectionPool):
            ConnectionCls = Connection  # type: ignore[mutable-override]

        class TlsPool(HTTPSConnectionPool):
            ConnectionCls = TlsConnection  # type: ignore[mutable-override]

        return {"http": Pool, "https": TlsPool}


class _Handle:
    """A descriptor of its own for a socket.

    It serves from before the handshake on; and cutting it touches no state of the TLS object that
    another thread works with, which would make that thread send the rest in clear text.
    """

    def __init__(self, owner: Connections, sock: socket.socket) -> None:
        self._owner = owner
        # Not dup(), which a TLS socket refuses.
        self._sock = socket.fromfd(sock.fileno(), sock.family, sock.type)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._owner.lock:  # or a cut could meet the next descriptor of that number
            self._sock.close()


class _Response(BoundedResponse):
    def reader(self, raw: io.RawIOBase, sock: socket.socket) -> io.RawIOBase:
        bounds = _bounds.get()
        return raw if bounds is None else _Reader(raw, sock, bounds)


class _Reader(BoundedReader):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, bounds: _Bounds) -> None:
        super().__init__(raw, sock, bounds.until)
        # http.client closes a connection once it has read a head that says so, body or not.
        self._handle = bounds.owner.handle(sock)

    def close(self) -> None:
        super().close()
        self._handle.close()


class _Tracked(HTTPConnection):
    owner: Connections
    response_class = _Response  # type: ignore[mutable-override]
    _began = 0
    _handle: _Handle | None = None

    def connect(self) -> None:
        bounds = _bounds.get()
        self._began = self.owner.cuts if bounds is None else bounds.cuts
        self._let_go()
        super().connect()

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        try:
            self._handle = self.owner.handle(sock)
            if self.owner.cuts != self._began:
                raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

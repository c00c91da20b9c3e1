# SPDX-License-Identifier: Apache-2.0
"""HTTP connections that can be cut at any moment, and whose answers end by a moment.

requests and urllib3 have a limit for each read, which a server that drips bytes never reaches, and
no way to end a call from another thread.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import logging
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_log = logging.getLogger("d1_signer.tls")


@dataclass(frozen=True, slots=True)
class _Bounds:
    until: float
    cuts: int


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
        self._open: weakref.WeakSet[_Tracked] = weakref.WeakSet()

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
        """End every call under way; one that is still connecting ends before it sends anything."""
        with self.lock:
            self.cuts += 1
            for connection in list(self._open):
                connection.cut()

    def add(self, connection: _Tracked) -> None:
        """Take a connection in; the lock is held."""
        self._open.add(connection)

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


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        bounds = _bounds.get()
        if bounds is not None:
            raw = self.fp.detach()
            self.fp = io.BufferedReader(_Timed(raw, sock, bounds.until))

    def begin(self) -> None:
        super().begin()
        # urllib3 logs header lines that it cannot read, and a server may echo a token in them.
        unread = self.msg.get_payload()
        if self.msg.defects or (isinstance(unread, str) and unread):
            _log.warning("tls.malformed_headers an answer has header lines that cannot be read")
            self.msg.defects.clear()
            self.msg.set_payload("")


class _Timed(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._until = until
        self._limit = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left if self._limit is None else min(left, self._limit))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Tracked(HTTPConnection):
    owner: Connections
    response_class = _Answer  # type: ignore[mutable-override]
    _began = 0
    # A descriptor of its own for the socket: it serves from before the handshake on, and cutting
    # it touches no state of the TLS object that another thread works with, which would make that
    # thread send the rest in clear text.
    _handle: socket.socket | None = None

    def connect(self) -> None:
        bounds = _bounds.get()
        self._began = self.owner.cuts if bounds is None else bounds.cuts
        self._let_go()
        super().connect()

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        try:
            with self.owner.lock:
                if self.owner.cuts != self._began:
                    raise _cut()
                self._handle = sock.dup()
                self.owner.add(self)
        except OSError:
            sock.close()
            raise
        return sock

    def cut(self) -> None:
        """End the call under way; the lock is held."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        with self.owner.lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


def _cut() -> OSError:
    return ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))

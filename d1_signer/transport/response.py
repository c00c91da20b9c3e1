# SPDX-License-Identifier: Apache-2.0
"""HTTP responses that end by a moment and where their answer ends, and whose lines nobody logs.

http.client and urllib3 have a limit for each read, which a server that drips bytes never reaches;
and they read on after an answer whose end is doubtful, so that the next call would get the rest.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import re
import socket
import ssl
import threading
import time
from email.errors import MultipartInvariantViolationDefect, StartBoundaryNotFoundDefect
from typing import TYPE_CHECKING, Any, Protocol

from d1_signer.transport.chunks import Chunks, FramingError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_log = logging.getLogger("d1_signer.tls")

# Of a head that is read without its body; urllib3 does not count them either.
_OF_MULTIPART = (StartBoundaryNotFoundDefect, MultipartInvariantViolationDefect)
# What http.client raises for a head beyond its limits: 64 KiB a line, 100 header lines.
_OF_ITS_SIZE = (http.client.LineTooLong, http.client.HTTPException)
# Informational answers before one final; some proxies send a few, and no end of them is an attack.
_MOST_INFORMATIONAL = 64
_SWITCHING_PROTOCOLS = 101
_WITHOUT_BODY = frozenset({_SWITCHING_PROTOCOLS, 204, 304})
_LENGTH = re.compile(r"[0-9]{1,15}", re.ASCII)


class BoundedResponse(http.client.HTTPResponse):
    """A response that is read until a moment; a ``response_class`` of http.client.

    Where it is not certain that the answer has ended, and that nothing follows it, the connection
    ends with it: whoever takes it for another request finds it closed.

    Attributes:
        ended_at: When that was, on ``time.monotonic()``.
    """

    def __init__(
        self, sock: socket.socket, *args: Any, until: float | None, **options: Any
    ) -> None:
        """Read from ``sock`` until ``until`` on ``time.monotonic()``, or without a limit for all.

        The other arguments are those of `http.client.HTTPResponse`.
        """
        super().__init__(sock, *args, **options)
        self._method: str | None
        self._sock = sock
        self.reader = BoundedReader(self.fp.detach(), sock, until)
        self._wire = self.fp = _Wire(self.reader)
        self._chunks: Chunks | None = None
        self.ended_at = 0.0

    def _read_status(self) -> tuple[str, int, str]:
        # http.client takes each informational answer but 100 for the final one, which would then be
        # left for the next request (RFC 9110 section 15.2).
        for _ in range(_MOST_INFORMATIONAL):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status >= 200 or status == _SWITCHING_PROTOCOLS:  # noqa: PLR2004
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise FramingError(f"more than {_MOST_INFORMATIONAL} informational answers")

    def begin(self) -> None:
        """Read the head; see `http.client.HTTPResponse`."""
        try:
            super().begin()
        except http.client.HTTPException as error:
            if type(error) in _OF_ITS_SIZE:
                raise FramingError("its head has a line that is too long, or too many") from None
            raise
        if not self._wire.last_line:
            # To http.client that is the end of the head as well.
            raise http.client.RemoteDisconnected("closed amid the head of an answer")
        # urllib3 logs header lines that it cannot read, and a server may echo a token in them.
        # The parser takes what follows such a line for a body, and notes a defect.
        if any(not isinstance(defect, _OF_MULTIPART) for defect in self.msg.defects):
            _log.warning("tls.malformed_headers an answer has header lines that cannot be read")
            self.msg.defects.clear()
            self.msg.set_payload("")
            self.will_close = True  # one of those lines may say where the answer ends
        self._find_end()

    def _find_end(self) -> None:
        """Know where the body ends (RFC 9112 section 6.3), or let nobody read it."""
        codings = [value.strip().lower() for value in self.msg.get_all("transfer-encoding", [])]
        told = self.msg.get_all("content-length", [])
        lengths = {part.strip() for value in told for part in value.split(",")}
        closing = any("close" in value.lower() for value in self.msg.get_all("connection", []))
        one_length = len(lengths) == 1 and all(map(_LENGTH.fullmatch, lengths))
        tunnel = self._method == "CONNECT" and 200 <= self.status < 300  # noqa: PLR2004
        if tunnel or self._method == "HEAD" or self.status in _WITHOUT_BODY:
            self.chunked, self.length = False, 0
            self._forget_framing(but_length=one_length)
            closing = closing or self.status == _SWITCHING_PROTOCOLS
        elif codings and (lengths or codings != ["chunked"]):
            self._refuse_body("its length is told in two ways, or in one that nobody asked for")
        elif codings:
            self._chunks = Chunks(self._wire)
            self.fp = io.BufferedReader(self._chunks)
            closing = closing or self.version == 10  # noqa: PLR2004 (knows no chunks)
        elif lengths and not one_length:
            self._refuse_body("it tells contradictory lengths, or none that is a number")
        elif lengths:
            self.length = int(lengths.pop())
        self.will_close = self.will_close or closing

    def _forget_framing(self, *, but_length: bool = False) -> None:
        # urllib3 reads these once more, and in its own way.
        del self.msg["transfer-encoding"]
        if not but_length:
            del self.msg["content-length"]

    def _refuse_body(self, reason: str) -> None:
        self._forget_framing()
        self.chunked, self.length, self.will_close = False, None, True
        self.fp = io.BufferedReader(_Refused(self._wire, reason))

    def _close_conn(self) -> None:
        # Called at the end of the answer, or where whoever reads it gives up.
        if not self.will_close and not self._is_whole():
            with contextlib.suppress(OSError):
                # Not the TLS object's own, which would go on in clear text after it.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self.ended_at = time.monotonic()
        super()._close_conn()  # type: ignore[misc]

    def _is_whole(self) -> bool:
        """Whether the answer has ended, and nothing came behind it so far."""
        whole = self.length == 0 if self._chunks is None else self._chunks.over
        self.reader.stopped = True
        return whole and not self._wire.peek(1)

    def end_by(self, moment: float) -> None:
        """Read until an earlier moment than was said."""
        self.reader.until = min(moment, self.reader.until or moment)


class _Wire(io.BufferedReader):
    last_line = b""

    def readline(self, size: int | None = -1, /) -> bytes:
        self.last_line = super().readline(size)
        return self.last_line


class Locked(Protocol):
    """Who has the lock."""

    lock: threading.RLock


class Handle:
    """A descriptor of its own for a socket.

    It serves from before the handshake on; and cutting it touches no state of the TLS object that
    another thread works with, which would make that thread send the rest in clear text.
    """

    def __init__(self, owner: Locked, sock: socket.socket) -> None:
        """Take it; cuts are made under the owner's lock, which is another one after a fork."""
        self._owner = owner
        # Not dup(), which a TLS socket refuses.
        self._sock = socket.fromfd(sock.fileno(), sock.family, sock.type)

    def cut(self) -> None:
        """End what is under way on the socket."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back."""
        with self._owner.lock:  # or a cut could meet the next descriptor of that number
            self._sock.close()


class Closable(Protocol):
    """What is closed with a reader."""

    def close(self) -> None:
        """Close it."""


class BoundedReader(io.RawIOBase):
    """What a socket receives, until a moment.

    Attributes:
        until: On ``time.monotonic()``; None: only the socket's own limit counts.
        stopped: Nothing is received any more.
        held: Closed with it, where it is not None.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float | None) -> None:
        """Read from ``raw``, whose socket is ``sock``, until ``until``."""
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._limit = sock.gettimeout()
        self.until = until
        self.stopped = False
        self.held: Closable | None = None

    def readable(self) -> bool:
        """It is; see `io.RawIOBase`."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        """Receive; see `io.RawIOBase`.

        Raises:
            TimeoutError: The moment, or the socket's own limit, has passed.
        """
        if self.stopped:
            return 0
        if self.until is not None:
            left = self.until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if self._limit is None or left < self._limit:  # else it is set: each costs a call
                self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close it; see `io.RawIOBase`."""
        self._raw.close()
        if self.held is not None:
            self.held.close()
        super().close()


class _Refused(io.RawIOBase):
    """A body that nobody can read, for nobody knows where it ends."""

    def __init__(self, wire: io.BufferedReader, reason: str) -> None:
        super().__init__()
        self._wire = wire
        self._reason = reason

    def readable(self) -> bool:
        return True

    def readinto(self, _: WriteableBuffer) -> int:
        raise FramingError(self._reason)

    def close(self) -> None:
        self._wire.close()
        super().close()


def received(sock: socket.socket, *, within: float = 0.0) -> bytes | None:
    """What comes on a connection on which nothing was asked; None for nothing.

    TLS messages that are not data, such as tickets, are taken and count for nothing.

    Args:
        sock: The connection.
        within: Seconds to wait for it.

    Returns:
        The first byte, or no bytes where the other side has left.

    Raises:
        OSError: The connection is broken; for a TLS alert an `ssl.SSLError`.
    """
    limit = sock.gettimeout()
    sock.settimeout(within)
    try:
        return sock.recv(1)
    except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
        return None
    finally:
        sock.settimeout(limit)

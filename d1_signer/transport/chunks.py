# SPDX-License-Identifier: Apache-2.0
"""Strict reading of a chunked body (RFC 9112 section 7.1): where it ends, and that it does."""

from __future__ import annotations

import http.client
import io
import re
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LONGEST_LINE = 8192
_MOST_TRAILERS = 100
# With what Python's int() would take as well, a sign or "0x", others see another length.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r\n")


class FramingError(http.client.HTTPException):
    """An answer does not say, or says in two ways, where it ends."""


class _Next(Enum):
    SIZE = auto()
    END_OF_CHUNK = auto()
    TRAILER = auto()


class Chunks(io.RawIOBase):
    """A chunked body as it came, for http.client and urllib3 to decode; and nothing behind it.

    Attributes:
        over: Whether its last line was read.
    """

    def __init__(self, wire: io.BufferedReader) -> None:
        """Read from ``wire``, which is closed with it."""
        super().__init__()
        self.over = False
        self._wire = wire
        self._next = _Next.SIZE
        self._line = b""
        self._left = 0
        self._trailers = 0

    def readable(self) -> bool:
        """It is; see `io.RawIOBase`."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read a line of the framing, or some of a chunk; see `io.RawIOBase`.

        Raises:
            FramingError: It is not chunked as it should be.
            http.client.IncompleteRead: It is cut.
        """
        view = memoryview(buffer)
        if not self._line and not self._left and not self.over:
            self._line = self._next_line()
        if self._line or self.over:
            count = min(len(view), len(self._line))
            view[:count] = self._line[:count]
            self._line = self._line[count:]
            return count
        count = self._wire.readinto1(view[: self._left])
        if not count:
            raise http.client.IncompleteRead(b"", self._left)
        self._left -= count
        return count

    def _next_line(self) -> bytes:
        line = self._wire.readline(_LONGEST_LINE)
        if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            raise http.client.IncompleteRead(b"")
        if not line.endswith(b"\r\n"):
            raise FramingError("a line of its chunks has no end")
        if self._next is _Next.SIZE:
            size = _SIZE.fullmatch(line)
            if size is None:
                raise FramingError("the size of a chunk is not a number")
            self._left = int(size[1], 16)
            self._next = _Next.END_OF_CHUNK if self._left else _Next.TRAILER
        elif self._next is _Next.END_OF_CHUNK:
            if line != b"\r\n":
                raise FramingError("a chunk is longer than its size")
            self._next = _Next.SIZE
        else:
            self._trailers += 1
            if self._trailers > _MOST_TRAILERS:
                raise FramingError("its trailer has no end")
            self.over = line == b"\r\n"
        return line

    def close(self) -> None:
        """Close it; see `io.RawIOBase`."""
        self._wire.close()
        super().close()

# SPDX-License-Identifier: Apache-2.0
"""HTTP responses that end by a moment, and whose header lines nobody logs.

http.client and urllib3 have a limit for each read, which a server that drips bytes never reaches.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import time
from email.errors import MultipartInvariantViolationDefect, StartBoundaryNotFoundDefect
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_log = logging.getLogger("d1_signer.tls")

# Of a head that is read without its body; urllib3 does not count them either.
_OF_MULTIPART = (StartBoundaryNotFoundDefect, MultipartInvariantViolationDefect)


class BoundedResponse(http.client.HTTPResponse):
    """A response that is read until a moment; a ``response_class`` of http.client."""

    def __init__(
        self, sock: socket.socket, *args: Any, until: float | None, **options: Any
    ) -> None:
        """Read from ``sock`` until ``until`` on ``time.monotonic()``, or without a limit for all.

        The other arguments are those of `http.client.HTTPResponse`.
        """
        super().__init__(sock, *args, **options)
        self.reader = None if until is None else BoundedReader(self.fp.detach(), sock, until)
        if self.reader is not None:
            self.fp = io.BufferedReader(self.reader)

    def begin(self) -> None:
        """Read the head; see `http.client.HTTPResponse`."""
        super().begin()
        # urllib3 logs header lines that it cannot read, and a server may echo a token in them.
        # The parser takes what follows such a line for a body, and notes a defect.
        if any(not isinstance(defect, _OF_MULTIPART) for defect in self.msg.defects):
            _log.warning("tls.malformed_headers an answer has header lines that cannot be read")
            self.msg.defects.clear()
            self.msg.set_payload("")


class Closable(Protocol):
    """What is closed with a reader."""

    def close(self) -> None:
        """Close it."""


class BoundedReader(io.RawIOBase):
    """What a socket receives, until a moment.

    Attributes:
        held: Closed with it, where it is not None.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        """Read from ``raw``, whose socket is ``sock``, until ``until`` on ``time.monotonic()``."""
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._until = until
        self._limit = sock.gettimeout()
        self.held: Closable | None = None

    def readable(self) -> bool:
        """It is; see `io.RawIOBase`."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        """Receive; see `io.RawIOBase`.

        Raises:
            TimeoutError: The moment, or the socket's own limit, has passed.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._limit is None or left < self._limit:  # else it is set: each costs a system call
            self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close it; see `io.RawIOBase`."""
        self._raw.close()
        if self.held is not None:
            self.held.close()
        super().close()

# SPDX-License-Identifier: Apache-2.0
"""What parent and host process say to each other: frames of a kind, a length and a body.

JSON and bytes, no pickle: what a vendor's library could do to its own process must not reach the
parent through the answer.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from d1_signer import errors
from d1_signer.errors import D1SignerError, SignerError

OPEN, GENERATE, SIGN, CUSTODY, DONE, FAILED = b"O", b"G", b"S", b"C", b"D", b"F"
# Of a host process while it opens: it will send the PIN, the token took it; each is sent back.
LOGIN, ACCEPTED = b"L", b"A"

_HEAD = struct.Struct("!cI")
_LONGEST = 1 << 20


class Gone(Exception):
    """The other side has closed, or does not keep to the protocol."""


def send(connection: socket.socket, kind: bytes, body: bytes) -> None:
    """Send a frame.

    Raises:
        Gone: The other side is not there any more.
        TimeoutError: The connection's time limit has passed.
    """
    try:
        connection.sendall(_HEAD.pack(kind, len(body)) + body)
    except TimeoutError:
        raise
    except OSError:
        raise Gone from None


def receive(connection: socket.socket, deadline: float | None = None) -> tuple[bytes, bytes]:
    """Receive a frame: its kind and its body.

    Args:
        connection: With a time limit that ends at the deadline.
        deadline: On ``time.monotonic()``, for a frame that comes in pieces; None: none.

    Raises:
        Gone: The other side is not there any more.
        TimeoutError: The connection's time limit has passed.
    """
    data = _some(connection)
    while len(data) < _HEAD.size:
        data += _more(connection, deadline)
    kind, length = _HEAD.unpack_from(data)
    if length > _LONGEST:
        raise Gone
    while len(data) < _HEAD.size + length:
        data += _more(connection, deadline)
    return kind, data[_HEAD.size :]


def _more(connection: socket.socket, deadline: float | None) -> bytes:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
    return _some(connection)


def _some(connection: socket.socket) -> bytes:
    try:
        data = connection.recv(65536)
    except TimeoutError:
        raise
    except OSError:
        raise Gone from None
    if not data:
        raise Gone
    return data


def encoded_error(error: D1SignerError, **more: Any) -> bytes:
    """An error as a body; ``more`` travels beside it."""
    return json.dumps({"error": error.to_dict(), **more}).encode()


def decoded_error(body: bytes) -> tuple[D1SignerError, dict[str, Any]]:
    """The error in a body, as the class that its code names, and what travelled beside it.

    Raises:
        Gone: It is no such body.
    """
    try:
        document = json.loads(body)
        told = document.pop("error")
        kind = _kinds().get(told["code"], SignerError)
        message, hint, details = str(told["message"]), str(told["hint"]), dict(told["details"])
        error = kind(message, hint=hint, retryable=told["retryable"] is True, details=details)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Gone from None
    return error, document


def _kinds() -> dict[str, type[D1SignerError]]:
    def below(kind: type[D1SignerError]) -> Iterator[type[D1SignerError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    known = [errors.SignerError, errors.ConfigurationError, errors.InvalidInputError]
    return {kind.code: kind for root in known for kind in below(root)}

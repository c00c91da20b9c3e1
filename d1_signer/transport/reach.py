# SPDX-License-Identifier: Apache-2.0
"""A socket to the first of several addresses that takes the connection, within a moment."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Place = tuple[socket.AddressFamily, Any]
"""An address family, and an address of it as `socket.socket.connect` takes it."""

_SHARE = 2.0  # seconds that a place gets, if they are left: a lost SYN is sent again after one

_LEAST = 0.001  # seconds; zero would be a socket that does not block


def place_of(address: str, port: int) -> Place:
    """An IP address, without brackets, and a port."""
    return (socket.AF_INET6 if ":" in address else socket.AF_INET), (address, port)


def reach(
    places: Sequence[Place],
    *,
    limit: float,
    until: float | None,
    options: Iterable[tuple[int, int, int | bytes]],
    claim: Callable[[socket.socket], None],
) -> socket.socket:
    """Connect to the first place that takes it.

    Args:
        places: In the order in which they are tried.
        limit: Seconds for each.
        until: Moment on ``time.monotonic()`` for all of them; None: each has its limit.
        options: Set on each socket of TCP.
        claim: Called with each socket before it connects, so that another thread can end it; what
            it raises ends the whole.

    Returns:
        A socket with the seconds that are left, ``limit`` at most, as its time limit.

    Raises:
        TimeoutError: None answered in time.
        OSError: The last one's failure.
    """
    failure: OSError = TimeoutError("no time is left")
    for number, (family, address) in enumerate(places):
        seconds = limit
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                break
            # One that does not answer leaves some of the time to those behind it.
            share = max(left / (len(places) - number), min(_SHARE, left / 2))
            seconds = min(limit, left, share)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            claim(sock)
            for option in options if family != socket.AF_UNIX else ():
                sock.setsockopt(*option)
            sock.settimeout(seconds)
            try:
                sock.connect(address)
            except OSError as error:
                failure = error
                sock.close()
                continue
            left = limit if until is None else max(_LEAST, until - time.monotonic())
            sock.settimeout(min(left, limit))
        except BaseException:
            sock.close()
            raise
        return sock
    raise failure

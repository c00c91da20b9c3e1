# SPDX-License-Identifier: Apache-2.0
"""The time of a record: UTC by the system's clock, and what the system says of that clock."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable

_STATE_LASTS = 1.0  # seconds
_TIMEX_BYTES = 208  # of a struct timex on Linux
_STA_UNSYNC = 0x0040
_STATUS_OFFSET = 5 * ctypes.sizeof(ctypes.c_long)  # of its member `status`
_TIME_ERROR = 5

_state: tuple[float, str | None] = (float("-inf"), None)


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def text(moment: int) -> str:
    """A moment as in RFC 3339, in UTC and with six digits behind the point."""
    seconds, rest = divmod(moment, 1_000_000)
    return f"{_second(seconds)}{rest:06d}Z"


@functools.lru_cache(4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))


def clock_state() -> str | None:
    """``"synchronized"``, ``"unsynchronized"``, or None where the system does not tell.

    It is what the kernel knows of who sets the clock (adjtimex(2)); asked once a second at most.
    """
    global _state  # noqa: PLW0603 (one clock for all)
    asked, state = _state
    moment = time.monotonic()
    if moment - asked > _STATE_LASTS:
        state = _asked()
        _state = (moment, state)
    return state


def _asked() -> str | None:
    adjtimex = _adjtimex()
    if adjtimex is None:
        return None
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # all zero: it asks and changes nothing
    answer = adjtimex(buffer)
    if answer < 0:  # a sandbox may forbid it
        return None
    status = ctypes.c_int.from_buffer(buffer, _STATUS_OFFSET).value
    unsynchronized = answer == _TIME_ERROR or status & _STA_UNSYNC
    return "unsynchronized" if unsynchronized else "synchronized"


@functools.cache
def _adjtimex() -> Callable[[object], int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):  # no such call elsewhere
        return None
    found.argtypes = [ctypes.c_char_p]
    found.restype = ctypes.c_int
    return found

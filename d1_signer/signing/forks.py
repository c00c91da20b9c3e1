# SPDX-License-Identifier: Apache-2.0
"""What a child of a fork forgets of its parent, even if Python was not told of the fork.

uWSGI forks in C and tells Python afterwards, in the child alone; a library may tell nobody. So
whatever is called from outside asks first, before it touches a lock or a queue of the parent's.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

_forget: list[Callable[[], None]] = []
_first = _pid = os.getpid()
_noticing: dict[int, threading.Lock] = {}  # each process has its own: the parent's may be held


def in_child(forget: Callable[[], None]) -> None:
    """Have something done in every child, once."""
    _forget.append(forget)


def is_child() -> bool:
    """Whether this process was forked after this was loaded."""
    return os.getpid() != _first


def notice() -> None:
    """Do it now if this is a child where nobody has."""
    pid = os.getpid()
    if pid != _pid:
        with _noticing.setdefault(pid, threading.Lock()):
            if pid != _pid:
                # As Python does where it is told; or the pauses of all children are alike. What is
                # not loaded has no state, and loading takes a lock that the parent may have held.
                if "random" in sys.modules:
                    sys.modules["random"].seed()
                _begin_in_child()


def _begin_in_child() -> None:
    global _pid  # noqa: PLW0603 (of the process)
    for forget in _forget:
        forget()
    _pid = os.getpid()


os.register_at_fork(after_in_child=_begin_in_child)

# SPDX-License-Identifier: Apache-2.0
"""Forks: an object for each process, and the gate that calls pass which no fork may meet."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from d1_signer.signing import forks

T = TypeVar("T")


class PerProcess(Generic[T]):
    """An object that each process makes for itself, when it first needs it.

    What a child inherits over a fork is neither used nor cleaned up there: its connections belong
    to the parent, and its threads do not exist.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Keep ``make``, which is called once in each process, by one thread at a time."""
        self._make = make
        # One lock for each: a caller's function may use another signer of ours, and one service
        # that hangs must not hold up the others.
        self._lock = threading.RLock()
        self._made: tuple[int, T] | None = None
        self._inherited: list[T] = []
        _all.add(self)

    def get(self) -> T:
        """The object of this process."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        forks.notice()
        with self._lock:
            made = self._made
            if made is not None and made[0] == os.getpid():
                return made[1]
            value = self._make()
            if made is not None:
                self._inherited.append(made[1])
            self._made = (os.getpid(), value)
            return value

    def made_here(self) -> T | None:
        """The object of this process, or None where it was not made yet."""
        made = self._made
        return made[1] if made is not None and made[0] == os.getpid() else None


_all: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


def _new_locks() -> None:
    # The parent's may have been held at the moment of the fork.
    for one in list(_all):
        one._lock = threading.RLock()  # noqa: SLF001 (this module's own class)


forks.in_child(_new_locks)


_LONGEST_WAIT_TO_FORK = 15.0  # seconds
# The process and the call of it that this thread is in.
_inside: ContextVar[tuple[int, object] | None] = ContextVar("d1_signer_inside", default=None)


class ForkGate:
    """Lets no process be forked while a thread is where a library does not survive it.

    Between such calls a fork is safe. gRPC: its own fork handlers give up while another thread
    calls, and then one child in ten waits for ever on a channel that it made itself. OpenSSL: one
    child in two thousand waited for ever on a lock that a handshake of its parent had held.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
        )
        forks.in_child(self._reset)

    def _reset(self) -> None:
        # A forked child has none of the threads that were in calls or about to fork.
        self._changed = threading.Condition()
        self._calls: set[object] = set()
        self._forks = 0

    @contextlib.contextmanager
    def call(self, until: float) -> Iterator[None]:
        """A call which a fork waits for; begun after the forks that are under way.

        Reentrant for a thread and those that it leaves work to (`run_until`): what is begun inside
        a call ends with it, and a fork that waits for the call would wait for ever otherwise.

        Args:
            until: Moment on ``time.monotonic()`` by which the call is to be over.

        Raises:
            TimeoutError: It is not begun by then.
        """
        if self._current() is not None:
            yield
            return
        forks.notice()
        call, inside = object(), None
        # Whatever a signal's handler raises, and at whichever line: it is given back.
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._forks, until - time.monotonic()):
                    raise TimeoutError
                self._calls.add(call)
            inside = _inside.set((os.getpid(), call))
            yield
        finally:
            self._end(call)
            if inside is not None:
                _inside.reset(inside)

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Leave the call that this thread is in, for what a fork may meet.

        A handshake waits for its signature so. Who signs may wait for the forks that are under way,
        as a PKCS#11 module does; forks that wait for the handshake would wait for that as well.
        """
        call = self._current()
        if call is None:
            yield
            return
        outside = _inside.set(None)
        try:
            self._end(call)
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self._forks, _LONGEST_WAIT_TO_FORK)
                self._calls.add(call)
            _inside.reset(outside)

    def _current(self) -> object | None:
        """The call that this thread is in; a child of its fork is in none."""
        inside = _inside.get()
        return inside[1] if inside is not None and inside[0] == os.getpid() else None

    def _end(self, call: object) -> None:
        self._calls.discard(call)
        with self._changed:
            if self._forks:
                self._changed.notify_all()

    def _before_fork(self) -> None:
        own = 0 if self._current() is None else 1
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: len(self._calls) <= own, _LONGEST_WAIT_TO_FORK)

    def _after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


fork_gate = ForkGate()

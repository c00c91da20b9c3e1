# SPDX-License-Identifier: Apache-2.0
"""The gate that calls into a module pass: many inside at once, one after the other, or nobody.

Finalising a module while another thread is in a call crashes or freezes the process, and a fork in
the middle of a call leaves the module's own locks held in the child for ever. So both shut the gate
first and wait until it has drained.

A signal's handler may raise (Ctrl-C, a task queue's soft time limit), between any two calls of the
main thread and at the first line of any function. Whoever it hits must not stay in the books. So
there is no counter and no method to leave by: each passage and each shutting is an object of its
own, put in within a ``try`` and taken out as the first thing its ``finally`` does, which is one
call in C::

    call = object()
    try:
        gate.enter(call, deadline)
        ...
    finally:
        gate.inside.discard(call)

Nobody is told of a change, since that could be cut off as well: who waits here looks again after a
millisecond. Nobody waits here but beside a recovery or a fork.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from d1_signer.errors import SignerClosedError, SignerTimeout

_PAUSE = 0.001


class Gate:
    """Readers and a writer; the writer has a time limit and goes first.

    Attributes:
        inside: The calls under way.
        shut_by: Those who have shut the gate or wait to; only the first one has it.
        ended: Whether it stays shut, since the process ends.
        turn: Taken by one call after the other, for a module that serves one thread at a time.
    """

    def __init__(self) -> None:
        self.inside: set[object] = set()
        self.shut_by: list[object] = []
        self.ended = False
        self.turn = threading.RLock()
        self._held = False  # for a fork, when nobody was inside any more

    def enter(self, call: object, deadline: float | None) -> None:
        """Go in; waits while the gate is shut. ``inside.discard(call)`` must follow.

        Args:
            call: Stands for this passage.
            deadline: Moment on ``time.monotonic()``; None: no limit.

        Raises:
            SignerTimeout: It was shut until the deadline.
            SignerClosedError: It is not opened any more.
        """
        while True:
            if not self.shut_by:
                self.inside.add(call)
                if not self.shut_by:  # else whoever shut it meanwhile may have missed this call
                    return
                self.inside.discard(call)
            if self.ended:
                raise SignerClosedError("The process ends: the PKCS#11 sessions are closed.")
            if not until(lambda: not self.shut_by or self.ended, deadline):
                raise SignerTimeout(
                    "The PKCS#11 module was being initialised anew until the deadline.",
                    hint="Try again, or allow more time.",
                )

    def take_turn(self, deadline: float | None) -> None:
        """Wait until no other call is inside; ``turn.release()`` must follow.

        Raises:
            SignerTimeout: One was until the deadline.
        """
        left = remaining(deadline)
        if not self.turn.acquire(timeout=-1 if left is None else left):
            raise SignerTimeout(
                "The PKCS#11 module was in another call until the deadline.",
                hint="Allow more time; this module works for one thread at a time.",
            )

    def shut(self, by: object, limit: float) -> bool:
        """Let nobody in any more; taking ``by`` out again must follow.

        Args:
            by: Stands for this shutting.
            limit: Moment on ``time.monotonic()``.

        Returns:
            Whether it is shut by this one; if not, another kept it shut until the limit.
        """
        if by not in self.shut_by:
            self.shut_by.append(by)
        return until(lambda: self.shut_by[0] == by, limit)

    def drained(self, limit: float) -> bool:
        """Wait until nobody is inside; False where somebody still is at the limit."""
        return until(lambda: not self.inside, limit)

    def alone(self, work: Callable[[], None], limit: float) -> bool:
        """Do work with the gate shut and nobody inside; False where that was not to be had."""
        me = object()
        try:
            if not self.shut(me, limit) or not self.drained(limit):
                return False
            work()
            return True
        finally:
            if me in self.shut_by:
                self.shut_by.remove(me)

    def hold_for_fork(self, limit: float) -> None:
        """Let nobody in, and wait until nobody is inside."""
        self._held = self.shut(threading.get_ident(), limit) and self.drained(limit)

    def resume_in_parent(self) -> None:
        """The fork was made."""
        me = threading.get_ident()
        if me in self.shut_by:
            self.shut_by.remove(me)
        self._held = False

    @property
    def torn(self) -> bool:
        """In the child, of the parent's gate: whether the fork came in the middle of something.

        Where Python was not told before the fork, the gate shows what went on then.
        """
        return bool(self.inside or self.shut_by) and not self._held


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline, at least 0; None for no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def until(true: Callable[[], bool], limit: float | None) -> bool:
    """Wait for something; False where it is not so at the limit."""
    while not true():
        if limit is not None and time.monotonic() >= limit:
            return False
        time.sleep(_PAUSE)
    return True

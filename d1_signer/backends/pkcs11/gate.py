# SPDX-License-Identifier: Apache-2.0
"""The gate that calls into a module pass: many inside at once, or nobody.

Finalising a module while another thread is in a call crashes or freezes the process, and a fork in
the middle of a call leaves the module's own locks held in the child for ever. So both close the
gate first and wait until it has drained.
"""

from __future__ import annotations

import threading
import time

from d1_signer.errors import SignerTimeout


class Gate:
    """Readers and a writer; the writer has a time limit and goes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # taken by itself: a condition's own `with` costs three times
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._closed = False

    def enter(self, deadline: float | None) -> None:
        """Go in; waits while the gate is closed.

        Args:
            deadline: Moment on ``time.monotonic()``; None: no limit.

        Raises:
            SignerTimeout: It was closed until the deadline.
        """
        with self._lock:
            while self._closed:
                if not self._changed.wait(remaining(deadline)):
                    raise SignerTimeout(
                        "The PKCS#11 module was being initialised anew until the deadline.",
                        hint="Try again, or allow more time.",
                    )
            self._inside += 1

    def leave(self) -> None:
        """Go out."""
        with self._lock:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self, limit: float) -> bool:
        """Close the gate and wait until nobody is inside.

        Args:
            limit: Moment on ``time.monotonic()``.

        Returns:
            Whether it is closed and empty; if not, it is as it was.
        """
        if not self.shut(limit):
            return False
        if self.drained(limit):
            return True
        self.open()
        return False

    def shut(self, limit: float) -> bool:
        """Let nobody in any more; False where another kept it closed until the limit."""
        with self._lock:
            while self._closed:
                if not self._changed.wait(remaining(limit)):
                    return False
            self._closed = True
            return True

    def drained(self, limit: float) -> bool:
        """Wait until nobody is inside; False where somebody still is at the limit."""
        with self._lock:
            while self._inside:
                if not self._changed.wait(remaining(limit)):
                    return False
            return True

    def open(self) -> None:
        """Let the waiting in."""
        with self._lock:
            self._closed = False
            self._changed.notify_all()


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline, at least 0; None for no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())

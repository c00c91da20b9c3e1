# SPDX-License-Identifier: Apache-2.0
"""Group commit: one fdatasync makes durable what many threads have written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue


class _Ticket:
    """One caller who waits. A bare lock: an exception of a signal's handler leaves it whole."""

    __slots__ = ("_settled", "error")

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._settled = threading.Lock()
        self._settled.acquire()

    def wait(self, until: float) -> bool:
        return self._settled.acquire(timeout=max(0.0, until - time.monotonic()))

    def settle(self, error: OSError | None) -> None:
        self.error = error
        self._settled.release()


class Committer:
    """Syncs in a thread of its own, which a disk that hangs holds up alone."""

    def __init__(self, sync: Callable[[], None]) -> None:
        """Keep ``sync``, which makes durable all that was written before it is called."""
        self._sync = sync
        self._queue: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def commit(self, until: float) -> None:
        """Wait until what was written before is durable.

        Args:
            until: Moment on ``time.monotonic()`` to wait for at most.

        Raises:
            TimeoutError: It is not durable by then.
            OSError: It cannot be made durable.
        """
        if self._thread is None and not self._started():
            self._sync()
            return
        ticket = _Ticket()
        self._queue.put(ticket)
        if not ticket.wait(until):
            raise TimeoutError
        if ticket.error is not None:
            raise OSError(ticket.error.errno, ticket.error.strerror)

    def stop(self) -> None:
        """Let the thread end."""
        self._queue.put(None)

    def _started(self) -> bool:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="d1-signer-audit", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread is to be had, or the interpreter ends
                    return False
                self._thread = thread
        return True

    def _run(self) -> None:
        tickets: list[_Ticket | None] = []
        while None not in tickets:
            tickets = [self._queue.get()]
            try:
                while True:
                    tickets.append(self._queue.get_nowait())
            except Empty:
                pass
            error: OSError | None = None
            try:
                self._sync()
            except OSError as failure:
                error = failure
            for ticket in filter(None, tickets):
                ticket.settle(error)

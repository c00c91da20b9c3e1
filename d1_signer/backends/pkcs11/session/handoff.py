# SPDX-License-Identifier: Apache-2.0
"""Calls with a deadline: made by threads of our own, which callers leave behind when they hang.

The threads are kept. One that ends runs the clean-up of the libraries that it used, OpenSSL's in
SoftHSM among them, and takes their locks for it, where no gate of ours can see that: a fork at that
moment leaves a child with locks that nobody holds. (Seen in 3 of 120 forks, with a thread for each
call.) They are daemons, so that one that hangs does not keep the process from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from d1_signer.backends.pkcs11.module.gate import remaining
from d1_signer.errors import SignerTimeout, SignerUnavailable

T = TypeVar("T")


class _Job:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = threading.Event()


class Handoff:
    """Threads that make the calls of one backend; as many as there are callers at a time."""

    def __init__(self, name: str = "d1-signer-call") -> None:
        """Name the threads as tools that list them are to show them."""
        self._name = name
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child there are none of these threads."""
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._closed = False

    def run(self, work: Callable[[], T], deadline: float | None) -> T:
        """Do work in another thread and wait for it until a deadline.

        Args:
            work: What to do; its exceptions are raised here.
            deadline: Moment on ``time.monotonic()``; None: as long as it takes.

        Raises:
            SignerTimeout: The deadline passed first; the result is dropped.
            SignerUnavailable: No thread can be started.
        """
        left = remaining(deadline)
        if left == 0:
            raise _too_late()
        job = _Job(work)
        self._take().put(job)
        if not job.ended.wait(left):
            raise _too_late()
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def prepare(self) -> None:
        """Have a thread ready.

        Raises:
            SignerUnavailable: None can be started.
        """
        with self._lock:
            ready = bool(self._idle)
        if not ready:
            queue = self._started()
            with self._lock:
                self._idle.append(queue)

    def close(self) -> None:
        """Let the threads end, those that hang when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for queue in idle:
            queue.put(None)

    def _take(self) -> SimpleQueue[_Job | None]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._started()

    def _started(self) -> SimpleQueue[_Job | None]:
        queue: SimpleQueue[_Job | None] = SimpleQueue()
        try:
            threading.Thread(
                target=self._serve, args=(queue,), name=self._name, daemon=True
            ).start()
        except RuntimeError:
            raise SignerUnavailable(
                "No thread can be started for a call with a deadline.",
                hint="The process has reached its limit of threads.",
            ) from None
        return queue

    def _serve(self, queue: SimpleQueue[_Job | None]) -> None:
        while (job := queue.get()) is not None:
            try:
                job.result = job.work()
            except BaseException as error:  # noqa: BLE001 (raised again by the waiting thread)
                job.error = error
            with self._lock:
                if not self._closed:
                    self._idle.append(queue)
                closed = self._closed
            job.ended.set()
            if closed:
                return
            # Not kept until the next call: what it refers to may be the PIN's owner.
            del job


def _too_late() -> SignerTimeout:
    return SignerTimeout(
        "The HSM gave no answer within the deadline.",
        hint="Check the HSM and its connection, or allow more time.",
    )

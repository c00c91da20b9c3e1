# SPDX-License-Identifier: Apache-2.0
"""One renewal under way: those who wait for it, and where it is."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from d1_signer.errors import D1SignerError, TokenError, TokenTimeout
from d1_signer.token.access_token import HeldToken

_of_this_thread = threading.local()
_MOST_CALLERS = 128  # what OpenTelemetry keeps of a span's links


class Here(threading.local):
    """Whether this thread renews for a keeper, or holds its lock: so it cannot wait for a flight.

    Attributes:
        inside: Whether it does.
    """

    inside = False

    @contextmanager
    def within(self) -> Iterator[None]:
        """Be inside for a while; what a handler of a signal does meanwhile is inside as well."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


class Flight:
    """One renewal in a thread of its own, and those who wait for it.

    Attributes:
        starts_in: Seconds from its making to its start.
        deadline: Moment on ``time.monotonic()`` by which it is to end.
        stopped: Set by whoever wants no result any more.
        worker: Its thread.
        place: What it was left to last, for an error text: nothing bounds a vendor's library or a
            caller's function.
        callers: Trace id and span id of those who wait.
    """

    def __init__(self, *, starts_in: float, total: float) -> None:
        """Nothing runs yet; it has ``total`` seconds from its start."""
        self.starts_in = starts_in
        self.deadline = time.monotonic() + starts_in + total
        self.stopped = threading.Event()
        self.worker: threading.Thread | None = None
        self.place = "a thread that has not begun"
        self.callers: list[tuple[str, str]] = []
        self._ended = threading.Event()
        self._result: HeldToken | D1SignerError = TokenTimeout("The renewal has not ended.")

    def begin(self, fly: Callable[[Flight], None]) -> None:
        """Begin it in a thread of its own.

        Raises:
            TokenError: No thread can be had.
        """
        # In the context of the call that begins it: its span is the parent of the renewal's.
        worker = threading.Thread(
            target=contextvars.copy_context().run,
            args=(fly, self),
            name="d1-signer-renewal",
            daemon=True,
        )
        self.worker = worker
        try:
            worker.start()
        except RuntimeError:
            self.worker = None
            raise TokenError(
                "No thread can be started for the renewal.",
                hint="Look at the limits of this process (TasksMax, pids.max, memory) and at what "
                "its threads do; it is tried again by itself.",
                retryable=True,
            ) from None

    def join(self, timeout: float) -> None:
        """Wait for the end of its thread, so many seconds at most; it may be that of the caller."""
        if self.worker is not None and self.worker is not threading.current_thread():
            self.worker.join(timeout)

    def is_mine(self) -> None:
        """Called by its thread: from here on `left_to` tells where this one is."""
        _of_this_thread.flight = self

    def awaited_in(self, span: tuple[str, str] | None) -> None:
        """Note the span in which somebody waits, where there is one."""
        if span is not None and len(self.callers) < _MOST_CALLERS:
            self.callers.append(span)

    def is_flying(self) -> bool:
        """Whether its thread has not come back."""
        return self.worker is not None and self.worker.is_alive()

    def end(self, result: HeldToken | D1SignerError) -> None:
        """Give a result to those who wait; the first one counts."""
        if not self._ended.is_set():
            self._result = result
            self._ended.set()

    def wait(self, timeout: float) -> bool:
        """Wait for the result, so many seconds at most; returns whether it is there."""
        return self._ended.wait(timeout)

    def held(self) -> HeldToken:
        """The token.

        Raises:
            D1SignerError: The renewal failed.
        """
        if isinstance(self._result, D1SignerError):
            # One object raised in many threads would collect all their tracebacks.
            raise self._result.fresh()
        return self._result


def left_to(place: str) -> None:
    """Note what the renewal of this thread is left to now; in other threads nothing is noted."""
    flight = getattr(_of_this_thread, "flight", None)
    if flight is not None:
        flight.place = place

# SPDX-License-Identifier: Apache-2.0
"""Credentials of a cloud: used until they truly end, and renewed beside the calls before that.

The SDKs renew in a caller's way, and give up credentials that are still good where their source is
away for a while. Here one thread looks for new ones while the calls go on with those in hand.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from d1_signer.errors import D1SignerError, LoginError, SignerTimeout, SignerUnavailable
from d1_signer.transport.processes import PerProcess

T = TypeVar("T")
Ask = Callable[[str], str]
"""Asks a person: the question, to the answer."""

# Seconds between the beginnings of two searches.
_PAUSE = 5.0
# Seconds after which a search that does not end is no longer waited for, and another one begins.
_PATIENCE = 10.0
# Searches of one process that may hang; each holds a thread, and perhaps a program that it started.
_MOST_HANGING = 4


class Renewed(ABC, Generic[T]):
    """What a service's calls must show. A child of a fork goes on with what its parent held.

    Attributes:
        what: What it is, for error texts.
    """

    what: str

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: T | None = None
        # Threads do not come along over a fork, and locks may be held at that moment.
        self._searches: PerProcess[_Searches[T]] = PerProcess(lambda: _Searches(self))

    @abstractmethod
    def find(self, ask: Ask) -> T:
        """Look for credentials from the beginning; may take long.

        Args:
            ask: Asks the person who opens the key; raises where there is none.

        Raises:
            D1SignerError: There are none now.
        """

    @abstractmethod
    def is_ageing(self, held: T) -> bool:
        """Whether they end soon, or have ended."""

    @abstractmethod
    def is_over(self, held: T) -> bool:
        """Whether they have ended."""

    @abstractmethod
    def are_same(self, held: T, other: T) -> bool:
        """Whether a service would take the one for the other."""

    @abstractmethod
    def not_in_time(self) -> SignerTimeout:
        """The error where a search does not end in time."""

    def search(self, ask: Ask) -> T:
        """Look for credentials that are good now.

        Raises:
            D1SignerError: There are none, or they have ended already.
        """
        found = self.find(ask)
        if self.is_over(found):
            raise LoginError(
                f"The source of the {self.what} gave some that have ended.",
                hint="Check the source, and this machine's clock.",
                retryable=True,
                details={"phase": "credentials"},
            )
        return found

    def hold(self, found: T) -> None:
        """Have the calls use what was found."""
        self._held = found

    def held(self) -> T | None:
        """What is in hand, good or not."""
        return self._held

    def get(self, until: float) -> T:
        """Good credentials, in hand or found by a moment on ``time.monotonic()``.

        Raises:
            D1SignerError: There are none; SignerTimeout where the search goes on.
        """
        held = self._held
        if held is not None and not self.is_ageing(held):
            return held
        search = self._searches.get().begin()
        if held is not None and not self.is_over(held):
            return held
        return self._await(search, until)

    def open(self, until: float, ask: Ask) -> float:
        """Find credentials for an opening, at which a person can be asked.

        Returns:
            The seconds in which the person was waited for: they count against no limit.
        """
        held = self._held
        if held is not None and not self.is_over(held):
            return 0.0
        search = self._searches.get().begin(interactive=True)
        waited = search.answer(until, ask)
        self._await(search, until + waited)
        return waited

    def replaced(self, refused: T, until: float) -> bool:
        """Whether there are others than those that the service refused; looked for at most once."""
        held = self._held
        if held is None or self.are_same(held, refused):
            held = self._await(self._searches.get().begin(), until)
        return not self.are_same(held, refused)

    def _await(self, search: _Search[T], until: float) -> T:
        if not search.over.wait(max(0.0, until - time.monotonic())):
            raise self.not_in_time()
        if search.failure is not None:
            raise search.failure.fresh()
        assert search.found is not None  # noqa: S101 (one of the two is there)
        return search.found


class _Search(Generic[T]):
    """One search, in a thread of its own, for all that wait."""

    def __init__(
        self,
        renewed: Renewed[T],
        keep: Callable[[_Search[T], T], T],
        *,
        interactive: bool,
    ) -> None:
        self.over = threading.Event()
        self.began = time.monotonic()
        self.found: T | None = None
        self.failure: D1SignerError | None = None
        self._renewed = renewed
        self._keep = keep
        self._interactive = interactive
        self._questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def start(self) -> bool:
        """Whether it runs now; else it is over, with that as its failure."""
        try:
            threading.Thread(target=self._run, name="d1-signer-credentials", daemon=True).start()
        except RuntimeError:
            self.failure = SignerUnavailable(
                f"No thread can be started to look for the {self._renewed.what}.",
                hint="The process has reached its limit of threads.",
                details={"phase": "credentials"},
            )
            self.over.set()
            self._questions.put(None)
            return False
        return True

    def _run(self) -> None:
        try:
            self.found = self._keep(self, self._renewed.search(self._ask))
        except D1SignerError as error:
            self.failure = error.with_traceback(None)
        finally:
            self.over.set()
            self._questions.put(None)

    def _ask(self, question: str) -> str:
        if not self._interactive:
            raise NobodyToAskError(question)
        self._questions.put(question)
        answer = self._answers.get()
        if answer is None:
            raise NobodyToAskError(question)
        return answer

    def answer(self, until: float, ask: Ask) -> float:
        """Put the search's questions to a person, in the thread that waits for it.

        It is the one that Ctrl-C interrupts: the terminal is then left as it was.
        """
        waited = 0.0
        while True:
            try:
                left = until + waited - time.monotonic()
                question = self._questions.get(timeout=max(0.0, left))
            except queue.Empty:
                return waited
            if question is None:
                return waited
            asked, answer = time.monotonic(), None
            try:
                answer = ask(question)
            finally:
                waited += time.monotonic() - asked
                self._answers.put(answer)


class NobodyToAskError(Exception):
    """A search has a question, and nobody waits who could answer it; the question as argument."""


class _Searches(Generic[T]):
    """The searches of one process: one at a time, and not too many of them."""

    def __init__(self, renewed: Renewed[T]) -> None:
        self._renewed = renewed
        self._lock = threading.Lock()
        self._last: _Search[T] | None = None
        # When the search began whose credentials are held.
        self._newest = float("-inf")
        # All that have not ended; the last one is among them, or has ended.
        self._under_way: list[_Search[T]] = []

    def begin(self, *, interactive: bool = False) -> _Search[T]:
        """A search that begins now; or the last one, where that is under way or began just now.

        It is the last one also where too many hang: whoever waits for it is told that it is late.
        """
        with self._lock:
            last = self._last
            if last is not None and not interactive and not self._is_past(last):
                return last
            self._under_way = [each for each in self._under_way if not each.over.is_set()]
            if last is not None and len(self._under_way) >= _MOST_HANGING:
                return last
            search = _Search(self._renewed, self._keep, interactive=interactive)
            if search.start():
                self._last = search
                self._under_way.append(search)
            return search

    def _keep(self, search: _Search[T], found: T) -> T:
        """Hold what a search found, unless one that began later was quicker; what is held then."""
        with self._lock:
            held = self._renewed.held()
            if held is not None and search.began < self._newest and not self._renewed.is_over(held):
                return held
            self._newest = max(self._newest, search.began)
            self._renewed.hold(found)
            return found

    def _is_past(self, search: _Search[T]) -> bool:
        age = time.monotonic() - search.began
        if not search.over.is_set():
            return age > _PATIENCE
        ended = search.found is not None and self._renewed.is_over(search.found)
        return ended or age > _PAUSE

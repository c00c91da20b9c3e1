# SPDX-License-Identifier: Apache-2.0
"""A token that is away is not hammered, a remedy that does not help not taken all the time."""

from __future__ import annotations

import logging
import threading
import time

from d1_signer.errors import D1SignerError

_log = logging.getLogger(__name__)

# The longest pause bounds how late a token's return is noticed; an attempt costs milliseconds.
_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 0.2
# Others have to recover from such a remedy, too.
_LONGEST_TIME_IN_VAIN = 5.0


class Circuit:
    """Closed while the token works; open, for a growing pause, after a recovery has failed."""

    def __init__(self, name: str) -> None:
        """Name it as the log is to show it."""
        self._name = name
        self._lock = threading.Lock()
        self._failures = 0
        self._until = 0.0
        self._error: D1SignerError | None = None

    def renew(self) -> None:
        """Begin anew in a child of a fork."""
        self._lock = threading.Lock()

    def check(self) -> None:
        """Refuse at once while the circuit is open.

        Raises:
            D1SignerError: The failure that opened it.
        """
        error = self._error
        if error is not None and time.monotonic() < self._until:
            raise error.fresh()

    def opened_by(self, error: D1SignerError) -> None:
        """A recovery has failed."""
        with self._lock:
            now = time.monotonic()
            if self._error is not None and now < self._until:
                return  # another thread's attempt of the same moment
            self._failures += 1
            self._until = now + min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2 ** min(self._failures, 10))
            first = self._error is None
            self._error = error.fresh()
        if first:
            _log.warning("pkcs11.away token=%s: %s", self._name, error.message)

    def closed_by_success(self) -> None:
        """A signature was made."""
        if self._error is None:
            return
        with self._lock:
            failures, self._failures, self._error = self._failures, 0, None
        if failures:
            _log.warning("pkcs11.back token=%s failed_recoveries=%d", self._name, failures)


class Remedy:
    """A costly remedy: due, unless it was taken in vain just now."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0

    @property
    def due(self) -> bool:
        """Whether to take it."""
        return time.monotonic() >= self._until

    def taken(self, *, helped: bool) -> None:
        """It was taken; each time in vain doubles the pause until the next."""
        self._failures = 0 if helped else self._failures + 1
        pause = min(_LONGEST_TIME_IN_VAIN, _LONGEST_PAUSE * 2 ** min(self._failures, 10))
        self._until = 0.0 if helped else time.monotonic() + pause

# SPDX-License-Identifier: Apache-2.0
"""A circuit: a token that is away is not hammered, and the log is not flooded."""

from __future__ import annotations

import logging
import threading
import time

from d1_signer.errors import D1SignerError

_log = logging.getLogger(__name__)

# The longest pause bounds how late a token's return is noticed; an attempt costs milliseconds.
_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 0.2


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

# SPDX-License-Identifier: Apache-2.0
"""One member of a `SignerSet`, and its circuit breaker."""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from enum import StrEnum
from typing import final

from d1_signer.errors import D1SignerError
from d1_signer.logfmt import told
from d1_signer.signing import forks
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.signer import Signer

_log = logging.getLogger("d1_signer.signer_set")

_FIRST_REST = 1.0
_LONGEST_REST = 30.0


class Health(StrEnum):
    """Whether a member is asked for signatures (the states of a circuit breaker)."""

    WORKING = "working"  # circuit closed
    RESTING = "resting"  # circuit open: not asked until the rest is over
    PROBING = "probing"  # half-open: one caller tries whether it works again


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MemberHealth:
    """The state of one member at one moment.

    Attributes:
        kid: Key identifier.
        health: Whether it is asked.
        failures: Failures since the last signature.
        last_error: Code of the last error since then; None where there was none.
        rests_for: Seconds until it is probed; 0 where it does not rest.
    """

    kid: str
    health: Health
    failures: int
    last_error: str | None
    rests_for: float


_members: weakref.WeakSet[Member] = weakref.WeakSet()


class Member:
    """One signer and its circuit breaker."""

    def __init__(self, source: Signer | LazySigner) -> None:
        """It works, as far as is known."""
        self.source = source
        self.kid = source.kid
        self._lock = threading.RLock()  # a signal's handler may ask for the health
        self._failures = 0
        self._rests = 0
        self._last_error: str | None = None
        self._rests_until = 0.0
        self._prober: object | None = None
        _members.add(self)

    def signer(self, timeout: float | None) -> Signer:
        """Its signer, which is opened within so many seconds where it is not open."""
        if isinstance(self.source, Signer):
            return self.source
        return self.source.signer(timeout=timeout)

    def admit(self, now: float) -> object | None:
        """A ticket where a caller may try now; after a rest, one caller at a time."""
        ticket = object()
        with self._lock:
            if not self._ready(now):
                return None
            if self._failures:
                self._prober = ticket
        return ticket

    def ready(self, now: float) -> bool:
        """Whether a caller would be admitted now."""
        with self._lock:
            return self._ready(now)

    def _ready(self, now: float) -> bool:
        return not self._failures or (self._prober is None and now >= self._rests_until)

    def succeeded(self) -> None:
        """It has signed."""
        with self._lock:
            recovered = self._failures > 0
            self._failures, self._rests, self._last_error, self._prober = 0, 0, None, None
        if recovered:
            _log.info("signer_set.recovered %s", told({"kid": self.kid}))

    def failed(self, ticket: object, error: D1SignerError, now: float) -> None:
        """It has not signed, and rests."""
        with self._lock:
            self._failures += 1
            self._last_error = error.code
            # Calls that were under way when the first of them failed saw the same outage: they do
            # not lengthen the rest, nor do they end another caller's probe.
            if self._failures == 1 or self._prober is ticket:
                self._prober = None
                # A refused PIN or a missing key does not mend itself soon: no eager probes.
                exponent = min(self._rests, 10) if error.retryable else 10
                self._rests_until = now + min(_FIRST_REST * 2**exponent, _LONGEST_REST)
                self._rests += 1
        _log.warning(
            "signer_set.failed %s", told({"kid": self.kid, "error": error.code, "message": error})
        )

    def released(self, ticket: object) -> None:
        """The caller stopped for a reason that says nothing about this member."""
        with self._lock:
            if self._prober is ticket:
                self._prober = None

    def health(self, now: float) -> MemberHealth:
        """Its state at a moment."""
        with self._lock:
            resting = max(0.0, self._rests_until - now) if self._failures else 0.0
            health = Health.WORKING if not self._failures else Health.RESTING
            if self._prober is not None:
                health = Health.PROBING
            return MemberHealth(
                kid=self.kid,
                health=health,
                failures=self._failures,
                last_error=self._last_error,
                rests_for=resting,
            )

    def after_fork(self) -> None:
        """In a forked child: the threads that held the lock or probed are not here."""
        self._lock = threading.RLock()
        self._prober = None


def _after_fork_in_child() -> None:
    for member in list(_members):
        member.after_fork()


forks.in_child(_after_fork_in_child)

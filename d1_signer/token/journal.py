# SPDX-License-Identifier: Apache-2.0
"""What became of the renewals: told to the log and to observers, and kept for `status`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from d1_signer.errors import D1SignerError
from d1_signer.events import Observer, RenewalEvent, notify, notify_beginning
from d1_signer.logfmt import told
from d1_signer.token.access_token import HeldToken
from d1_signer.token.clock import Clock
from d1_signer.token.status import Failure, StoreState, Success

_log = logging.getLogger("d1_signer.token")
_TOLD_APART = frozenset({"valid_for", "host", "issuer", "code", "failures", "seconds", "message"})


class Renews(Protocol):
    """What a journal is about: that which renews."""

    @property
    def whose(self) -> Mapping[str, str]:
        """Names of D1's host and the issuer."""
        ...

    @property
    def store_state(self) -> StoreState:
        """What the last call of the fleet's store has shown."""
        ...


class Journal:
    """Keeps the last success and the last failure. Written under the keeper's lock.

    Attributes:
        whose: Names of D1's host and the issuer.
        success: The last one.
        failure: The last one.
        failures: In a row, since the last success.
    """

    def __init__(self, renews: Renews, *, wall: Clock, observers: Sequence[Observer]) -> None:
        """Nothing has happened yet.

        Args:
            renews: Has the names of D1's host and the issuer, for each line.
            wall: Seconds since the epoch.
            observers: Told of each renewal.
        """
        self.whose = dict(renews.whose)
        self.success: Success | None = None
        self.failure: Failure | None = None
        self.failures = 0
        self._renews = renews
        self._wall = wall
        self._observers = tuple(observers)
        self._lines: deque[Callable[[], None]] = deque()

    def succeeded(self, held: HeldToken, seconds: float) -> None:
        """A renewal has ended with a token."""
        failures, self.failures = self.failures, 0
        names = held.attempt.details() if held.attempt else {}
        self.success = Success(
            at=self._wall(),
            shared=held.shared,
            attempt=held.attempt,
        )
        facts = {
            **self.whose,
            **names,
            "seconds": round(seconds, 3),
            "scope": held.token.scope,
            "expires_at": round(held.token.expires_at),
            "shared": held.shared,
        }
        if failures:
            facts["after_failures"] = failures
        self._lines.append(lambda: _log.info("token.renewed %s", told(facts)))

    def failed(self, error: D1SignerError, seconds: float | None, life: float) -> None:
        """A renewal has ended without one.

        Args:
            error: Why.
            seconds: How long it took; None where it never began.
            life: Seconds for which callers still get an earlier token.
        """
        self.failures += 1
        correlation_id = error.details.get("correlation_id")
        self.failure = Failure(
            at=self._wall(),
            code=error.code,
            message=error.message,
            hint=error.hint,
            retryable=error.retryable,
            correlation_id=None if correlation_id is None else str(correlation_id),
        )
        facts: dict[str, object] = {"code": error.code, "failures": self.failures, **self.whose}
        facts["valid_for"] = round(life, 1)
        if seconds is not None:
            facts["seconds"] = round(seconds, 3)
        facts |= {name: value for name, value in error.details.items() if name not in _TOLD_APART}
        line = told({**facts, "message": error})
        if life:
            self._lines.append(lambda: _log.warning("token.failed %s", line))
        else:
            self._lines.append(lambda: _log.error("token.failed %s", line))

    def write(self) -> None:
        """Write to the log what has become of renewals; without the keeper's lock."""
        while True:
            try:
                write = self._lines.popleft()
            except IndexError:
                return
            write()

    def begin(self) -> None:
        """Tell the observers that a renewal begins."""
        notify_beginning(self._observers)

    def tell(
        self,
        result: HeldToken | D1SignerError,
        seconds: float,
        life: float,
        callers: Sequence[tuple[str, str]],
    ) -> None:
        """Tell the observers how a renewal ended, and which calls waited for it."""
        held = result if isinstance(result, HeldToken) else None
        event = RenewalEvent(
            duration=seconds,
            error=result.code if isinstance(result, D1SignerError) else None,
            expires_in=held.token.expires_at - self._wall() if held else None,
            shared=held is not None and held.shared,
            valid_for=life,
            callers=tuple(dict.fromkeys(callers)),
            store=str(self._renews.store_state),
        )
        notify(self._observers, event)

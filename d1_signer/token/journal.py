# SPDX-License-Identifier: Apache-2.0
"""What became of the renewals: told to the log and to observers, and kept for `status`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from d1_signer.errors import D1SignerError
from d1_signer.events import Observer, RenewalEvent, notify, notify_beginning
from d1_signer.token.access_token import HeldToken
from d1_signer.token.clock import Clock
from d1_signer.token.status import Failure, Success

_log = logging.getLogger("d1_signer.token")
_TOLD_APART = frozenset({"host", "issuer", "code", "failures", "seconds"})


class Journal:
    """Keeps the last success and the last failure. Written under the keeper's lock.

    Attributes:
        whose: Names of D1's host and the issuer.
        success: The last one.
        failure: The last one.
        failures: In a row, since the last success.
    """

    def __init__(
        self, whose: Mapping[str, str], *, wall: Clock, observers: Sequence[Observer]
    ) -> None:
        """Nothing has happened yet.

        Args:
            whose: Names of D1's host and the issuer, for each line.
            wall: Seconds since the epoch.
            observers: Told of each renewal.
        """
        self.whose = dict(whose)
        self.success: Success | None = None
        self.failure: Failure | None = None
        self.failures = 0
        self._wall = wall
        self._observers = tuple(observers)

    def succeeded(self, held: HeldToken, seconds: float) -> None:
        """A renewal has ended with a token."""
        self.failures = 0
        names = held.attempt.details() if held.attempt else {}
        self.success = Success(
            at=self._wall(),
            shared=held.shared,
            attempt=held.attempt,
        )
        _log.info(
            "token.renewed %s scope=%r expires_at=%.0f shared=%s",
            told({**self.whose, **names, "seconds": round(seconds, 3)}),
            held.token.scope,
            held.token.expires_at,
            held.shared,
        )

    def failed(self, error: D1SignerError, seconds: float | None) -> None:
        """A renewal has ended without one; None where it never began."""
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
        if seconds is not None:
            facts["seconds"] = round(seconds, 3)
        facts |= {name: value for name, value in error.details.items() if name not in _TOLD_APART}
        _log.warning("token.failed %s: %s", told(facts), error)

    def begin(self) -> None:
        """Tell the observers that a renewal begins."""
        notify_beginning(self._observers)

    def tell(
        self, result: HeldToken | D1SignerError, seconds: float, callers: Sequence[tuple[str, str]]
    ) -> None:
        """Tell the observers how a renewal ended, and which calls waited for it."""
        spans = tuple(dict.fromkeys(callers))
        if isinstance(result, HeldToken):
            event = RenewalEvent(
                duration=seconds,
                error=None,
                expires_in=result.token.expires_at - self._wall(),
                shared=result.shared,
                callers=spans,
            )
        else:
            event = RenewalEvent(
                duration=seconds, error=result.code, expires_in=None, shared=False, callers=spans
            )
        notify(self._observers, event)


def told(facts: Mapping[str, object]) -> str:
    """Names and values in one line, each of which can be read back."""
    return " ".join(f"{name}={_value(value)}" for name, value in facts.items())


def _value(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and text and not set(text) & set(" \"'=")
    return text if plain else repr(text)

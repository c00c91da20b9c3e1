# SPDX-License-Identifier: Apache-2.0
"""One renewal: as many attempts as it takes within one deadline, each with an assertion of its own.

Pauses between them grow, so that a minute of an outage costs about fifteen requests of one
process.

This is the only retry layer between a caller and D1's token endpoint.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d1_signer.errors import (
    AuditError,
    ConfigurationError,
    D1SignerError,
    FetcherClosedError,
    InvalidInputError,
    SignerError,
    TokenRefusedError,
    TokenTimeout,
    TokenUnavailable,
)
from d1_signer.events import Observer, RequestEvent, notify
from d1_signer.logfmt import told
from d1_signer.secret import Secret
from d1_signer.signing.signer import Signer
from d1_signer.signing.signer_set import SignerSet
from d1_signer.signing.steps import Step
from d1_signer.token.access_token import HeldToken, hold
from d1_signer.token.assertion import new_jti, sign_assertion
from d1_signer.token.attempt import Attempt
from d1_signer.token.clock import Clock
from d1_signer.token.d1 import ISSUED_AT_MARGIN, AssertionProfile, checked_correlation_id
from d1_signer.token.endpoint import Reply, TokenEndpoint
from d1_signer.token.flight import left_to
from d1_signer.token.pauses import asked_pause, passes, pause_before
from d1_signer.token.response import Grant
from d1_signer.token.status import LeaseState, StoreState

_log = logging.getLogger("d1_signer.token")

NO_TIME = 0.05
"""Seconds in which D1 cannot be asked: what failed for them tells nothing of D1."""

# Below the first a clock is right enough and D1 had another reason; beyond the second the machine
# is so wrong that an operator must look at it.
_LEAST_SKEW = float(ISSUED_AT_MARGIN)
MOST_SKEW = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Time limits of a renewal, all in seconds.

    Attributes:
        total: From its start to its end, all attempts included.
        sign: For one signature; half of what is left at most, where another signer can follow.
        connect: For one connection.
        read: For the next bytes of an answer.
    """

    total: float = 30.0
    sign: float = 10.0
    connect: float = 5.0
    read: float = 10.0

    def __post_init__(self) -> None:
        for name in ("total", "sign", "connect", "read"):
            seconds(getattr(self, name), name, least=0.001)


def seconds(value: float, name: str, *, least: float) -> float:
    """Return a number of seconds that can be worked with.

    Raises:
        InvalidInputError: Not a number, less than ``least`` or more than a day.
    """
    if not isinstance(value, int | float) or not least <= value <= 86_400:  # noqa: PLR2004 (a day)
        raise InvalidInputError(f"{name} is not a number of seconds from {least:g} to 86400.")
    return value


class Renewal:
    """Obtains tokens; keeps nothing but what it learned of D1's clock.

    Attributes:
        whose: Names of D1's host and the issuer, for lines of the log.
        store_state: There is no store.
        store_error: Nor anything wrong with it.
        lease_state: There is no lease.
    """

    def __init__(
        self,
        signers: SignerSet,
        profile: AssertionProfile,
        endpoint: TokenEndpoint,
        *,
        limits: Limits,
        clock: Clock,
        wall: Clock,
        correlation_id: Callable[[], str] | None,
        observers: Sequence[Observer],
    ) -> None:
        """Put together what an attempt needs; see `d1_signer.TokenFetcher` for the arguments."""
        self._signers = signers
        self._profile = profile
        self._endpoint = endpoint
        self._limits = limits
        self._clock = clock
        self._wall = wall
        self._correlation_id = correlation_id
        self._observers = tuple(observers)
        self._clock_offset = 0.0
        self.store_state, self.lease_state = StoreState.NONE, LeaseState.NONE
        self.store_error: str | None = None
        self.whose = {"host": endpoint.address, "issuer": profile.issuer_id}

    def close(self) -> None:
        """There is nothing that goes on beside renewals."""

    def begin_without_lease(self) -> None:
        """There is none."""

    def change(self, *, limits: Limits, profile: AssertionProfile) -> None:
        """Have the next attempts keep other limits, and say something else; never fails."""
        self._limits = limits
        self._profile = profile

    def obtain(
        self,
        *,
        deadline: float,
        stopped: threading.Event,
        refused: str | None = None,
    ) -> HeldToken:
        """Obtain a token from D1.

        Args:
            deadline: Moment on ``time.monotonic()`` by which to return or raise.
            stopped: Set by whoever wants no result any more.
            refused: Value of a token that the API refused.

        Raises:
            SignerError: No signer could sign.
            TokenError: D1 gave no usable token.
            FetcherClosedError: ``stopped`` was set.
        """
        del refused  # D1 gives another one anyway, and the frame of an error shows its variables
        held = self._obtain(deadline, stopped)
        if held is None:
            # A machine or process that was paused gives no sign; that time does not count.
            _log.warning("token.expired_on_arrival: one more attempt")
            now = time.monotonic()
            again = deadline if now < deadline else now + self._limits.total
            held = self._obtain(again, stopped)
        if held is None:
            raise TokenUnavailable(
                "D1's token expired before it arrived.",
                hint="Look at the network to D1, and whether this machine or process was paused.",
            )
        return held

    def _obtain(self, deadline: float, stopped: threading.Event) -> HeldToken | None:
        """A token; None for one that expired before it arrived."""
        refused_kids: frozenset[str] = frozenset()
        refusal: D1SignerError | None = None
        last: D1SignerError | None = None
        skew_corrected = False
        attempt = 0
        while True:
            attempt += 1
            started, began = (self._clock(), self._wall()), time.monotonic()
            try:
                tried, reply = self._try_once(attempt, deadline, stopped, refused_kids)
            except (AuditError, SignerError, ConfigurationError, TokenTimeout) as error:
                # That time ran out before another attempt was sent hides nothing of what D1
                # answered before, nor does another key that cannot sign.
                late = isinstance(error, TokenTimeout) or time.monotonic() >= deadline
                answered = last if late else refusal
                if answered is None:
                    raise
                raise answered.fresh() from None
            if isinstance(reply.outcome, Grant):
                return self._held(reply.outcome, *started, tried)
            self._require_time(reply, last, began, deadline)
            last = reply.outcome
            # The two attempts below do not repeat what was refused: each sends another assertion
            # that removes the reason which the refusal points to, and each happens once.
            if not skew_corrected and self._corrects_skew(reply):
                skew_corrected = True
                continue
            if not refused_kids and self._has_another_kid(reply, tried.kid):
                refused_kids, refusal = frozenset({tried.kid}), reply.outcome
                continue
            pause = pause_before(
                attempt,
                asked=asked_pause(reply.outcome),
                chance=random.random(),  # noqa: S311 (spreads load, keeps no secret)
            )
            if not passes(reply.outcome) or time.monotonic() + pause >= deadline:
                if skew_corrected and _is_invalid_grant(reply):
                    # The Date was not what D1 minded, under any kid: both can be wrong at once.
                    self._clock_offset = 0.0
                raise reply.outcome
            facts = {
                "code": reply.outcome.code,
                **self.whose,
                **tried.details(),
                "seconds": round(tried.seconds, 3),
                "pause": round(pause, 3),
            }
            _log.info("token.retry %s", told(facts))
            with Step(f"the end of a pause after {reply.outcome.code}"):
                stopped.wait(pause)
            if stopped.is_set():
                raise FetcherClosedError("The token fetcher was closed during a renewal.")

    def _try_once(
        self, number: int, deadline: float, stopped: threading.Event, without: frozenset[str]
    ) -> tuple[Attempt, Reply]:
        others = False

        def share() -> float:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TokenTimeout(
                    "No token within the deadline: signing took too long.",
                    hint="Look at the device or service that holds the key.",
                )
            # Half of it where another can follow, so that two that hang leave time for a third.
            return min(self._limits.sign, remaining / 2 if others else remaining)

        def patience(another: bool) -> float:  # noqa: FBT001 (as SignerSet calls it)
            nonlocal others
            others = another
            return share()

        def sign(signer: Signer) -> tuple[str, str, Secret]:
            jti, offset = new_jti(), self._clock_offset
            assertion = sign_assertion(
                signer,
                self._profile,
                jti=jti,
                correlation_id=correlation_id,
                clock_offset=offset,
                timeout=share(),
            )
            return signer.kid, jti, assertion

        correlation_id = self._new_correlation_id()
        left_to("a signer")
        kid, jti, assertion = self._signers.attempt(sign, without=without, patience=patience)
        if stopped.is_set():
            raise FetcherClosedError("The token fetcher was closed during a renewal.")
        left_to("the request to D1")
        started = time.perf_counter()
        with Step(f"the answer of {self.whose['host']}") as step:
            reply = self._endpoint.post(assertion, correlation_id=correlation_id, deadline=deadline)
            step.facts |= {"status": reply.status, "correlation_id": correlation_id, "kid": kid}
        tried = Attempt(
            number=number,
            kid=kid,
            jti=jti,
            correlation_id=correlation_id,
            status=reply.status,
            seconds=time.perf_counter() - started,
        )
        self._tell(tried, reply)
        return tried, reply

    def _new_correlation_id(self) -> str:
        """Made before the signature, whose record in an audit trail has it."""
        if self._correlation_id is None:
            return secrets.token_hex(16)
        left_to("the function correlation_id")
        return checked_correlation_id(self._correlation_id())

    def _tell(self, tried: Attempt, reply: Reply) -> None:
        error = reply.outcome if isinstance(reply.outcome, D1SignerError) else None
        if error is not None:
            error.details = {**error.details, **tried.details(), **self.whose}
        event = RequestEvent(
            correlation_id=tried.correlation_id,
            duration=tried.seconds,
            status=tried.status,
            error=None if error is None else error.code,
            jti=tried.jti,
            kid=tried.kid,
        )
        left_to("an observer")
        notify(self._observers, event)

    def _require_time(
        self, reply: Reply, before: D1SignerError | None, began: float, deadline: float
    ) -> None:
        """Raise what was known before an attempt that had too little time to tell anything."""
        # A limit made of the deadline ends some microseconds before it.
        ran_out = deadline - time.monotonic() < NO_TIME
        cut_short = ran_out and deadline - began < self._limits.connect
        if before is not None and reply.status is None and cut_short:
            raise before.fresh()

    def _held(
        self, grant: Grant, requested_at: float, requested_at_wall: float, tried: Attempt
    ) -> HeldToken | None:
        if grant.expires_in <= self._clock() - requested_at:
            return None
        return hold(
            value=grant.value,
            scope=grant.scope,
            expires_in=grant.expires_in,
            requested_at=requested_at,
            requested_at_wall=requested_at_wall,
            chance=random.random(),  # noqa: S311 (spreads load, keeps no secret)
            attempt=tried,
        )

    def _corrects_skew(self, reply: Reply) -> bool:
        offset = reply.clock_offset
        if offset is None or not _is_invalid_grant(reply):
            return False
        if abs(offset - self._clock_offset) < _LEAST_SKEW or abs(offset) > MOST_SKEW:
            return False
        facts = {
            "offset": f"{offset:.0f}",
            "message": "by so many seconds D1's clock is ahead of ours, and the assertion is "
            "corrected: look at this machine's time service",
        }
        _log.warning("token.clock_skew %s", told(facts))
        self._clock_offset = offset
        return True

    def _has_another_kid(self, reply: Reply, kid: str) -> bool:
        if not _is_invalid_grant(reply) or set(self._signers.kids) == {kid}:
            return False
        facts = {"kid": kid, "message": "another kid of the set is tried"}
        _log.warning("token.kid_refused %s", told(facts))
        return True


def _is_invalid_grant(reply: Reply) -> bool:
    # The body of D1's 400 is not documented, so one without an error code counts as well.
    return (
        isinstance(reply.outcome, TokenRefusedError)
        and reply.status in {200, 400}  # RFC 6749 section 5.2, and some gateways
        and reply.outcome.error in {"", "invalid_grant"}
    )

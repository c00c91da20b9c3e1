# SPDX-License-Identifier: Apache-2.0
"""Keeping one token for many callers: cache, single flight, back-off. It knows no HTTP and no key.

A flight is one renewal in a thread of its own. Callers wait for it with time limits of their own,
and a flight that hangs is left behind at its deadline.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from d1_signer.errors import (
    D1SignerError,
    FetcherClosedError,
    TokenError,
    TokenUnavailable,
)
from d1_signer.events import Observer, current_span
from d1_signer.signing import forks
from d1_signer.token.access_token import AccessToken, HeldToken, State
from d1_signer.token.clock import Clock
from d1_signer.token.endpoint import TokenEndpoint
from d1_signer.token.fleet import FleetRenewal
from d1_signer.token.flight import Flight, Here, left_to
from d1_signer.token.journal import Journal
from d1_signer.token.pauses import LONGEST_BACK_OFF, passes, pause_after
from d1_signer.token.renewal import Limits, Renewal, seconds
from d1_signer.token.waiting import all_hang, hangs, none_that_lives, not_in_time, waits_for_itself
from d1_signer.transport.patching import require_patched_first

_log = logging.getLogger("d1_signer.token")

_YOUNG = 30.0
_MOST_HANGING = 4
_ABORT_GRACE = 0.5
_EXIT_GRACE = 1.0
_NEVER = float("-inf")
_NO_TOKEN: Final = AccessToken(value="", expires_at=_NEVER)

_keepers: weakref.WeakSet[TokenKeeper] = weakref.WeakSet()


class TokenKeeper:
    """What `d1_signer.TokenFetcher` is beneath its settings. Safe in threads and after fork."""

    # Seconds for which a fresh token is handed out without a `_look`.
    _looks_every = float("inf")

    def __init__(
        self,
        renewal: Renewal | FleetRenewal,
        endpoint: TokenEndpoint,
        *,
        limits: Limits,
        retry_interval: float,
        clock: Clock,
        wall: Clock,
        observers: Sequence[Observer],
    ) -> None:
        """Keep what ``renewal`` obtains.

        Args:
            renewal: Obtains a token.
            endpoint: Cut where a renewal hangs in it, and closed with this.
            limits: Time limits of a renewal.
            retry_interval: Seconds between two renewals at least.
            clock: On which tokens age.
            wall: Seconds since the epoch.
            observers: Told of each renewal.
        """
        self._renewal = renewal
        self._endpoint = endpoint
        self._limits = limits
        self._retry_interval = retry_interval
        self._clock = clock
        self._wall = wall
        self._journal = Journal(renewal, wall=wall, observers=observers)
        self._refused: str | None = None
        self._refused_young_until = _NEVER
        self._young_until = _NEVER
        self._closed = False
        self._held: HeldToken | None = None
        # What the fast path reads, in one attribute so that it is read as one.
        self._fresh: tuple[float, float, AccessToken] = (_NEVER, _NEVER, _NO_TOKEN)
        self._last_failure: D1SignerError | None = None
        self._not_before = self._quiet_until = _NEVER
        self._begin_without_flight()
        _keepers.add(self)

    def _begin_without_flight(self) -> None:
        self._lock = threading.RLock()  # within it a handler of a signal may ask for the status
        self._here = Here()
        self._flight: Flight | None = None
        self._hanging: list[Flight] = []

    def token(self, *, timeout: float | None = None) -> AccessToken:
        """Return a valid access token.

        Args:
            timeout: Seconds to wait at most where there is none yet; None: the renewal's limit. An
                outage of D1 is waited for that long.

        Raises:
            TokenError: D1 gave none, and no earlier one is valid.
            SignerError: No signer could sign, and no earlier token is valid.
            ConfigurationError: A PIN or key file cannot be read; or gevent patched too late.
            TokenTimeout: It did not come in time.
            InvalidInputError: There is none yet, and ``timeout`` is not a number of seconds.
        """
        renew_at, expires_at, token = self._fresh
        # The wall clock as well: a virtual machine that was suspended may not know it.
        if self._clock() < renew_at and self._wall() < expires_at:
            return token
        return self._token_not_fresh(timeout)

    def token_now(self) -> AccessToken | None:
        """Return a valid access token without waiting; None where there is none.

        Like `token` it begins to renew a stale one in the background. For callers that must not
        block, such as an event loop.
        """
        self._look()
        held = self._held
        state = self._state(held)
        if held is None or state is State.EXPIRED:
            return None
        if state is State.STALE:
            self._renew_in_background()
        elif self._clock() >= self._fresh[0] and self._lock.acquire(blocking=False):
            if self._held is held:  # and not invalidated just now
                self._hand_out(held)
            self._lock.release()
        return held.token

    def _look(self) -> None:
        """Look at what may have changed; waits for nothing."""

    def _hand_out(self, held: HeldToken) -> None:
        """Have the fast path give a token. The lock is held."""
        until = min(held.renew_at, self._clock() + self._looks_every)
        self._fresh = (until, held.token.expires_at, held.token)

    def invalidate(self, token: AccessToken) -> None:
        """Forget a token that D1 has refused; another one that came meanwhile is kept.

        Where D1 refuses the next one as quickly, no other token will help: it is kept for half a
        minute, so that a call without permission does not become a request for a token each time.
        """
        forks.notice()
        with self._lock:
            if self._held is not None and self._held.token.value == token.value:
                now = self._clock()
                young = now < self._young_until
                if young and now < self._refused_young_until:
                    _log.warning("token.refused_again a new token does not help")
                    return
                self._refused_young_until = now + _YOUNG if young else _NEVER
                self._refused = token.value
                self._held = None
                self._fresh = (_NEVER, _NEVER, _NO_TOKEN)

    def prefetch(self) -> None:
        """Begin to obtain a token in the background where none is fresh; returns at once.

        Raises:
            FetcherClosedError: The fetcher is closed.
            ConfigurationError: gevent patched the process too late.
        """
        require_patched_first()
        forks.notice()
        with self._locked():
            self._require_open()
            if self._state(self._held) is not State.FRESH and self._clock() >= self._not_before:
                self._join_or_start()

    def close(self) -> None:
        """Forget the token, end a renewal under way, close the connections.

        Those who wait for the renewal get a `FetcherClosedError`. The signer stays open.
        """
        forks.notice()
        with self._lock:
            self._closed = True
            self._held = self._refused = None
            self._fresh = (_NEVER, _NEVER, _NO_TOKEN)
            flight, self._flight = self._flight, None
        if flight is not None:
            flight.stopped.set()
            flight.end(FetcherClosedError("The token fetcher was closed during a renewal."))
        self._endpoint.close()
        self._renewal.close()
        if flight is not None:
            # Bounded: a signer that hangs in a vendor's library cannot be called back.
            flight.join(_EXIT_GRACE)

    def _token_not_fresh(self, timeout: float | None) -> AccessToken:
        patience = self._limits.total if timeout is None else seconds(timeout, "timeout", least=0)
        require_patched_first()
        forks.notice()
        until = time.monotonic() + patience
        failure: D1SignerError | None = None
        while True:
            token = self.token_now()
            if token is not None:
                return token
            flight = self._awaited(until)
            if isinstance(flight, AccessToken):
                return flight
            flight.awaited_in(current_span())
            # A renewal that began at once ends in time by itself, and then has its error to tell.
            bounded = timeout is not None or failure is not None or flight.starts_in > 0
            if not self._ended(flight, until if bounded else None):
                if failure is None and timeout is None:
                    failure = self._last_failure
                raise not_in_time(patience, failure)
            try:
                held = flight.held()
            except TokenUnavailable as error:
                # Its patience is the caller's own: who came late has some left.
                if not passes(error):
                    raise
                failure = error.fresh()
                continue
            if self._state(held) is not State.EXPIRED:
                return held.token
            # It lived for a moment only, or the wall clock was set: it died while we woke up.
            if time.monotonic() >= until:
                raise none_that_lives(patience)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and write to the log without it: a handler of that may ask for a token."""
        try:
            with self._lock, self._here.within():
                yield
        finally:
            self._journal.write()

    def _awaited(self, until: float) -> Flight | AccessToken:
        """The flight to wait for; or a token that came just now."""
        inside = self._here.inside
        with self._locked():
            self._require_open()
            held = self._held
            if held is not None and self._state(held) is not State.EXPIRED:
                return held.token
            failure, early = self._last_failure, self._not_before - self._clock()
            if self._flight is None and failure is not None and early > 0:
                nothing_will_come = early >= until - time.monotonic()
                if nothing_will_come or not passes(failure):
                    raise failure.fresh()
            if inside:
                raise waits_for_itself()
            return self._join_or_start()

    def _state(self, held: HeldToken | None) -> State:
        if held is None or self._wall() >= held.token.expires_at:
            return State.EXPIRED
        return held.state(self._clock())

    def _life(self) -> float:
        held = self._held
        return 0.0 if held is None else held.left(self._clock(), self._wall())

    def _require_open(self) -> None:
        if self._closed:
            raise FetcherClosedError("The token fetcher is closed.", hint="Make a new one.")

    def _renew_in_background(self) -> None:
        forks.notice()
        if self._clock() < self._not_before or not self._lock.acquire(blocking=False):
            return
        try:
            if not self._closed and self._state(self._held) is not State.FRESH:
                self._join_or_start()
        except TokenError:  # the caller has a valid token and need not know
            self._not_before = self._clock() + self._retry_interval
        finally:
            self._lock.release()
            self._journal.write()

    def _join_or_start(self) -> Flight:
        """The flight under way, else a new one; that none can begin is noted. The lock is held."""
        if self._flight is not None and time.monotonic() < self._flight.deadline:
            return self._flight
        if self._flight is not None:
            self._abandon(self._flight)
        self._hanging = [hanging for hanging in self._hanging if hanging.is_flying()]
        if len(self._hanging) >= _MOST_HANGING:
            raise self._none_begins(all_hang(self._hanging))
        starts_in = max(0.0, self._not_before - self._clock())
        flight = Flight(starts_in=starts_in, total=self._limits.total)
        self._flight = flight
        try:
            flight.begin(self._fly)
        except TokenError as error:
            self._flight = None
            raise self._none_begins(error) from None
        return flight

    def _none_begins(self, error: TokenError) -> D1SignerError:
        """Tell, now and then, that no flight can begin; the next call tries again all the same."""
        if self._clock() >= self._quiet_until:
            self._quiet_until = self._clock() + LONGEST_BACK_OFF
            self._journal.failed(error, None, self._life())
        return error.fresh()

    def _ended(self, flight: Flight, until: float | None) -> bool:
        """Wait for a flight, until a moment at most; or to its end, which it is brought to."""
        last = flight.deadline + _ABORT_GRACE
        if until is not None and until < last:
            return flight.wait(max(until - time.monotonic(), 0.0))
        if not flight.wait(max(last - time.monotonic(), 0.0)):
            with self._locked():
                if self._flight is flight:
                    self._abandon(flight)
            flight.wait(_ABORT_GRACE)
        return True

    def _abandon(self, flight: Flight) -> None:
        """Give up on a flight past its deadline: its thread hangs somewhere. The lock is held."""
        self._flight = None
        self._hanging.append(flight)
        flight.stopped.set()
        error = hangs(flight, self._limits.total)
        self._note_failure(error, self._limits.total)
        flight.end(error)
        self._endpoint.abort()

    def _fly(self, flight: Flight) -> None:
        result: HeldToken | D1SignerError
        flight.is_mine()
        self._here.inside = True
        if flight.starts_in and flight.stopped.wait(flight.starts_in):
            return  # whoever stopped it has told those who wait
        started = time.perf_counter()
        left_to("an observer")
        self._journal.begin()
        try:
            result = self._renewal.obtain(
                deadline=flight.deadline, stopped=flight.stopped, refused=self._refused
            )
        except D1SignerError as error:
            result = error.fresh()
        except BaseException as error:  # noqa: BLE001 (whoever waits must be told in any case)
            result = TokenError(f"The renewal failed with {type(error).__name__}.")
        try:
            with self._locked():
                if self._flight is flight:
                    self._flight = None
                    if isinstance(result, HeldToken):
                        self._note_success(result, time.perf_counter() - started)
                    else:
                        self._note_failure(result, time.perf_counter() - started)
        finally:
            flight.end(result)
        self._journal.tell(result, time.perf_counter() - started, self._life(), flight.callers)

    def _note_success(self, held: HeldToken, duration: float) -> None:
        self._held = held
        self._hand_out(held)
        self._last_failure, self._quiet_until = None, _NEVER
        self._young_until = self._clock() + _YOUNG
        # Tokens that live for a moment only must not become a loop of requests.
        self._not_before = self._clock() + self._retry_interval
        self._journal.succeeded(held, duration)

    def _note_failure(self, error: D1SignerError, duration: float | None = None) -> None:
        self._last_failure = error
        failures, least = self._journal.failures, self._retry_interval
        self._not_before = self._clock() + pause_after(error, failures=failures, least=least)
        self._journal.failed(error, duration, self._life())

    def _after_fork(self) -> None:
        """In a forked child: the parent's flight, lock, lease and connections are not ours."""
        self._begin_without_flight()
        self._renewal.begin_without_lease()


def _after_fork_in_child() -> None:
    for keeper in list(_keepers):
        keeper._after_fork()  # noqa: SLF001 (this module's own class)


def _at_exit() -> None:
    # A worker inside a PKCS#11 module while the interpreter goes away can crash the process.
    for keeper in list(_keepers):
        TokenKeeper.close(keeper)  # and not what is below it: keys have an end of their own


forks.in_child(_after_fork_in_child)
atexit.register(_at_exit)

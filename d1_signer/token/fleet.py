# SPDX-License-Identifier: Apache-2.0
"""One renewal for a whole fleet: the token in a shared store, the right to renew in a lease.

The lease is best effort: a store that is away, or a lease that runs out or that no renewal can have
taken, costs an extra request and never an error.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from d1_signer.errors import FetcherClosedError, StoreUnavailable, TokenTimeout
from d1_signer.logfmt import told
from d1_signer.secret import Secret
from d1_signer.signing.steps import Step
from d1_signer.token.access_token import HeldToken, hold
from d1_signer.token.bounded import BoundedStore
from d1_signer.token.clock import Clock
from d1_signer.token.d1 import MAX_TOKEN_LIFETIME, AssertionProfile, Environment
from d1_signer.token.register import About, Announcer, name_of
from d1_signer.token.renewal import NO_TIME, Limits, Renewal
from d1_signer.token.status import LeaseState, StoreState
from d1_signer.token.stores import (
    MAX_SEALED,
    Lease,
    Sealer,
    SharedToken,
    TokenStore,
)

_log = logging.getLogger("d1_signer.fleet")

# Of the total time limit: what the holder of the lease has for its work, and how long the lease
# lives. It outlives the work; and whoever waits for a holder that died has time for its own turn.
_TURN = 1 / 2
_LEASE = 2 / 3
# Between two looks for the holder's token: a part of what was waited for so far, so that thousands
# who wait in an outage of D1 do not wear out the store.
_LOOK = 1 / 4
_FIRST_LOOK = 0.01
_LONGEST_LOOK = 1.0
_UNREADABLE = (
    "The store's token was not sealed with this store_key, so this process fetches its own. "
    "Give all of the fleet the same store_key."
)


class FleetRenewal:
    """Takes a fresh token from the store, or obtains one for everybody under the lease.

    Attributes:
        whose: Names of D1's host and the issuer, for lines of the log.
        store_state: What the last load has shown, or a call that has failed since.
        store_error: What is wrong with it, and what to do; None where nothing is.
        lease_state: Who renewed when it was looked at last.
    """

    def __init__(
        self,
        renewal: Renewal,
        store: TokenStore,
        *,
        key: Secret | None,
        issuer_id: str,
        environment: Environment,
        limits: Limits,
        clock: Clock,
        wall: Clock,
        about: About,
    ) -> None:
        """Put a store in front of a renewal.

        Raises:
            ConfigurationError: The key is missing or not 32 bytes.
        """
        self._renewal = renewal
        self._store = BoundedStore(store)
        self._sealer = Sealer(key, issuer_id=issuer_id, base_url=environment.base_url)
        self._clock = clock
        self._wall = wall
        self._total = limits.total
        self._name = name_of(issuer_id, environment)
        self.announcer = Announcer(store, self._sealer, self._name, about)
        self._kept: Lease | None = None
        # Whoever can write to the store can put back what it held before.
        self._generation = 0
        self._refused: dict[bytes, float] = {}
        self.whose = renewal.whose
        self.store_state = StoreState.UNUSED
        self.store_error: str | None = None
        self._told_unreadable = False
        self.lease_state = LeaseState.NONE

    def close(self) -> None:
        """End what goes on beside renewals."""
        self.announcer.close()

    def begin_without_lease(self) -> None:
        """In a forked child: the parent's lease is not ours, nor ours to give back."""
        self._kept = None
        if self.lease_state is not LeaseState.NONE:
            self.lease_state = LeaseState.ANOTHERS

    def change(self, *, limits: Limits, profile: AssertionProfile) -> None:
        """See `Renewal.change`."""
        self._total = limits.total
        self._renewal.change(limits=limits, profile=profile)

    def obtain(
        self, *, deadline: float, stopped: threading.Event, refused: str | None
    ) -> HeldToken:
        """Obtain a token from the store or from D1; see `Renewal.obtain`.

        Args:
            deadline: Moment on ``time.monotonic()`` by which to return or raise.
            stopped: Set by whoever wants no result any more.
            refused: Value of a token that the API refused: it is not taken from the store, now or
                later.
        """
        if refused is not None:
            self._remember(refused)
            refused = None  # the frame of an error shows its local variables
        self._told_unreadable = False
        held = self._obtain(deadline, stopped)
        self.announcer.begin()
        return held

    def _obtain(self, deadline: float, stopped: threading.Event) -> HeldToken:
        began = time.monotonic()
        while True:
            try:
                self._give_back(deadline)
                shared = self._shared(deadline)
                if shared is not None:
                    return shared
                # Counted from before the lease, so that the lease outlives it.
                turn = min(deadline, time.monotonic() + self._total * _TURN)
                with self._leased(deadline) as mine:
                    # Between the look and the lease another may have renewed and gone.
                    shared = self._shared(deadline) if mine else None
                    if shared is not None:
                        return shared
                    if mine:
                        held = self._renewal.obtain(deadline=turn, stopped=stopped)
                        self._share(held, deadline)
                        return held
            except StoreUnavailable as error:
                _log.warning("fleet.store_unavailable %s", self._noted(error))
                if deadline - time.monotonic() < NO_TIME:  # D1 would seem to be what is slow
                    raise TokenTimeout(
                        f"No time is left to ask D1 for a token: {error.message}",
                        hint=f"{error.hint} It is tried again by itself.".lstrip(),
                    ) from None
                return self._renewal.obtain(deadline=deadline, stopped=stopped)
            now = time.monotonic()
            look = max(_FIRST_LOOK, min(_LOOK * (now - began), _LONGEST_LOOK, (deadline - now) / 2))
            if now + look >= deadline:
                raise TokenTimeout(
                    "Another process renews the token and has not ended in time.",
                    hint="It is tried again by itself.",
                )
            with Step("another process, which renews the token"):
                stopped.wait(look * (0.5 + random.random()))  # noqa: S311 (spreads load)
            if stopped.is_set():
                raise FetcherClosedError("The token fetcher was closed during a renewal.")

    def _shared(self, deadline: float) -> HeldToken | None:
        """The store's token, if it is fresh and none that was there before."""
        now, wall = self._clock(), self._wall()
        found = self._store.load(self._name, deadline=deadline)
        token = None
        if found is not None and len(found[0]) <= MAX_SEALED:
            token = self._sealer.open(found[0])
        self._note_store(unreadable=found is not None and token is None)
        if (
            found is None
            or token is None
            or token.generation < self._generation
            or _digest(token) in self._refused
        ):
            return None
        self._generation = token.generation
        life = token.expires_at - token.requested_at
        # The store's own count does not depend on the clocks of two machines being alike. Ours are
        # read before it, which errs on the safe side.
        remaining = min(token.expires_at - wall, found[1])
        held = partial(
            hold,
            value=token.value,
            scope=token.scope,
            expires_in=life,
            requested_at=now + remaining - life,
            requested_at_wall=wall + remaining - life,
            shared=True,
        )
        # By the earliest moment: one drawn at random would give a member that renews early its own
        # token back.
        if self._clock() >= held(chance=0.0).renew_at:
            return None
        return held(chance=random.random())  # noqa: S311 (spreads load, keeps no secret)

    def _note_store(self, *, unreadable: bool) -> None:
        """Note what the store has given; another key is told of in each renewal, once."""
        if unreadable and not self._told_unreadable:
            self._told_unreadable = True
            _log.error("fleet.token_unreadable %s", told({**self.whose, "message": _UNREADABLE}))
        self.store_state = StoreState.UNREADABLE if unreadable else StoreState.WORKING
        self.store_error = _UNREADABLE if unreadable else None

    def _noted(self, error: StoreUnavailable) -> str:
        """Keep for `status` what is wrong with the store; gives what a line tells of it."""
        self.store_state, self.store_error = StoreState.AWAY, str(error)
        return told({**self.whose, **error.details, "message": error})

    def _remember(self, refused: str) -> None:
        """Keep in mind what is not to be taken again, for as long as it may live."""
        now = self._clock()
        kept = {digest: until for digest, until in self._refused.items() if until > now}
        self._refused = {**kept, _digest(refused): now + MAX_TOKEN_LIFETIME}

    @contextmanager
    def _leased(self, deadline: float) -> Iterator[bool]:
        life = self._total * _LEASE
        lease = self._store.lease(self._name, life=life, deadline=deadline)
        self.lease_state = LeaseState.ANOTHERS if lease is None else LeaseState.OURS
        try:
            yield lease is not None
        finally:
            try:
                if lease is not None:
                    self._store.release(lease, deadline=deadline)
                    self.lease_state = LeaseState.NONE
            except StoreUnavailable as error:
                self._kept, self.lease_state = lease, LeaseState.KEPT
                _log.warning("fleet.lease_not_released %s", self._noted(error))

    def _give_back(self, deadline: float) -> None:
        """Release what could not be released when its work was done."""
        if self._kept is not None:
            self._store.release(self._kept, deadline=deadline)
            self._kept = None

    def _share(self, held: HeldToken, deadline: float) -> None:
        # By both clocks: the wall clock may have been set since the request, and the other one
        # stood still if a virtual machine was suspended without noticing.
        wall = self._wall()
        remaining = min(held.dies_at - self._clock(), held.token.expires_at - wall)
        # The time, for a store that has lost what it held and a member that has seen nothing yet;
        # and more than what was seen, for clocks that differ.
        self._generation = max(self._generation + 1, int(wall))
        sealed = self._sealer.seal(
            SharedToken(
                value=held.token.value,
                scope=held.token.scope,
                requested_at=wall + remaining - (held.dies_at - held.requested_at),
                expires_at=wall + remaining,
                generation=self._generation,
            )
        )
        if remaining <= 0 or len(sealed) > MAX_SEALED:
            return
        try:
            self._store.save(self._name, sealed, life=remaining, deadline=deadline)
        except StoreUnavailable as error:
            _log.warning("fleet.token_not_shared %s", self._noted(error))


def _digest(token: SharedToken | str) -> bytes:
    value = token.value if isinstance(token, SharedToken) else token
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from d1_signer.errors import FetcherClosedError, StoreUnavailable, TokenTimeout
from d1_signer.secret import Secret
from d1_signer.token.access_token import HeldToken, hold
from d1_signer.token.clock import Clock
from d1_signer.token.d1 import Environment
from d1_signer.token.renewal import Limits, Renewal
from d1_signer.token.stores import Lease, Sealer, SharedToken, TokenStore

_log = logging.getLogger("d1_signer.fleet")
_P = ParamSpec("_P")
_T = TypeVar("_T")

# Of the total time limit: what the holder of the lease has for its work, and how long the lease
# lives. It outlives the work; and whoever waits for a holder that died has time for its own turn.
_TURN = 1 / 2
_LEASE = 2 / 3
_FIRST_LOOK = 0.01
_LONGEST_LOOK = 0.25


class FleetRenewal:
    """Takes a fresh token from the store, or obtains one for everybody under the lease."""

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
    ) -> None:
        """Put a store in front of a renewal.

        Raises:
            ConfigurationError: The key is missing or not 32 bytes.
        """
        self._renewal = renewal
        self._store = store
        self._sealer = Sealer(key, issuer_id=issuer_id, base_url=environment.base_url)
        self._clock = clock
        self._wall = wall
        self._turn = limits.total * _TURN
        self._lease_life = limits.total * _LEASE
        # A store is often shared with others, who need not read who our issuer is.
        identity = hashlib.sha256(f"{issuer_id}\0{environment.base_url}".encode()).hexdigest()
        self._name = f"d1-signer:{{{identity[:32]}}}"
        self._kept: Lease | None = None

    def obtain(
        self, *, deadline: float, stopped: threading.Event, refused: str | None
    ) -> HeldToken:
        """Obtain a token from the store or from D1; see `Renewal.obtain`.

        Args:
            deadline: Moment on ``time.monotonic()`` by which to return or raise.
            stopped: Set by whoever wants no result any more.
            refused: Value of a token that the API refused: it is not taken from the store.
        """
        look = _FIRST_LOOK
        while True:
            try:
                self._give_back()
                shared = self._shared(refused)
                if shared is not None:
                    return shared
                # Counted from before the lease, so that the lease outlives it.
                turn = min(deadline, time.monotonic() + self._turn)
                with self._leased() as mine:
                    # Between the look and the lease another may have renewed and gone.
                    shared = self._shared(refused) if mine else None
                    if shared is not None:
                        return shared
                    if mine:
                        held = self._renewal.obtain(deadline=turn, stopped=stopped)
                        self._share(held)
                        return held
            except StoreUnavailable as error:
                _log.warning("fleet.store_unavailable: going on without it: %s", error.message)
                return self._renewal.obtain(deadline=deadline, stopped=stopped)
            if time.monotonic() + look >= deadline:
                raise TokenTimeout(
                    "Another process renews the token and has not ended in time.",
                    hint="It is tried again by itself.",
                )
            if stopped.wait(look * (0.5 + random.random())):  # noqa: S311 (spreads load)
                raise FetcherClosedError("The token fetcher was closed during a renewal.")
            look = min(2 * look, _LONGEST_LOOK)

    def _shared(self, refused: str | None) -> HeldToken | None:
        """The store's token, if it is fresh."""
        now, wall = self._clock(), self._wall()
        found = _asked(self._store.load, self._name)
        token = None if found is None else self._sealer.open(found[0])
        if found is None or token is None or token.value == refused:
            return None
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

    @contextmanager
    def _leased(self) -> Iterator[bool]:
        lease = _asked(self._store.lease, self._name, life=self._lease_life)
        try:
            yield lease is not None
        finally:
            try:
                if lease is not None:
                    _asked(lease.release)
            except StoreUnavailable as error:
                self._kept = lease
                _log.warning("fleet.lease_not_released: %s", error.message)

    def _give_back(self) -> None:
        """Release what could not be released when its work was done."""
        if self._kept is not None:
            _asked(self._kept.release)
            self._kept = None

    def _share(self, held: HeldToken) -> None:
        # By both clocks: the wall clock may have been set since the request, and the other one
        # stood still if a virtual machine was suspended without noticing.
        wall = self._wall()
        remaining = min(held.dies_at - self._clock(), held.token.expires_at - wall)
        token = SharedToken(
            value=held.token.value,
            scope=held.token.scope,
            requested_at=wall + remaining - (held.dies_at - held.requested_at),
            expires_at=wall + remaining,
        )
        try:
            if remaining > 0:
                sealed = self._sealer.seal(token)
                _asked(self._store.save, self._name, sealed, life=remaining)
        except StoreUnavailable as error:
            _log.warning("fleet.token_not_shared: %s", error.message)


def _asked(call: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """Call a store; whatever one of somebody else's raises means that it is away."""
    try:
        return call(*args, **options)
    except StoreUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 (a store may be anybody's code)
        kind = type(error).__name__
    raise StoreUnavailable(f"The token store failed with {kind}.", hint="Look at the store's code.")

# SPDX-License-Identifier: Apache-2.0
"""A store of anybody's, each of whose calls ends in time, whatever the store does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from d1_signer.errors import StoreUnavailable
from d1_signer.signing.steps import Step
from d1_signer.token.stores import Abortable, Lease, TokenStore
from d1_signer.transport.deadlines import run_until
from d1_signer.transport.processes import PerProcess

_T = TypeVar("_T")

# Seconds for a call; and for which a store that took longer is left alone, so that the rest of that
# renewal does not wait for it again.
_LONGEST = 1.0
_REST = 1.0
# Of what is left of a renewal, so that a store that hangs leaves most of it to D1.
_SHARE = 1 / 4
_MOST_HANGING = 4


class BoundedStore:
    """Calls a store in threads that can be left behind; what it raises means that it is away."""

    def __init__(self, store: TokenStore) -> None:
        """Bound a store."""
        self._store = store
        self._kind = type(store).__name__
        self._under_way: PerProcess[set[object]] = PerProcess(set)
        self._rests_until = float("-inf")

    def load(self, name: str, *, deadline: float) -> tuple[bytes, float] | None:
        """See `TokenStore.load`; ``deadline`` is the renewal's, on ``time.monotonic()``."""
        return self._call(lambda _: _as_promised(self._store.load(name)), deadline)

    def save(self, name: str, sealed: bytes, *, life: float, deadline: float) -> None:
        """See `TokenStore.save`."""
        self._call(lambda _: self._store.save(name, sealed, life=life), deadline)

    def lease(self, name: str, *, life: float, deadline: float) -> Lease | None:
        """See `TokenStore.lease`; one that comes too late is given back."""

        def take(until: float) -> Lease | None:
            lease = self._store.lease(name, life=life)
            if lease is not None and time.monotonic() >= until:
                lease.release()
            return lease

        return self._call(take, deadline)

    def release(self, lease: Lease, *, deadline: float) -> None:
        """See `Lease.release`."""
        self._call(lambda _: lease.release(), deadline)

    def use(self, work: Callable[[], _T], *, deadline: float) -> _T:
        """Call the store for something else, as the others are called."""
        return self._call(lambda _: work(), deadline)

    def _call(self, work: Callable[[float], _T], deadline: float) -> _T:
        now = time.monotonic()
        if now < self._rests_until:
            raise self._away("has just not answered in time and is left alone for a moment")
        under_way = self._under_way.get()
        if len(under_way) >= _MOST_HANGING:
            raise self._away(f"has {len(under_way)} calls that do not end")
        until = now + min(_LONGEST, (deadline - now) * _SHARE)
        call = object()

        def run() -> _T:
            under_way.add(call)
            try:
                with Step(f"the token store {self._kind}"):
                    return work(until)
            finally:
                under_way.discard(call)

        try:
            return run_until(until, run)
        except StoreUnavailable:
            raise
        except TimeoutError:
            self._rests_until = time.monotonic() + _REST
            if isinstance(self._store, Abortable):
                self._store.abort()
            failed = "did not answer in time"
        except Exception as error:  # noqa: BLE001 (a store may be anybody's code)
            failed = f"failed with {type(error).__name__}"
        raise self._away(failed)

    def _away(self, what: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"The token store {self._kind} {what}.",
            hint="Look at the store; tokens are fetched without it meanwhile.",
        )


def _as_promised(found: object) -> tuple[bytes, float] | None:
    if found is None:
        return None
    match found:
        case (bytes(sealed), float(life) | int(life)) if math.isfinite(life):
            return sealed, life
    raise TypeError

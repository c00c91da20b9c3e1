# SPDX-License-Identifier: Apache-2.0
"""A fleet of any size on simulated time: the figures of docs/fleet.md.

``python -m tests.token.fleet.simulation.scale [NUMBER[/STORES]…]`` prints them for so many
processes, which share so many stores (one where it is not said).

A hundred thousand processes are too many for threads. Here each is a few numbers, and what it does
next an event. When a token is renewed is decided by the package's own `hold`; how leases are taken,
looked at and given up follows `FleetRenewal` by its own constants. ``test_scale.py`` compares this
model with the real modules on simulated threads, at a size that both can do.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from d1_signer.token import fleet
from d1_signer.token.access_token import HeldToken, hold
from d1_signer.token.renewal import Limits

LIFE = 900.0
_TOTAL = Limits().total
_LATENCY = 0.3  # of D1, with the signature
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # between the attempts of a renewal
_FIRST_REST, _LONGEST_REST = 1.0, 15.0  # between renewals that fail
# Measured with Redis 7.0 on one core of a small machine, the client's share of it left out.
_LOAD, _LEASE, _WRITE = 10e-6, 16e-6, 10e-6  # seconds of the server's time
_WAY = 0.0005
_CLIENT_TIMEOUT = 0.4


@dataclass
class Figures:
    """What a run came to."""

    requests: Counter[int] = field(default_factory=Counter)  # in each second
    store: Counter[int] = field(default_factory=Counter)  # round trips in each second
    waited: float = 0.0  # longest wait of a caller without a valid token
    noticed: float | None = None  # when the first caller had none that had had one before
    errors: int = 0  # renewals that failed while no token was valid


class Process:
    """One process whose callers never stop."""

    __slots__ = ("began", "cold_since", "deadline", "failures", "held")

    def __init__(self, now: float) -> None:
        self.held: HeldToken | None = None
        self.failures = 0
        self.began = self.deadline = 0.0
        self.cold_since: float | None = now


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A fleet and what goes wrong.

    Attributes:
        number: Processes.
        seconds: How long it is watched.
        starts_within: Seconds in which all start.
        store: Whether they share one.
        d1_away: From when to when D1 is out of reach.
        store_away: From when to when the store is.
    """

    number: int
    seconds: float
    starts_within: float = 60.0
    store: bool = True
    d1_away: tuple[float, float] = (0.0, 0.0)
    store_away: tuple[float, float] = (0.0, 0.0)
    seed: int = 1


class Fleet:
    """Runs one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.figures = Figures()
        self._now = 0.0
        self._chance = random.Random(setting.seed)
        self._events: list[tuple[float, int, Callable[[Process], None], Process]] = []
        self._order = itertools.count()
        self._stored: HeldToken | None = None
        self._leased_until = 0.0
        self._store_free_at = 0.0

    def run(self) -> Figures:
        for _ in range(self.setting.number):
            start = self._chance.uniform(0.0, self.setting.starts_within)
            self._at(start, self._flight, Process(start))
        while self._events:
            self._now, _, event, process = heapq.heappop(self._events)
            if self._now > self.setting.seconds:
                break
            event(process)
        return self.figures

    def _at(self, moment: float, event: Callable[[Process], None], process: Process) -> None:
        heapq.heappush(self._events, (moment, next(self._order), event, process))

    # -- a renewal ----------------------------------------------------------------------------

    def _flight(self, process: Process) -> None:
        process.began, process.deadline = self._now, self._now + _TOTAL
        if self.setting.store:
            self._look(process)
        else:
            self._attempt(process, self._now + _TOTAL, 0, leased=False)

    def _look(self, process: Process) -> None:
        answered = self._ask(_LOAD)
        if answered is None:
            self._alone(process)
            return
        stored = self._stored
        # As in `FleetRenewal._shared`: fresh by the earliest moment.
        if stored is not None and self._now < self._held(stored.requested_at, chance=0.0).renew_at:
            chance = self._chance.random()
            self._took(process, self._held(stored.requested_at, chance=chance), answered)
            return
        answered = self._ask(_LEASE)
        if answered is None:
            self._alone(process)
        elif self._leased_until <= self._now:
            self._leased_until = self._now + _TOTAL * fleet._LEASE
            self._attempt(process, self._now + _TOTAL * fleet._TURN, 0, leased=True)
        else:
            self._wait(process)

    def _wait(self, process: Process) -> None:
        waited, left = self._now - process.began, process.deadline - self._now
        look = max(fleet._FIRST_LOOK, min(fleet._LOOK * waited, fleet._LONGEST_LOOK, left / 2))
        if look >= left:
            self._failed(process)
        else:
            self._at(self._now + look * (0.5 + self._chance.random()), self._look, process)

    def _alone(self, process: Process) -> None:
        # A store that is refused costs nothing, one that does not answer the client's patience.
        away = self._is(self.setting.store_away)
        self._at(
            self._now + (0.0 if away else _CLIENT_TIMEOUT),
            lambda each: self._attempt(each, each.deadline, 0, leased=False),
            process,
        )

    def _attempt(self, process: Process, until: float, number: int, *, leased: bool) -> None:
        self.figures.requests[int(self._now)] += 1
        if not self._is(self.setting.d1_away):
            held = self._held(self._now, chance=self._chance.random())
            if leased:
                self._at(self._now + _LATENCY, lambda _: self._share(held), process)
            self._took(process, held, self._now + _LATENCY)
            return
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**number)
        pause = longest * (1 + self._chance.random()) / 2
        if self._now + pause >= until:
            if leased:
                self._leased_until = self._now
            self._failed(process)
            return
        self._at(
            self._now + pause,
            lambda each: self._attempt(each, until, number + 1, leased=leased),
            process,
        )

    def _share(self, held: HeldToken) -> None:
        self._ask(_WRITE)
        self._ask(_WRITE)
        self._stored, self._leased_until = held, self._now

    def _took(self, process: Process, held: HeldToken, moment: float) -> None:
        process.held, process.failures = held, 0
        self._no_longer_cold(process, moment)
        self._at(max(moment, held.renew_at), self._flight, process)

    def _failed(self, process: Process) -> None:
        process.failures += 1
        held = process.held
        if held is None or self._now >= held.unusable_at:
            self.figures.errors += 1
            if held is not None:
                process.cold_since = held.unusable_at
                noticed = self.figures.noticed
                self.figures.noticed = min(noticed or held.unusable_at, held.unusable_at)
        rest = min(_FIRST_REST * 2.0 ** min(process.failures - 1, 10), _LONGEST_REST)
        self._at(self._now + rest * (1 + self._chance.random() / 4), self._flight, process)

    def _no_longer_cold(self, process: Process, moment: float) -> None:
        if process.cold_since is not None:
            self.figures.waited = max(self.figures.waited, moment - process.cold_since)
            process.cold_since = None

    @staticmethod
    def _held(requested_at: float, *, chance: float) -> HeldToken:
        return hold(
            value="",
            scope="",
            expires_in=LIFE,
            requested_at=requested_at,
            requested_at_wall=requested_at,
            chance=chance,
        )

    # -- the store ----------------------------------------------------------------------------

    def _ask(self, cost: float) -> float | None:
        """When its answer is there; None where it is not in time."""
        if self._is(self.setting.store_away):
            return None
        self.figures.store[int(self._now)] += 1
        self._store_free_at = max(self._store_free_at, self._now) + cost
        answered = self._store_free_at + _WAY
        return answered if answered - self._now < _CLIENT_TIMEOUT else None

    def _is(self, span: tuple[float, float]) -> bool:
        return span[0] <= self._now < span[1]


# -- the figures of the page ----------------------------------------------------------------------

_HOUR = 3600.0
# When the first renewals are due in a fleet that has started at 0; before that nothing happens.
_DUE = LIFE * 2 / 3 * 0.9


@functools.cache
def rows(number: int, stores: int = 1) -> list[tuple[str, str]]:
    """The figures for so many processes, as docs/fleet.md has them."""
    # What shares one store knows nothing of the others, so all are alike.
    each = functools.partial(Setting, number=number // stores)
    shared = Fleet(each(seconds=_HOUR)).run()
    alone = Fleet(each(seconds=_HOUR, store=False)).run()
    at_once = Fleet(each(seconds=60.0, starts_within=1.0)).run()
    rolling = Fleet(each(seconds=400.0, starts_within=300.0)).run()
    no_store = Fleet(each(seconds=_HOUR, store_away=(300.0, 1500.0))).run()
    away = (_DUE - 30, _DUE + 370)
    no_d1 = Fleet(each(seconds=away[1], d1_away=away)).run()
    first = min(second for second in no_d1.requests if second >= away[0])
    tried = 60 / (away[1] - first) * sum(n for at, n in no_d1.requests.items() if at >= first)
    return [
        ("**a store, all well**: requests in the first hour", _total(shared, stores)),
        ("of a store: round trips, most in a second", _most(shared.store)),
        ("**no store**: requests in the first hour", _total(alone, stores)),
        ("most in a second", _most(alone.requests, stores)),
        ("**all start within a second**: requests", _total(at_once, stores)),
        ("of a store: round trips, most in a second", _most(at_once.store)),
        ("longest wait for the first token", f"{at_once.waited:.1f} s"),
        ("**all start within five minutes**: requests", _total(rolling, stores)),
        ("longest wait for the first token", f"{rolling.waited:.1f} s"),
        (
            "**the store away for 20 minutes**: requests in that hour",
            _total(no_store, stores),
        ),
        ("most in a second", _most(no_store.requests, stores)),
        ("renewals that fail while no token is valid", f"{stores * no_store.errors:,}"),
        ("**D1 away for 400 s**: attempts a minute", f"{stores * tried:,.0f}"),
        ("of a store: round trips, most in a second", _most(no_d1.store)),
        (
            "first caller without a token, from the first attempt",
            "none" if no_d1.noticed is None else f"after {no_d1.noticed - first:.0f} s",
        ),
    ]


def _total(figures: Figures, stores: int) -> str:
    return f"{stores * sum(figures.requests.values()):,}"


def _most(counts: Counter[int], stores: int = 1) -> str:
    return f"{stores * max(counts.values(), default=0):,}"


def main() -> None:
    """Print the figures in Markdown."""
    asked = [tuple(map(int, each.split("/"))) for each in sys.argv[1:]]
    fleets = asked or [(10,), (1_000,), (10_000,), (100_000, 10)]
    columns = [rows(*each) for each in fleets]
    heads = [f"{each[0]:,}" + "".join(f" in {n} stores" for n in each[1:]) for each in fleets]
    print("| processes | " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * len(heads))
    for line in zip(*columns, strict=True):
        print(f"| {line[0][0]} | " + " | ".join(figure for _, figure in line) + " |")


if __name__ == "__main__":
    main()

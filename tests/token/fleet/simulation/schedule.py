# SPDX-License-Identifier: Apache-2.0
"""One random schedule of faults: a fleet, its callers, and what must hold throughout."""

from __future__ import annotations

import random
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from d1_signer import (
    D1SignerError,
    Limits,
    Signer,
    SignerSet,
    TokenFetcher,
)
from d1_signer.signing import signer, signer_set
from d1_signer.token import assertion, bounded, fetcher as token, fleet, flight, keeper, renewal
from d1_signer.token.access_token import State
from d1_signer.transport import deadlines
from tests.token.fleet.simulation.doubles import (
    D1,
    Device,
    Plan,
    SimulatedEndpoint,
    Store,
    Trouble,
    machine,
)
from tests.token.fleet.simulation.world import Process, World

# Seconds: troubles come in the first part; in the second all must recover by itself.
_TROUBLED = 1500.0
_CALM = 150.0
_LIMITS = Limits()
_KEY = bytes(32)
_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

_ON_SIMULATED_TIME = (
    token,
    keeper,
    flight,
    renewal,
    fleet,
    bounded,
    deadlines,
    signer,
    signer_set,
    assertion,
)

_KINDS = {
    "d1-unreachable": (0.0,),
    "d1-silent": (0.0,),
    "d1-slow": (1.0, 4.0, 9.0, 14.0),
    "d1-busy": (0.0, 3.0, 40.0, 100_000.0),
    "d1-throttles": (0.0, 3.0),
    "d1-refuses": (0.0,),
    "d1-garbles": (0.0,),
    "d1-loses-answers": (0.0,),
    "d1-short": (0.2, 2.0, 30.0),
    "store-down": (0.0,),
    "store-hangs": (0.0,),
    "store-loses-answers": (0.0,),
    "store-garbles": (0.0,),
    "hsm-down-0": (0.0,),
    "hsm-down-1": (0.0,),
    "hsm-refuses-0": (0.0,),
    "hsm-hangs-0": (5.0, 25.0, 60.0),
    "hsm-slow-0": (2.0, 12.0),
}


@dataclass
class Outcome:
    """What a schedule came to."""

    seed: int
    problems: list[str]
    calls: int = 0
    errors: int = 0
    requests: int = 0
    troubles: list[Trouble] = field(default_factory=list)


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Let the real modules run on simulated time, with the double of the way to D1."""
    with ExitStack() as stack:
        for module in _ON_SIMULATED_TIME:
            stack.enter_context(patch.object(module, "time", world.time))
            if hasattr(module, "threading"):
                stack.enter_context(patch.object(module, "threading", world.threading))
        stack.enter_context(patch.object(token, "token_clock", world.boottime))
        stack.enter_context(patch.object(token, "TokenEndpoint", SimulatedEndpoint))
        yield


class Schedule:
    """A fleet of one to four processes under a plan of troubles."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        # Jitter and back-off in the real modules draw from the global generator.
        random.seed(seed)
        chance = self.world.chance
        troubles = [self._trouble() for _ in range(chance.randint(0, 6))]
        self.plan = Plan(self.world, troubles)
        self.d1 = D1(
            self.world,
            self.plan,
            kids={"k0", "k1"} if chance.random() < 0.9 else {"k1"},
            life=chance.choice([900.0, 900.0, 300.0, 60.0]),
        )
        SimulatedEndpoint.d1 = self.d1
        self.store = Store(self.world, self.plan) if chance.random() < 0.75 else None
        self.outcome = Outcome(seed, self.world.problems, troubles=troubles)
        self.rough = False
        self._revoked: set[str] = set()

    def _trouble(self) -> Trouble:
        chance = self.world.chance
        kind = chance.choice(list(_KINDS))
        begins = chance.choice([0.0, chance.uniform(0.0, _TROUBLED - 100)])
        length = chance.choice([0.5, 5.0, 40.0, 700.0])
        ends = min(begins + chance.uniform(0.0, length), _TROUBLED)
        return Trouble(kind, begins, ends, chance.choice(_KINDS[kind]))

    def run(self) -> Outcome:
        world = self.world
        for number in range(world.chance.randint(1, 4)):
            process = machine(world, number)
            world.spawn(process, self._process, process)
            self._mishap(process)
        with simulated(world):
            world.run()
            keeper._keepers.clear()
        self.outcome.requests = self.d1.requests
        self._judge_requests()
        return self.outcome

    def _mishap(self, process: Process) -> None:
        """Perhaps something happens to the machine."""
        world, chance = self.world, self.world.chance
        moment = chance.uniform(0.0, _TROUBLED)
        kind = chance.choice(["", "", "", "killed", "clock set", "suspended", "unnoticed"])

        def happens() -> None:
            self.rough = True
            if kind == "killed":
                process.alive = False
            elif kind == "clock set":
                process.skew = chance.uniform(-400, 400)
            else:
                seconds = chance.choice([3.0, 200.0, 2000.0])
                world.suspend(process, seconds, boot_notices=kind == "suspended")

        if kind:
            world.at(moment, happens)

    def _process(self, process: Process) -> None:
        world = self.world
        world.sleep(world.chance.choice([0.0, 0.0, world.chance.uniform(0.0, 200.0)]))
        members = [
            Signer(Device(world, self.plan, number), kid=f"k{number}")
            for number in range(world.chance.randint(1, 2) if "k0" in self.d1.kids else 2)
        ]
        fetcher = TokenFetcher(
            SignerSet(members, clock=world.monotonic),
            issuer_id="issuer",
            environment="https://d1.invalid/authz/v1",
            client_certificate=_CONTEXT,
            limits=_LIMITS,
            store=self.store,
            store_key=_KEY if self.store else None,
        )
        callers = [
            world.spawn(process, self._caller, fetcher) for _ in range(world.chance.randint(1, 3))
        ]
        world.block(lambda: all(task.done for task in callers), None)
        fetcher.close()

    def _caller(self, fetcher: TokenFetcher) -> None:
        world, chance = self.world, self.world.chance
        while world.now < _TROUBLED + _CALM:
            self._call(fetcher, chance.choice([None, None, 0.0, 0.5, 20.0]))
            world.sleep(chance.choice([0.0, 0.3, 5.0, 60.0, chance.uniform(0.0, 400.0)]))
        # A machine may have slept until here and have its failures, and their pauses, before it.
        for _ in range(4):
            world.sleep(_LIMITS.total)
            if self._call(fetcher, None) is not None:
                return
        world.problems.append("no token although all is well again")

    def _call(self, fetcher: TokenFetcher, timeout: float | None) -> str | None:
        world = self.world
        process = world._running().process
        began = world.now - process.lost
        self.outcome.calls += 1
        value = None
        try:
            value = fetcher.token(timeout=timeout).value
        except D1SignerError as error:
            self.outcome.errors += 1
            held = fetcher._held
            # A fresh one may have come since, through another thread; a stale one was there before.
            if held is not None and fetcher._state(held) is State.STALE:
                world.problems.append(f"{error.code} although a token is valid")
        waited = world.now - process.lost - began
        patience = _LIMITS.total + 2 if timeout is None else timeout
        if waited > patience + 0.01:
            world.problems.append(f"a call waited for {waited:.2f} of {patience} s")
        if value is not None:
            if not self.d1.is_valid(value) and value not in self._revoked:
                world.problems.append("an expired token was handed out")
            if world.chance.random() < 0.01:
                self._refuse(fetcher)
        return value

    def _refuse(self, fetcher: TokenFetcher) -> None:
        """The banking API answers 401 to the token that is held."""
        held = fetcher._held
        if held is not None:
            self._revoked.add(held.token.value)
            fetcher.invalidate(held.token)

    def _judge_requests(self) -> None:
        """One request at a time for the fleet, where the store was there all the time."""
        store_troubled = any(trouble.kind.startswith("store") for trouble in self.plan.troubles)
        if self.store and not store_troubled and not self.rough and self.d1.most_at_once > 1:
            self.world.problems.append("two requests under one lease")


def run(seed: int) -> Outcome:
    """Run one schedule; it is the same each time."""
    return Schedule(seed).run()

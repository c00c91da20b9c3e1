# SPDX-License-Identifier: Apache-2.0
"""The model of a large fleet does what the real modules do, and docs/fleet.md shows its figures.

``python -m tests.token.fleet.simulation.scale`` prints the figures.
"""

from __future__ import annotations

import random
import ssl
from collections import Counter
from typing import Any

import pytest

from d1_signer import D1SignerError, Signer, SignerSet, TokenFetcher
from d1_signer.token import keeper
from tests.token.fleet.member import ROOT
from tests.token.fleet.simulation.doubles import (
    D1,
    Device,
    Plan,
    SimulatedEndpoint,
    Store,
    Trouble,
)
from tests.token.fleet.simulation.scale import Figures, Fleet, Setting, rows
from tests.token.fleet.simulation.schedule import simulated
from tests.token.fleet.simulation.world import World

PROCESSES = 10
KEY = bytes(32)


class CountedStore(Store):
    def __init__(self, world: World, plan: Plan) -> None:
        super().__init__(world, plan)
        self.world = world
        self.asked: Counter[int] = Counter()

    def load(self, name: str) -> tuple[bytes, float] | None:
        self.asked[int(self.world.now)] += 1
        return super().load(name)

    def lease(self, name: str, *, life: float) -> Any:
        self.asked[int(self.world.now)] += 1
        return super().lease(name, life=life)


def real(seconds: float, *, shared: bool, troubles: list[Trouble]) -> Figures:
    """The real modules on simulated threads, each process with a caller that asks all the time."""
    world = World(seed=3)
    random.seed(3)
    plan = Plan(world, troubles)
    SimulatedEndpoint.d1 = d1 = D1(world, plan, kids={"k0"}, life=900.0)
    figures = Figures()
    store = CountedStore(world, plan) if shared else None

    def process() -> None:
        world.sleep(world.chance.uniform(0.0, 60.0))
        fetcher = TokenFetcher(
            SignerSet([Signer(Device(world, plan, 0), kid="k0")], clock=world.monotonic),
            issuer_id="issuer",
            environment="https://d1.invalid/authz/v1",
            client_certificate=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            store=store,
            store_key=KEY if shared else None,
        )
        while world.now < seconds:
            before = d1.requests
            try:
                fetcher.token()
            except D1SignerError:
                figures.errors += 1
                if figures.noticed is None:
                    figures.noticed = world.now
            figures.requests[int(world.now)] += d1.requests - before
            world.sleep(2.0)
        fetcher.close()

    with simulated(world):
        for number in range(PROCESSES):
            world.spawn(world.process(f"p{number}"), process)
        world.run()
        keeper._keepers.clear()
    assert world.problems == []
    figures.requests = Counter({0: d1.requests})
    if store is not None:
        figures.store = store.asked
    return figures


def total(counts: Counter[int]) -> int:
    return sum(counts.values())


@pytest.mark.parametrize("shared", [True, False])
def test_the_model_asks_as_often_as_the_real_modules(*, shared: bool) -> None:
    seconds = 3600.0
    model = Fleet(Setting(number=PROCESSES, seconds=seconds, store=shared)).run()
    found = real(seconds, shared=shared, troubles=[])
    assert total(model.requests) == pytest.approx(total(found.requests), abs=1, rel=0.1)
    assert model.errors == found.errors == 0
    # A few looks more or less, where several want to renew at the same moment.
    assert total(model.store) == pytest.approx(total(found.store), abs=40)


def test_the_model_notices_an_outage_of_d1_when_the_real_modules_do() -> None:
    away = (510.0, 1000.0)
    model = Fleet(Setting(number=PROCESSES, seconds=1000.0, d1_away=away)).run()
    found = real(1000.0, shared=True, troubles=[Trouble("d1-unreachable", *away)])
    assert model.noticed is not None
    assert found.noticed is not None
    # An error is raised when a renewal has failed, up to its time limit after the token's end.
    assert model.noticed <= found.noticed + 5 < model.noticed + 40
    # Of the same order: how attempts are spaced is another module's.
    assert 1 / 4 < total(model.requests) / total(found.requests) < 4
    assert 1 / 4 < total(model.store) / total(found.store) < 4


def test_the_model_goes_without_a_store_as_often_as_the_real_modules() -> None:
    away = (300.0, 1500.0)
    model = Fleet(Setting(number=PROCESSES, seconds=3600.0, store_away=away)).run()
    found = real(3600.0, shared=True, troubles=[Trouble("store-down", *away)])
    assert total(model.requests) == pytest.approx(total(found.requests), abs=6)
    assert model.errors == found.errors == 0


def shown(column: int) -> list[str]:
    page = (ROOT / "docs" / "fleet.md").read_text()
    table = page.partition("| processes |")[2].partition("\n\n")[0].splitlines()[2:]
    return [line.split("|")[column].strip() for line in table]


LONG = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("column", "number", "stores"),
    [
        (2, 10, 1),
        (3, 1_000, 1),
        pytest.param(4, 10_000, 1, marks=LONG),
        pytest.param(5, 100_000, 10, marks=LONG),
    ],
)
def test_the_page_shows_the_figures_of_the_model(column: int, number: int, stores: int) -> None:
    found = rows(number, stores)
    assert shown(1) == [name for name, _ in found]
    assert shown(column) == [figure for _, figure in found]

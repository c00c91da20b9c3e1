# SPDX-License-Identifier: Apache-2.0
"""Random schedules of faults: never an expired token, never two jti alike, never two requests under
one lease, never a hang, never an error while a token is valid; and all recovers by itself.
"""

from __future__ import annotations

import json
import random
import ssl
import subprocess
import sys

import pytest

from d1_signer import Signer, SignerSet, TokenFetcher, TokenUnavailable
from tests.token.fleet.member import ROOT
from tests.token.fleet.simulation.doubles import D1, Device, Plan, SimulatedEndpoint, Trouble
from tests.token.fleet.simulation.schedule import simulated
from tests.token.fleet.simulation.world import World


def run(first: int, number: int, seconds: int) -> dict[str, float]:
    # In a process of its own: a schedule replaces clocks and threads in modules that others use.
    command = [sys.executable, "-m", "tests.token.fleet.simulation", str(first), str(number)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    totals: dict[str, float] = json.loads(ended.stdout)
    assert totals["schedules"] == number
    # The schedules are no idle ones.
    assert totals["calls"] > 50 * number
    assert totals["errors"] > number
    assert totals["requests"] > 5 * number
    return totals


@pytest.mark.parametrize("first", range(0, 1000, 125))
def test_a_thousand_schedules(first: int) -> None:
    run(first, 125, 55)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(10_000, 20_000, 2_500))
def test_ten_thousand_schedules(first: int) -> None:
    run(first, 2_500, 1700)


@pytest.mark.parametrize("kind", ["d1-unreachable", "d1-silent", "d1-busy", "hsm-down-0"])
def test_an_outage_of_four_fifths_of_a_tokens_life_is_not_noticed(kind: str) -> None:
    world = World(seed=7)
    # From just after the first token came.
    plan = Plan(world, [Trouble(kind, 2.0, 0.8 * 900)])
    SimulatedEndpoint.d1 = d1 = D1(world, plan, kids={"k0"}, life=900.0)
    process = world.process("p")
    values: list[tuple[float, str]] = []

    def caller(fetcher: TokenFetcher) -> None:
        while world.now < 1000:
            before = world.now
            values.append((world.now, fetcher.token().value))
            assert d1.is_valid(values[-1][1])
            # The first token is waited for, and no other.
            assert len(values) <= 8 or world.now == before
            world.sleep(0.5)

    def main() -> None:
        signer = Signer(Device(world, plan, 0), kid="k0")
        fetcher = TokenFetcher(
            SignerSet([signer], clock=world.monotonic),
            issuer_id="issuer",
            environment="https://d1.invalid/authz/v1",
            client_certificate=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )
        callers = [world.spawn(process, caller, fetcher) for _ in range(8)]
        world.block(lambda: all(task.done for task in callers), None)
        fetcher.close()

    with simulated(world):
        world.spawn(process, main)
        world.run()
    assert world.problems == []
    assert len(values) == pytest.approx(8 * 2000, rel=0.01)
    assert len({value for _, value in values}) == 2
    # Recovered by itself, soon after the end of the outage.
    renewed = min(moment for moment, value in values if value != values[0][1])
    assert 0.8 * 900 < renewed < 0.8 * 900 + 50


@pytest.mark.parametrize("kind", ["d1-unreachable", "d1-silent", "d1-busy", "d1-throttles"])
def test_callers_who_wait_through_an_outage_do_not_hammer_d1(kind: str) -> None:
    """The figures of record 23: requests of one process in a minute, whatever its callers do."""
    world = World(seed=11)
    random.seed(11)
    ends = 1200.0
    plan = Plan(world, [Trouble(kind, 0.0, ends)])
    SimulatedEndpoint.d1 = d1 = D1(world, plan, kids={"k0"}, life=900.0)
    process = world.process("p")
    recovered: list[float] = []

    def caller(fetcher: TokenFetcher) -> None:
        while True:
            try:
                fetcher.token()
            except TokenUnavailable:
                continue  # at once, again and again
            recovered.append(world.now)
            return

    def main() -> None:
        signer = Signer(Device(world, plan, 0), kid="k0")
        fetcher = TokenFetcher(
            SignerSet([signer], clock=world.monotonic),
            issuer_id="issuer",
            environment="https://d1.invalid/authz/v1",
            client_certificate=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )
        callers = [world.spawn(process, caller, fetcher) for _ in range(4)]
        world.block(lambda: all(task.done for task in callers), None)
        fetcher.close()

    with simulated(world):
        world.spawn(process, main)
        world.run()
    assert world.problems == []
    at = d1.moments
    worst = max(sum(1 for other in at if one <= other < one + 60) for one in at)
    assert 3 <= worst <= 28
    assert len(at) / (ends / 60) < 17
    # The longest pause between two renewals, the longest within one, and the request.
    assert max(recovered) < ends + 15 * 1.25 + 5 + 1

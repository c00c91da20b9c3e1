# SPDX-License-Identifier: Apache-2.0
"""What a fleet is told of a token's life when a clock of the one who fetched it was wrong."""

from __future__ import annotations

import time
from typing import Any

import pytest

from d1_signer.token.access_token import HeldToken
from tests.token.conftest import FetcherMaker, make_fetcher
from tests.token.fleet.conftest import STORE_KEY

__all__ = ["make_fetcher"]  # a fixture


class Store:
    """A store in memory that nobody shares."""

    def __init__(self) -> None:
        self.lives: list[float] = []

    def load(self, name: str) -> None:
        pass

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        del name, sealed
        self.lives.append(life)

    def lease(self, name: str, *, life: float) -> Store:
        del name, life
        return self

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("wall_jumps", "least", "most"),
    [
        (0.0, 890.0, 900.0),
        # Set back: the other clock knows better.
        (-500.0, 890.0, 900.0),
        # Set forward, or a machine that slept while its other clock stood still.
        (300.0, 590.0, 600.0),
        (2000.0, None, None),
    ],
)
def test_a_life_is_shared_as_the_more_careful_clock_sees_it(
    make_fetcher: FetcherMaker, wall_jumps: float, least: float | None, most: float | None
) -> None:
    store = Store()
    fetcher = make_fetcher(store=store, store_key=STORE_KEY)
    fleet: Any = fetcher._renewal
    obtain = fleet._renewal.obtain

    def obtain_while_the_clock_jumps(**options: Any) -> HeldToken:
        held: HeldToken = obtain(**options)
        fleet._wall = lambda: time.time() + wall_jumps
        return held

    fleet._renewal.obtain = obtain_while_the_clock_jumps
    assert fetcher.token().value
    if least is None or most is None:
        assert store.lives == []
    else:
        (life,) = store.lives
        assert least < life <= most

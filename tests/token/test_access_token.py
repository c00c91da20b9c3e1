# SPDX-License-Identifier: Apache-2.0
"""How long a token serves, for every life and every chance."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import pprint
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
from hypothesis import example, given, strategies as st

from d1_signer.token.access_token import AccessToken, HeldToken, State, hold
from d1_signer.token.clock import token_clock

VALUE = "eyJ-secret-token-value"
chances = st.floats(0, 1)


def held(life: float, chance: float = 0.5, *, at: float = 0.0, wall: float = 1e9) -> HeldToken:
    return hold(
        value=VALUE,
        scope="a b",
        expires_in=life,
        requested_at=at,
        requested_at_wall=wall,
        chance=chance,
    )


@given(st.floats(1e-3, 1e6), chances, st.floats(0, 1e8))
@example(1e-3, 1.0, 1e5)
@example(899.999, 1.0, 0.0)
@example(float("inf"), 0.0, 0.0)
def test_renewal_comes_before_the_end_and_the_end_before_expiry(
    life: float, chance: float, at: float
) -> None:
    token = held(life, chance, at=at)
    expiry = at + min(life, 900)
    assert at < token.renew_at < token.unusable_at <= expiry
    assert token.unusable_at >= expiry - 10 - 1e-6
    assert token.token.expires_at == 1e9 + min(life, 900)


@given(st.floats(0, 1e-3, exclude_min=True, allow_subnormal=True), chances, st.floats(0, 1e8))
def test_the_tiniest_life_is_never_stretched(life: float, chance: float, at: float) -> None:
    # Below the clock's resolution the moments fall together; then the token is expired at once.
    token = held(life, chance, at=at)
    assert at <= token.renew_at <= token.unusable_at <= at + life
    assert token.state(at + life) is State.EXPIRED


@given(st.floats(1, 900), chances, st.floats(0, 1000))
def test_states_follow_each_other(life: float, chance: float, elapsed: float) -> None:
    token = held(life, chance)
    state = token.state(elapsed)
    if elapsed < token.renew_at:
        assert state is State.FRESH
    elif elapsed < token.unusable_at:
        assert state is State.STALE
    else:
        assert state is State.EXPIRED
    assert token.state(token.renew_at) is State.STALE
    assert token.state(token.unusable_at) is State.EXPIRED


def test_jitter_spreads_renewals_around_two_thirds() -> None:
    moments = [held(900, chance).renew_at for chance in (0, 0.5, 1)]
    assert moments == pytest.approx([540, 600, 660])


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_token_shows_and_gives_away_nothing(leave: Callable[[object], object]) -> None:
    token = held(900)
    for shown in (repr(token), str(token.token), f"{token.token!r} {token.token}"):
        assert VALUE not in shown
        assert "a b" in shown
    with pytest.raises(TypeError) as caught:
        leave(token.token)
    assert VALUE not in str(caught.value)


def test_token_is_a_value() -> None:
    token = AccessToken(value=VALUE, expires_at=1.0)
    assert token == AccessToken(value=VALUE, expires_at=1.0)
    assert token != AccessToken(value=VALUE + "x", expires_at=1.0)
    assert (token.scope, token.token_type) == ("", "Bearer")
    with pytest.raises(AttributeError):
        token.value = ""  # type: ignore[misc]


@pytest.mark.parametrize(
    "show",
    [
        dataclasses.asdict,
        dataclasses.astuple,
        lambda token: {name.name: getattr(token, name.name) for name in dataclasses.fields(token)},
        lambda token: {name: getattr(token, name) for name in token.__slots__},
        lambda token: pydantic.TypeAdapter(AccessToken).dump_json(token),
        lambda token: pydantic.RootModel[AccessToken](token).model_dump(),
        lambda token: json.dumps(token, default=dataclasses.asdict),
        lambda token: json.dumps(token, default=repr),
        pprint.pformat,
    ],
)
def test_no_serializer_shows_the_value(show: Callable[[AccessToken], object]) -> None:
    token = AccessToken(value=VALUE, expires_at=1.0, scope="a b")
    shown = repr(show(token))
    assert "a b" in shown
    assert VALUE not in shown


def test_what_has_no_fields_to_show_is_refused() -> None:
    token = AccessToken(value=VALUE, expires_at=1.0)
    shows: list[Callable[[Any], object]] = [vars, dict, list, json.dumps, copy.copy, copy.deepcopy]
    for show in shows:
        with pytest.raises(TypeError) as caught:
            show(token)
        assert VALUE not in str(caught.value)


def test_clock_does_not_run_backwards() -> None:
    moments = [token_clock() for _ in range(100)]
    assert moments == sorted(moments)
    assert moments[0] > 0

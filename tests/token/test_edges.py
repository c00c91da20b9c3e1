# SPDX-License-Identifier: Apache-2.0
"""Moments between two states of the fetcher, each entered on purpose."""

from __future__ import annotations

import secrets
import threading
import time

import pytest

from d1_signer import (
    LazySigner,
    Limits,
    Signer,
    SignerSet,
    TokenRefusedError,
    TokenTimeout,
    TokenUnavailable,
    open_signer,
)
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token.access_token import HeldToken, State
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import age, until, workers


def test_a_renewal_between_two_looks_does_not_hand_out_the_expired_token(
    make_fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = make_fetcher(retry_interval=0.01)
    first = fetcher.token()
    age(fetcher, 895)
    look = HeldToken.state

    def renewing_look(held: HeldToken, now: float) -> State:
        # Another thread renews at the worst moment: when this one has taken the old token.
        monkeypatch.undo()
        with fetcher._lock:
            flight = fetcher._join_or_start()
        assert flight.wait(5)
        return look(held, now)

    monkeypatch.setattr(HeldToken, "state", renewing_look)
    assert fetcher.token() is not first


def test_a_token_that_died_while_its_waiter_woke_up_is_not_handed_out(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=0.01)
    note = fetcher._note_success
    died: list[HeldToken] = []

    def note_and_die(held: HeldToken, duration: float) -> None:
        note(held, duration)
        if not died:
            died.append(held)
            age(fetcher, 1000)

    fetcher._note_success = note_and_die  # type: ignore[method-assign]
    token = fetcher.token()
    assert token is not died[0].token
    assert sandbox.counters.token_requests == 2


def test_tokens_that_all_die_on_the_way_are_an_error_in_time(make_fetcher: FetcherMaker) -> None:
    fetcher = make_fetcher(retry_interval=0.01)
    note = fetcher._note_success

    def note_and_die(held: HeldToken, duration: float) -> None:
        note(held, duration)
        age(fetcher, 1000)

    fetcher._note_success = note_and_die  # type: ignore[method-assign]
    with pytest.raises(TokenTimeout, match="No token"):
        fetcher.token(timeout=0.2)


def test_no_thread_for_a_renewal_is_no_error_while_a_token_is_valid(
    make_fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = make_fetcher()
    first = fetcher.token()
    age(fetcher, 700)

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert fetcher.token() is first
    monkeypatch.undo()
    age(fetcher, 2)
    until(lambda: fetcher.token() is not first)


def test_closing_before_a_delayed_renewal_sends_nothing(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=30.0)
    fetcher.invalidate(fetcher.token())
    with pytest.raises(TokenUnavailable):
        fetcher.token(timeout=0.01)
    assert workers()
    fetcher.close()
    assert not workers()
    assert sandbox.counters.token_requests == 1


def test_retry_after_holds_beyond_the_renewal_that_was_told(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(limits=Limits(total=2.0), retry_interval=0.01)
    sandbox.misbehave(Fault.STATUS_429, retry_after=40, times=1)
    for seconds in (0, 30, 7):
        age(fetcher, seconds)
        with pytest.raises(TokenUnavailable):
            fetcher.token(timeout=1.0)
    assert sandbox.counters.token_requests == 1
    age(fetcher, 13)  # up to a quarter more, so that a fleet does not come back in one moment
    assert fetcher.token().value


def test_retry_after_cannot_hold_the_fetcher_for_ever(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(limits=Limits(total=2.0), retry_interval=0.01)
    sandbox.misbehave(Fault.STATUS_503, retry_after=86_400, times=1)
    started = time.monotonic()
    with pytest.raises(TokenUnavailable):
        fetcher.token()
    assert time.monotonic() - started < 2
    age(fetcher, 75)
    assert fetcher.token().value


def test_time_that_runs_out_before_an_attempt_does_not_hide_what_d1_answered(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    told: list[str] = []

    def correlation_id() -> str:
        told.append(secrets.token_hex(16))
        if len(told) == 2:  # the assertion is signed, and nothing sent
            assert fetcher._flight is not None
            threading.Event().wait(fetcher._flight.deadline - time.monotonic() + 0.01)
        return told[-1]

    fetcher = make_fetcher(limits=Limits(total=3.0), correlation_id=correlation_id)
    sandbox.misbehave(Fault.STATUS_500)
    with pytest.raises(TokenUnavailable, match="500") as failure:
        fetcher.token()
    assert failure.value.details["correlation_id"] == told[0]
    assert sandbox.counters.token_requests == 1


def test_a_second_key_that_cannot_sign_does_not_hide_what_d1_refused(
    make_fetcher: FetcherMaker, sandbox: Sandbox, pem_uri: str, signer: Signer
) -> None:
    down = LazySigner(
        lambda: open_signer("file:///gone.pem"), kid="b", public_key=signer.public_key
    )
    with open_signer(pem_uri, kid="a") as unknown:
        fetcher = make_fetcher(signer=SignerSet([unknown, down]))
        with pytest.raises(TokenRefusedError) as failure:
            fetcher.token()
    assert failure.value.status == 400
    assert sandbox.counters.token_requests == 1

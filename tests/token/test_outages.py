# SPDX-License-Identifier: Apache-2.0
"""Outages on a cold cache: who has patience gets the token, and D1 is not hammered meanwhile."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from d1_signer import (
    AccessToken,
    Limits,
    TokenRefusedError,
    TokenTimeout,
    TokenUnavailable,
)
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token import pauses
from d1_signer.token.pauses import asked_pause, pause_before
from d1_signer.transport import connections, names
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import together, until


def gaps(sandbox: Sandbox) -> list[float]:
    """Seconds between each request and the next."""
    return [later.at - one.at for one, later in itertools.pairwise(sandbox.requests)]


@pytest.mark.parametrize("fault", [Fault.STATUS_503, Fault.STATUS_500, Fault.CLOSE_BEFORE_ANSWER])
def test_a_cold_caller_outlasts_an_outage(
    make_fetcher: FetcherMaker, sandbox: Sandbox, fault: Fault
) -> None:
    options = {"retry_after": None} if fault is Fault.STATUS_503 else {}
    sandbox.misbehave(fault, times=4, **options)
    assert make_fetcher().token().value
    assert sandbox.counters.token_requests == 5
    # Each pause has half of twice the one before at least; the clocks of two threads are read.
    for gap, least in zip(gaps(sandbox), [0.125, 0.25, 0.5, 1.0], strict=True):
        assert gap > least - 0.05


def test_after_a_429_a_second_passes(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_429, times=2, retry_after=None)
    assert make_fetcher(retry_interval=0.01).token().value
    assert sandbox.counters.token_requests == 3
    assert min(gaps(sandbox)) > 0.95


def test_between_two_renewals_a_second_passes_after_a_429(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=0.01, limits=Limits(total=0.9))
    sandbox.misbehave(Fault.STATUS_429, times=1, retry_after=None)
    with pytest.raises(TokenUnavailable):
        fetcher.token()  # less than a second has no room for another attempt
    assert fetcher.token(timeout=20).value
    assert min(gaps(sandbox)) > 0.95


def test_a_cold_crowd_waits_for_one(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_503, times=3, retry_after=None)
    tokens = together(50, make_fetcher().token)
    assert all(isinstance(token, AccessToken) for token in tokens)
    assert sandbox.counters.token_requests == 4


def test_who_comes_late_has_a_patience_of_its_own(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    """A renewal that ends in an error is no end for those who have time left."""
    fetcher = make_fetcher(limits=Limits(total=1.0), retry_interval=0.05)
    sandbox.misbehave(Fault.STATUS_503, retry_after=None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetcher.token)
        until(lambda: sandbox.counters.token_requests >= 1)
        patient = pool.submit(fetcher.token, timeout=60)
        with pytest.raises(TokenUnavailable, match="HTTP 503"):
            first.result(timeout=20)
        sandbox.misbehave(None)
        assert patient.result(timeout=60).value


def test_who_comes_amid_the_pause_between_renewals_waits(
    make_fetcher: FetcherMaker, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(pauses, "_LONGEST_PAUSE", 60.0)
    fetcher = make_fetcher(retry_interval=1.0)
    sandbox.misbehave(Fault.STATUS_503, times=1, retry_after=None)
    # One attempt for each renewal: with the default patience it is not the end.
    assert fetcher.token().value
    assert min(gaps(sandbox)) > 0.95
    # Who has not the time is told at once, and why.
    fetcher = make_fetcher(retry_interval=5.0, limits=Limits(total=2.0))
    sandbox.misbehave(Fault.STATUS_503, retry_after=None)
    with pytest.raises(TokenUnavailable, match="HTTP 503"):
        fetcher.token()
    asked = sandbox.counters.token_requests
    began = time.monotonic()
    for timeout in (0.0, 0.5, None):
        with pytest.raises(TokenUnavailable, match="HTTP 503"):
            fetcher.token(timeout=timeout)
    assert time.monotonic() - began < 2.0
    assert sandbox.counters.token_requests == asked


def test_what_waiting_does_not_end_is_told_at_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT)
    fetcher = make_fetcher(retry_interval=5.0)
    for _ in range(3):
        with pytest.raises(TokenRefusedError):
            fetcher.token(timeout=60)
    assert sandbox.counters.token_requests == 1


def test_where_a_renewal_hangs_is_told(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    released = threading.Event()

    def correlation_id() -> str:
        released.wait(60)
        return "late"

    fetcher = make_fetcher(
        correlation_id=correlation_id, limits=Limits(total=0.1), retry_interval=0.01
    )
    try:
        with pytest.raises(TokenTimeout, match="hangs in the function correlation_id") as failure:
            fetcher.token()
        assert failure.value.details == {"hanging_in": "the function correlation_id"}
        with pytest.raises(TokenTimeout, match="4 renewals hang in the function correlation_id"):
            fetcher.token(timeout=60)
    finally:
        released.set()
    assert sandbox.counters.token_requests == 0


def test_pauses_grow_to_five_seconds_and_never_end_early() -> None:
    attempts = range(1, 5000)
    shortest = [pause_before(attempt, asked=0.0, chance=0.0) for attempt in attempts]
    longest = [pause_before(attempt, asked=0.0, chance=1.0) for attempt in attempts]
    assert shortest[:7] == [0.125, 0.25, 0.5, 1.0, 2.0, 2.5, 2.5]
    assert longest[:7] == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert pause_before(1, asked=10.0, chance=0.0) == 10.0
    assert 10.0 < pause_before(1, asked=10.0, chance=1.0) <= 12.5


def test_what_is_asked_for() -> None:
    def asked(**details: str | float) -> float:
        return asked_pause(TokenUnavailable("x", details=details))

    assert asked() == 0.0
    assert asked(status=503) == 0.0
    assert asked(status=503, retry_after=7.0) == 7.0
    assert asked(status=503, retry_after=-7.0) == 0.0
    assert asked(status=429) == 1.0
    assert asked(status=429, retry_after=0.0) == 1.0
    assert asked(status=429, retry_after=7.0) == 7.0
    assert asked(retry_after="5s") == 0.0


def test_an_attempt_without_time_accuses_nobody(
    make_fetcher: FetcherMaker, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline ends it in a look-up, and it is not the name servers that are at fault."""
    real, asked = names.addresses_of, itertools.count()

    def slow(host: str, port: int, moment: float) -> list[str]:
        if next(asked) == 0:
            return real(host, port, moment)
        threading.Event().wait(max(0.0, moment - time.monotonic()))
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time")

    monkeypatch.setattr(connections, "addresses_of", slow)
    sandbox.misbehave(Fault.CLOSE_BEFORE_ANSWER, times=1)
    environment = sandbox.base_url.replace("127.0.0.1", "localhost")
    fetcher = make_fetcher(environment=environment, limits=Limits(total=1.5))
    with pytest.raises(TokenUnavailable, match="the answer failed"):
        fetcher.token()
    assert next(asked) >= 2

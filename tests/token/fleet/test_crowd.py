# SPDX-License-Identifier: Apache-2.0
"""A thousand threads of one process on a cold cache, and two hundred at a refusal."""

from __future__ import annotations

import time

import pytest

from d1_signer import AccessToken, SignEvent, TokenRefusedError, open_signer
from d1_signer.events import Event
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import KID, FetcherMaker, make_fetcher
from tests.token.test_fetcher import together

__all__ = ["make_fetcher"]  # a fixture


@pytest.mark.stress
def test_a_thousand_cold_threads_sign_once_and_post_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox, pem_uri: str
) -> None:
    events: list[Event] = []
    with open_signer(pem_uri, kid=KID, observers=[events.append]) as signer:
        fetcher = make_fetcher(signer=signer)
        tokens = together(1000, fetcher.token)
    assert all(isinstance(token, AccessToken) for token in tokens)
    assert len({id(token) for token in tokens}) == 1
    assert [type(event) for event in events] == [SignEvent]
    assert sandbox.counters.token_requests == 1


@pytest.mark.stress
def test_two_hundred_threads_share_a_refusal_and_the_pause_after_it(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=1.0)
    sandbox.misbehave(Fault.INVALID_GRANT)
    results = together(200, fetcher.token)
    assert all(isinstance(result, TokenRefusedError) for result in results)
    assert sandbox.counters.token_requests == 1
    # All of them go on asking; D1 hears of it once in the interval.
    end = time.monotonic() + 20
    while sandbox.counters.token_requests == 1 and time.monotonic() < end:
        together(20, fetcher.token)
    first, second = sandbox.requests
    assert second.at - first.at >= 1.0

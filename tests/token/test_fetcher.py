# SPDX-License-Identifier: Apache-2.0
"""The fetcher over real mutual TLS: one request for all, one failure for all, renewal, closing."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from d1_signer import (
    AccessToken,
    ConfigurationError,
    D1SignerError,
    FetcherClosedError,
    InvalidInputError,
    LazySigner,
    Limits,
    Signer,
    SignerSet,
    SignerThrottled,
    SignEvent,
    TokenFetcher,
    TokenRefusedError,
    TokenTimeout,
    TokenUnavailable,
    open_signer,
)
from d1_signer.events import Event
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token import endpoint
from tests.conftest import LeakWatch
from tests.servers.connect_proxy import ConnectProxy
from tests.token.conftest import ISSUER, KID, FetcherMaker, certificate_of


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.002)


def together(number: int, work: Callable[[], object]) -> list[object]:
    """Run work in that many threads at the same moment; an error is a result."""
    barrier = threading.Barrier(number)

    def run(_: int) -> object:
        barrier.wait()
        try:
            return work()
        except D1SignerError as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def age(fetcher: TokenFetcher, seconds: float) -> None:
    """Let the fetcher's clocks run ahead."""
    clock, wall = fetcher._clock, fetcher._wall
    set_clocks(fetcher, lambda: clock() + seconds, lambda: wall() + seconds)


def set_clocks(
    fetcher: TokenFetcher, clock: Callable[[], float], wall: Callable[[], float]
) -> None:
    fetcher._clock = fetcher._renewal._clock = clock
    fetcher._wall = fetcher._renewal._wall = wall


def test_a_token_comes_back_and_is_reused(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    token = fetcher.token()
    assert fetcher.token() is token
    assert sandbox.counters.token_requests == 1
    assert token.token_type == "Bearer"
    assert token.scope
    assert 895 < token.expires_at - time.time() <= 900


def test_the_request_says_what_d1_documents(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    fetcher.token()
    (request,) = sandbox.requests
    assert request.content_type == "application/x-www-form-urlencoded"
    assert request.grant_type == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    assert request.header == {"alg": "ES256", "kid": KID, "typ": "JWT"}
    claims = request.claims
    assert claims["iss"] == claims["sub"] == ISSUER
    assert claims["aud"] == sandbox.token_endpoint
    assert isinstance(claims["exp"], int)
    assert 290 <= claims["exp"] - request.at <= 300
    assert request.correlation_id
    assert request.refusal == ""


def test_options_shape_the_assertion(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    fetcher = make_fetcher(
        audience=None,
        issued_at=False,
        jwt_id=False,
        assertion_lifetime=900,
        correlation_id=lambda: "order-66",
    )
    fetcher.token()
    (request,) = sandbox.requests
    assert set(request.claims) == {"iss", "sub", "exp"}
    assert request.correlation_id == "order-66"


def test_all_goes_through_the_proxy_that_is_named(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    with ConnectProxy().running() as proxy:
        fetcher = make_fetcher(proxy=proxy.url)
        assert fetcher.token().value
        assert proxy.asked == [urlsplit(sandbox.base_url).netloc]
        with fetcher.session() as session:
            session.get(f"{sandbox.base_url}/any")
    assert proxy.asked == [urlsplit(sandbox.base_url).netloc] * 2
    assert proxy.sent == []


def test_two_hundred_cold_threads_sign_once_and_post_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox, pem_uri: str
) -> None:
    events: list[Event] = []
    sandbox.misbehave(Fault.DELAY, seconds=0.05)
    with open_signer(pem_uri, kid=KID, observers=[events.append]) as signer:
        fetcher = make_fetcher(signer=signer)
        tokens = together(200, fetcher.token)
    assert len({token.value for token in tokens if isinstance(token, AccessToken)}) == 1
    assert all(isinstance(token, AccessToken) for token in tokens)
    assert sandbox.counters.token_requests == 1
    (event,) = events
    assert isinstance(event, SignEvent)
    use = event.use
    assert use is not None
    assert use.purpose == "d1-assertion"
    assert dict(use.references)["jti"] == sandbox.requests[0].claims["jti"]


def test_fifty_cold_threads_share_one_refusal(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT)
    results = together(50, fetcher.token)
    assert all(isinstance(result, TokenRefusedError) for result in results)
    assert len({id(result) for result in results}) == 50
    assert sandbox.counters.token_requests == 1
    # And nobody asks again before the minimum interval is over.
    with pytest.raises(TokenRefusedError) as refusal:
        fetcher.token()
    assert (refusal.value.status, refusal.value.error) == (400, "invalid_grant")
    assert sandbox.counters.token_requests == 1
    sandbox.misbehave(None)
    age(fetcher, 2)
    assert fetcher.token().value
    assert sandbox.counters.token_requests == 2


def test_each_attempt_has_an_assertion_of_its_own(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_503, times=2, retry_after=None)
    assert fetcher.token().value
    identifiers = {request.claims["jti"] for request in sandbox.requests}
    assert len(identifiers) == len(sandbox.requests) == 3
    assert len({request.correlation_id for request in sandbox.requests}) == 3


def test_retry_after_is_obeyed(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    fetcher = make_fetcher(limits=Limits(total=2.0))
    sandbox.misbehave(Fault.STATUS_429, retry_after=60)
    started = time.monotonic()
    with pytest.raises(TokenUnavailable) as failure:
        fetcher.token()
    # A minute is more than the deadline leaves, so the failure comes at once and says so.
    assert time.monotonic() - started < 1.5
    assert failure.value.details["retry_after"] == 60
    assert sandbox.counters.token_requests == 1


def test_a_stale_token_is_handed_out_while_it_is_renewed(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    first = fetcher.token()
    age(fetcher, 700)
    sandbox.misbehave(Fault.DELAY, seconds=0.2)
    assert fetcher.token() is first
    until(lambda: fetcher.token() is not first)
    assert sandbox.counters.token_requests == 2


def test_a_failed_renewal_keeps_the_last_good_token(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    first = fetcher.token()
    age(fetcher, 700)
    sandbox.misbehave(Fault.INVALID_GRANT)
    assert fetcher.token() is first
    until(lambda: sandbox.counters.tokens_refused == 1)
    assert fetcher.token() is first
    age(fetcher, 200)
    with pytest.raises(TokenRefusedError):
        fetcher.token()


def test_an_expired_token_is_never_handed_out(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    first = fetcher.token()
    age(fetcher, 895)
    assert fetcher.token() is not first
    assert sandbox.counters.token_requests == 2


def test_a_machine_that_slept_unnoticed_does_not_use_a_dead_token(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    first = fetcher.token()
    wall = fetcher._wall
    set_clocks(fetcher, fetcher._clock, lambda: wall() + 1000)  # the clock of tokens stood still
    assert fetcher.token() is not first
    assert sandbox.counters.token_requests == 2


def test_short_lives_do_not_become_a_loop_of_requests(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=0.2)
    sandbox.misbehave(Fault.EXPIRES_IN_SHORT, seconds=0.05)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        succeeded(fetcher)  # on a slow machine such a token expires on its way
    assert sandbox.counters.token_requests <= 7


def test_a_caller_waits_no_longer_than_its_timeout(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.3)
    with pytest.raises(TokenTimeout):
        fetcher.token(timeout=0.05)
    assert fetcher.token().value  # the renewal went on
    assert sandbox.counters.token_requests == 1


@pytest.mark.parametrize("fault", [Fault.SLOW_BODY, Fault.DELAY])
def test_a_server_that_never_ends_is_given_up(
    make_fetcher: FetcherMaker, sandbox: Sandbox, fault: Fault
) -> None:
    fetcher = make_fetcher(limits=Limits(total=0.4), retry_interval=0.01)
    sandbox.misbehave(fault, seconds=30.0 if fault is Fault.DELAY else 0.05)
    started = time.monotonic()
    with pytest.raises(TokenUnavailable):
        fetcher.token()
    assert time.monotonic() - started < 2.0
    sandbox.misbehave(None)
    until(lambda: succeeded(fetcher))


def succeeded(fetcher: TokenFetcher) -> bool:
    try:
        return bool(fetcher.token().value)
    except D1SignerError:
        return False


def test_a_server_that_drips_heads_is_cut(make_fetcher: FetcherMaker) -> None:
    # Each of its bytes comes within the read limit, so that limit never ends it.
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while not ended.wait(0.02):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        fetcher = make_fetcher(
            environment=f"http://127.0.0.1:{server.getsockname()[1]}/authz/v1",
            client_certificate=None,
            ca_file=None,
            limits=Limits(total=0.3, read=10.0),
        )
        with pytest.raises(TokenUnavailable):
            fetcher.token()
        until(lambda: not workers())
        ended.set()
        dripping.join()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "d1-signer-renewal"]


def test_closing_ends_a_renewal_and_leaves_no_thread(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=30.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetcher.token)
        until(lambda: sandbox.counters.token_requests == 1)
        fetcher.close()
        with pytest.raises(FetcherClosedError):
            waiting.result(timeout=5)
    until(lambda: not workers())
    with pytest.raises(FetcherClosedError):
        fetcher.token()
    with pytest.raises(FetcherClosedError):
        fetcher.prefetch()
    fetcher.close()


def test_prefetch_returns_at_once(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.3)
    fetcher.prefetch()
    fetcher.prefetch()
    assert sandbox.counters.tokens_issued == 0
    assert fetcher.token().value
    assert sandbox.counters.token_requests == 1


def test_invalidate_forgets_only_the_token_that_was_refused(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=0.01)
    first = fetcher.token()
    fetcher.invalidate(first)
    second = fetcher.token()
    assert second is not first
    fetcher.invalidate(first)
    assert fetcher.token() is second
    assert sandbox.counters.token_requests == 2


def test_what_was_refused_long_ago_does_not_count(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(retry_interval=0.01)
    fetcher.invalidate(fetcher.token())  # young, as one from a fleet's store may be
    for _ in range(3):
        fetcher.token()
        age(fetcher, 895)
    fetcher.invalidate(young := fetcher.token())
    assert fetcher.token() is not young
    again = fetcher.token()
    fetcher.invalidate(again)  # the second in a row: another one does not help
    assert fetcher.token() is again
    age(fetcher, 31)
    fetcher.invalidate(again)
    assert fetcher.token() is not again
    assert sandbox.counters.token_requests == 7


@pytest.mark.parametrize("timeout", ["5", float("nan"), -1, object()])
def test_a_timeout_is_a_number_of_seconds(fetcher: TokenFetcher, timeout: Any) -> None:
    with pytest.raises(InvalidInputError, match="timeout"):
        fetcher.token(timeout=timeout)


def test_a_failed_signer_is_told_to_all(
    sandbox: Sandbox, make_fetcher: FetcherMaker, signer: Signer
) -> None:
    fetcher = make_fetcher()
    signer.close()
    results = together(20, fetcher.token)
    assert {getattr(result, "code", None) for result in results} == {"signer_closed"}
    assert sandbox.counters.token_requests == 0


def test_a_new_kid_that_d1_does_not_know_falls_back(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer, pem_uri: str
) -> None:
    with open_signer(pem_uri, kid="next-key") as unknown:
        fetcher = make_fetcher(signer=SignerSet([unknown, signer]))
        assert fetcher.token().value
    assert [request.header["kid"] for request in sandbox.requests] == ["next-key", KID]


@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_a_wrong_clock_is_corrected_once(
    make_fetcher: FetcherMaker, signer: Signer, offset: float
) -> None:
    with Sandbox(issuer_id=ISSUER, clock=lambda: time.time() + offset) as sandbox:
        sandbox.register_key(signer.kid, signer.public_key.jwk())
        fetcher = make_fetcher(
            environment=sandbox.base_url,
            ca_file=sandbox.ca_file,
            client_certificate=certificate_of(sandbox),
            retry_interval=0.01,
        )
        assert fetcher.token().value
        assert sandbox.counters.token_requests == 2
        fetcher.invalidate(fetcher.token())
        assert fetcher.token().value
        assert sandbox.counters.token_requests == 3


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (0.0, None),
        (4.9, None),
        (-4.9, None),
        (5.0, "5 seconds behind D1's"),
        (-5.0, "5 seconds ahead of D1's"),
        (61.2, "61 seconds behind D1's"),
    ],
)
def test_a_clock_is_called_wrong_from_five_seconds_on(offset: float, words: str | None) -> None:
    refusal = TokenRefusedError("no", status=401, error="invalid_client", hint="Ask Thales.")
    endpoint._tell_clock(refusal, offset)
    assert refusal.details.get("clock_offset") == (round(offset) if words else None)
    assert refusal.hint.endswith("Ask Thales.")
    assert (words or "Ask") in refusal.hint


def test_a_skew_that_is_too_large_is_an_error(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT, date_offset=86_400.0)
    with pytest.raises(TokenRefusedError):
        fetcher.token()
    assert sandbox.counters.token_requests == 1


def test_a_forked_child_has_a_flight_of_its_own(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.3)
    fetcher.prefetch()
    until(lambda: sandbox.counters.token_requests == 1)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if fetcher.token(timeout=10).value else 1)
        except BaseException:  # noqa: BLE001 (the child must not run the parent's tests)
            os._exit(2)
    parent = fetcher.token()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert sandbox.counters.token_requests == 2
    age(fetcher, 895)
    assert fetcher.token().value != parent.value


def test_neither_fetcher_nor_token_shows_or_leaves_the_process(fetcher: TokenFetcher) -> None:
    token = fetcher.token()
    for shown in (repr(token), str(token), f"{token}", repr(fetcher)):
        assert token.value not in shown
    for thing in (token, fetcher):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
        with pytest.raises(TypeError):
            copy.copy(thing)


def test_a_renewal_that_asks_for_a_token_is_told(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetchers: list[TokenFetcher] = []
    fetcher = make_fetcher(correlation_id=lambda: fetchers[0].token().value)
    fetchers.append(fetcher)
    with pytest.raises(ConfigurationError, match="waits for itself"):
        fetcher.token()
    assert sandbox.counters.token_requests == 0


@pytest.mark.parametrize(
    "options",
    [
        {"retry_interval": 0},
        {"retry_interval": float("nan")},
        {"retry_interval": "1"},
        {"store_key": bytes(32)},
        {"client_certificate": "client.pem"},
        {"client_certificate": ("client.pem", "client.key")},
        {"ca_file": 5},
        {"signer": None},
        {"limits": 5},
        {"observers": 5},
        {"issuer_id": None},
        {"environment": None},
        {"audience": 5},
        {"assertion_lifetime": 901},
        {"assertion_lifetime": True},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_is_our_error(
    make_fetcher: FetcherMaker, options: dict[str, object]
) -> None:
    with pytest.raises(D1SignerError):
        make_fetcher(**options)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", None])
def test_limits_are_numbers_of_seconds(value: float) -> None:
    for name in ("total", "sign", "connect", "read"):
        with pytest.raises(InvalidInputError, match=name):
            Limits(**{name: value})


def test_a_signer_that_asks_to_wait_in_its_own_words_does_not_stop_the_renewals(
    make_fetcher: FetcherMaker, sandbox: Sandbox, pem_uri: str
) -> None:
    error = SignerThrottled("slow down", details={"retry_after": "5s"})
    with open_signer(pem_uri, kid=KID) as signer:
        fetcher = make_fetcher(
            signer=SignerSet([LazySigner(failing(error), kid=KID, public_key=signer.public_key)])
        )
        for _ in range(3):
            with pytest.raises(SignerThrottled):
                fetcher.token()
    assert sandbox.counters.token_requests == 0


def failing(error: Exception) -> Callable[[], Signer]:
    def opener() -> Signer:
        raise error

    return opener


def test_a_first_signer_that_hangs_at_opening_fails_over(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer
) -> None:
    released = threading.Event()

    def hanging() -> Signer:
        released.wait(30)
        raise AssertionError

    lazy = LazySigner(hanging, kid="dead", public_key=signer.public_key)
    fetcher = make_fetcher(signer=SignerSet([lazy, signer]), limits=Limits(sign=0.1))
    assert fetcher.token().value
    assert [request.header["kid"] for request in sandbox.requests] == [KID]
    lazy.close()  # does not wait for the opening
    released.set()


def test_a_closed_fetcher_posts_nothing_that_was_still_being_signed(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer
) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def slow() -> Signer:
        opening.set()
        go_on.wait(10)
        return signer

    lazy = LazySigner(slow, kid=KID, public_key=signer.public_key)
    fetcher = make_fetcher(signer=SignerSet([lazy]))
    fetcher.prefetch()
    assert opening.wait(10)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(fetcher.close)
        until(lambda: fetcher._closed)
        go_on.set()
        closing.result(timeout=10)
    until(lambda: not workers())
    assert sandbox.counters.token_requests == 0


def test_no_assertion_outlives_fifteen_minutes_however_wrong_d1s_clock_is(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(assertion_lifetime=900)
    sandbox.misbehave(Fault.INVALID_GRANT, times=1, date_offset=590.0)
    with contextlib.suppress(TokenRefusedError):
        fetcher.token()
    assert len(sandbox.requests) == 2
    for request in sandbox.requests:
        assert request.claims["exp"] <= request.at + 900  # type: ignore[operator]


@pytest.mark.parametrize("key", [b"fleet-key" * 4, b"short-fleet-key"])
def test_a_store_key_that_cannot_be_used_is_in_no_frame(
    make_fetcher: FetcherMaker, leak_watch: LeakWatch, key: bytes
) -> None:
    leak_watch.note(key)
    leak_watch.note(repr(key)[2:-1])
    with pytest.raises(ConfigurationError, match="32 bytes"):
        make_fetcher(store=object(), store_key=key)

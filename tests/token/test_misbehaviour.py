# SPDX-License-Identifier: Apache-2.0
"""Whatever the server does, the caller gets an error of ours that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from d1_signer import Limits, RequestEvent, TokenError
from d1_signer.events import Event
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import FetcherMaker

SHORT = Limits(total=1.0, read=0.5)
ENOUGH = Limits(total=25.0, read=0.5)

# fault, its parameters, code of our error, whether trying again can help
CASES: list[tuple[Fault, dict[str, Any], str, bool]] = [
    (Fault.DELAY, {"seconds": 30.0}, "token_unavailable", True),
    (Fault.STATUS_401, {}, "token_refused", False),
    (Fault.STATUS_403, {}, "token_refused", False),
    (Fault.STATUS_4XX, {}, "token_refused", False),
    (Fault.STATUS_429, {"retry_after": 30}, "token_unavailable", True),
    (Fault.STATUS_429, {"retry_after": 30, "as_date": True}, "token_unavailable", True),
    (Fault.STATUS_500, {}, "token_unavailable", True),
    (Fault.STATUS_503, {"retry_after": 30}, "token_unavailable", True),
    (Fault.STATUS_503, {"retry_after": "soon"}, "token_unavailable", True),
    (Fault.INVALID_GRANT, {}, "token_refused", False),
    (Fault.HOSTILE_ECHO, {}, "token_refused", False),
    (Fault.HTML_400, {}, "token_refused", False),
    (Fault.EMPTY_400, {}, "token_refused", False),
    (Fault.EMPTY_BODY, {}, "token_response", False),
    (Fault.HUGE_BODY, {}, "token_response", False),
    (Fault.SLOW_BODY, {"seconds": 0.1}, "token_unavailable", True),
    (Fault.GZIP_BOMB, {"size": 1 << 20}, "token_response", False),
    (Fault.BROKEN_JSON, {}, "token_response", False),
    (Fault.JSON_ARRAY, {}, "token_response", False),
    (Fault.WRONG_TOKEN_TYPE, {}, "token_response", False),
    (Fault.EXPIRES_IN_MISSING, {}, "token_response", False),
    (Fault.EXPIRES_IN_ZERO, {}, "token_response", False),
    (Fault.EXPIRES_IN_STRING, {}, "token_response", False),
    (Fault.EXPIRES_IN_NEGATIVE, {}, "token_response", False),
    (Fault.EXPIRES_IN_NAN, {}, "token_response", False),
    (Fault.ACCESS_TOKEN_MISSING, {}, "token_response", False),
    (Fault.ACCESS_TOKEN_NOT_STRING, {}, "token_response", False),
    (Fault.ACCESS_TOKEN_ILLEGAL, {}, "token_response", False),
    (Fault.REDIRECT, {}, "token_response", False),
    (Fault.REDIRECT, {"status": 302}, "token_response", False),
    (Fault.CLOSE_BEFORE_ANSWER, {}, "token_unavailable", True),
    (Fault.CLOSE_MID_BODY, {}, "token_unavailable", True),
]
# These are not errors: what they do, the tests below say.
HARMLESS = {Fault.WRONG_CONTENT_TYPE, Fault.EXPIRES_IN_SHORT, Fault.EXPIRES_IN_HUGE}


def test_every_fault_of_the_sandbox_is_tried() -> None:
    assert {case[0] for case in CASES} | HARMLESS == set(Fault)


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("fault", "parameters", "code", "retryable"),
    CASES,
    ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)],
)
def test_a_fault_becomes_our_error(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    fault: Fault,
    parameters: dict[str, Any],
    code: str,
    retryable: bool,
) -> None:
    # A body that drips is ended by the total alone; a server that asks for half a minute, at once.
    fetcher = make_fetcher(limits=SHORT if fault is Fault.SLOW_BODY else ENOUGH)
    sandbox.misbehave(fault, **parameters)
    with pytest.raises(TokenError) as failure:
        fetcher.token()
    error = failure.value
    assert (error.code, error.retryable) == (code, retryable)
    assert error.hint
    # What an operator tells Thales: it stands in D1's log.
    assert error.details["correlation_id"] == sandbox.requests[-1].correlation_id
    assert error.__cause__ is None
    assert error.__context__ is None
    assert sandbox.counters.token_requests == 1


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("fault", "parameters", "limits", "why"),
    [
        (Fault.CLOSE_MID_BODY, {}, Limits(), "the connection was closed amid it"),
        # These limits bound the way to the first byte too, and leave time for it.
        (Fault.SLOW_BODY, {"seconds": 60.0}, Limits(read=3.0), "the rest did not come in time"),
        (Fault.SLOW_BODY, {"seconds": 0.1}, Limits(total=5.0), "the rest did not come in time"),
    ],
)
def test_an_answer_that_breaks_off_is_not_about_our_certificate(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    fault: Fault,
    parameters: dict[str, Any],
    limits: Limits,
    why: str,
) -> None:
    events: list[Event] = []
    fetcher = make_fetcher(limits=limits, observers=[events.append])
    sandbox.misbehave(fault, **parameters)
    with pytest.raises(TokenError) as failure:
        fetcher.token()
    error = failure.value
    assert f"(HTTP 200) broke off: {why}" in error.message
    assert "certificate" not in str(error)
    assert f"correlation id {sandbox.requests[-1].correlation_id}" in error.hint
    assert (error.details["failed"], error.details["status"]) == ("answer", 200)
    (request,) = [event for event in events if isinstance(event, RequestEvent)]
    assert (request.status, request.error) == (200, "token_unavailable")


def test_a_huge_body_is_not_read(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HUGE_BODY, size=1 << 40)
    with pytest.raises(TokenError, match="64 KiB"):
        make_fetcher(limits=SHORT).token()


def test_a_hostile_echo_is_masked_but_named(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HOSTILE_ECHO)
    with pytest.raises(TokenError) as failure:
        make_fetcher(limits=SHORT).token()
    body = sandbox.exchanges[-1].request_body.decode()
    assertion = body.rpartition("assertion=")[2].partition("&")[0]
    told = f"{failure.value} {failure.value!r} {failure.value.to_dict()}"
    for segment in assertion.split("."):
        assert segment not in told
    assert "[masked]" in told


def test_the_content_type_alone_spoils_nothing(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.WRONG_CONTENT_TYPE)
    assert make_fetcher().token().value


def test_an_endless_life_counts_as_fifteen_minutes(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.EXPIRES_IN_HUGE)
    token = make_fetcher().token()
    assert token.expires_at <= sandbox.requests[-1].at + 900


@pytest.mark.parametrize("fault", [Fault.CLOSE_BEFORE_ANSWER, Fault.STATUS_500, Fault.STATUS_503])
def test_a_passing_fault_is_not_seen_by_the_caller(
    make_fetcher: FetcherMaker, sandbox: Sandbox, fault: Fault
) -> None:
    options: dict[str, Any] = {"retry_after": None} if fault is Fault.STATUS_503 else {}
    sandbox.misbehave(fault, times=1, **options)
    assert make_fetcher().token().value
    assert sandbox.counters.token_requests == 2


def test_a_server_that_is_not_there(make_fetcher: FetcherMaker) -> None:
    gone = Sandbox(issuer_id="gone")
    gone.start()
    url = gone.base_url
    gone.close()
    with pytest.raises(TokenError, match="connection refused") as failure:
        make_fetcher(environment=url, limits=SHORT).token()
    assert failure.value.retryable


def test_a_host_name_that_is_not_known(make_fetcher: FetcherMaker) -> None:
    with pytest.raises(TokenError) as failure:
        make_fetcher(environment="https://d1.invalid/authz/v1", limits=SHORT).token()
    assert failure.value.retryable

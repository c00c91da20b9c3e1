# SPDX-License-Identifier: Apache-2.0
"""What a fetcher tells of itself: `status`, the health checks made of it, and lines of the log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

import httpx
import pytest
import requests

from d1_signer import (
    D1SignerError,
    Limits,
    RenewalEvent,
    RequestEvent,
    SignerSet,
    SignEvent,
    TokenFetcher,
    TokenUnavailable,
    open_signer,
)
from d1_signer.errors import TokenError
from d1_signer.events import Event
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token.flight import Flight
from d1_signer.token.status import LeaseState, StoreState
from tests.token.conftest import ISSUER, KID, FetcherMaker, one_attempt
from tests.token.test_fetcher import age, until

__all__ = ["one_attempt"]  # a fixture

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


def facts(line: str) -> dict[str, str]:
    """What stands in a line of the log as NAME=VALUE."""
    pairs = re.findall(r'(?:^|\s)([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {name: value.strip('"') for name, value in pairs}


def line(caplog: pytest.LogCaptureFixture, event: str) -> str:
    (found,) = [text for text in caplog.messages if text.startswith(event)]
    return found


def test_before_anything_has_happened(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    status = fetcher.status()
    assert (status.environment, status.issuer_id) == (sandbox.base_url, ISSUER)
    assert (status.token, status.expires_at, status.failures) == ("expired", None, 0)
    assert (status.last_success, status.last_failure, status.renewing) == (None, None, False)
    assert (status.store, status.lease) == (StoreState.NONE, LeaseState.NONE)
    assert [(member.kid, member.failures) for member in status.members] == [(KID, 0)]
    assert status.healthy
    assert sandbox.counters.token_requests == 0


def test_after_a_success(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    token = fetcher.token()
    status = fetcher.status()
    assert (status.token, status.expires_at, status.healthy) == ("fresh", token.expires_at, True)
    assert status.next_renewal_at is not None
    assert status.next_renewal_at < token.expires_at
    success = status.last_success
    assert success is not None
    assert success.attempt is not None
    sent = sandbox.requests[-1]
    assert (success.shared, success.attempt.kid, success.attempt.status) == (False, KID, 200)
    assert success.attempt.correlation_id == sent.correlation_id
    document = json.dumps(status.to_dict())
    assert json.loads(document)["healthy"] is True
    assert token.value not in document
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.failures = 7  # type: ignore[misc]


@pytest.mark.usefixtures("one_attempt")
def test_after_failures(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_503)
    with pytest.raises(TokenUnavailable) as raised:
        fetcher.token()
    status = fetcher.status()
    assert (status.healthy, status.failures, status.token) == (False, 1, "expired")
    failure = status.last_failure
    assert failure is not None
    assert (failure.code, failure.retryable) == ("token_unavailable", True)
    assert failure.correlation_id == sandbox.requests[-1].correlation_id
    assert failure.correlation_id == raised.value.details["correlation_id"]
    assert status.next_renewal_at is not None
    assert status.next_renewal_at > failure.at + 500  # not before the pause is over


def test_a_valid_token_outlives_failures(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    fetcher = make_fetcher(retry_interval=0.01, limits=Limits(total=0.5))
    fetcher.token()
    sandbox.misbehave(Fault.STATUS_503)
    age(fetcher, 700)
    fetcher.token()
    until(lambda: fetcher.status().failures > 0, seconds=20)
    status = fetcher.status()
    assert (status.token, status.healthy) == ("stale", True)
    assert status.last_success is not None


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """None can be had: there is no room for its stack."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


def test_that_no_renewal_can_begin_is_told_and_the_next_call_tries_again(
    make_fetcher: FetcherMaker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "d1_signer.token")
    fetcher = make_fetcher()
    with no_threads():
        for _ in range(2):
            with pytest.raises(TokenError):
                fetcher.token()
        with pytest.raises(TokenError, match="No thread can be started") as caught:
            fetcher.token()
        assert caught.value.retryable
        assert "TasksMax" in caught.value.hint
    found = facts(line(caplog, "token.failed"))  # once, however many ask
    assert (found["code"], found["failures"], found["valid_for"]) == ("token", "1", "0.0")
    status = fetcher.status()
    assert (status.healthy, status.failures) == (False, 1)
    assert status.last_failure is not None
    assert status.last_failure.hint == caught.value.hint
    caplog.clear()
    fetcher.token()
    assert (fetcher.status().healthy, fetcher.status().failures) == (True, 0)
    age(fetcher, 700)
    with no_threads():
        assert [fetcher.token().expires_at for _ in range(3)]
    assert float(facts(line(caplog, "token.failed"))["valid_for"]) > 0
    assert (fetcher.status().healthy, fetcher.status().failures) == (True, 1)


def test_that_a_prefetch_cannot_begin_is_told_at_once(
    make_fetcher: FetcherMaker, caplog: pytest.LogCaptureFixture
) -> None:
    with no_threads(), pytest.raises(TokenError, match="No thread can be started"):
        make_fetcher().prefetch()
    assert facts(line(caplog, "token.failed"))["failures"] == "1"


def test_a_call_without_threads_amid_an_outage_ends_with_it(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(limits=Limits(total=5))
    sandbox.misbehave(Fault.STATUS_503, times=1, retry_after=6)  # later than this renewal ends
    with pytest.raises(TokenUnavailable):
        fetcher.token()
    with no_threads(), pytest.raises(TokenError, match="No thread can be started"):
        fetcher.token(timeout=60)
    fetcher._not_before = fetcher._clock() + 0.5
    assert fetcher.token(timeout=60).value


def test_a_valid_token_is_not_renewed_with_each_call_where_no_thread_can_be_had(
    make_fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = make_fetcher(retry_interval=600.0)
    fetcher.token()
    age(fetcher, 700)
    fetcher._not_before = fetcher._clock()
    begun: list[Flight] = []
    begin = Flight.begin

    def counted(flight: Flight, fly: Callable[[Flight], None]) -> None:
        begun.append(flight)
        begin(flight, fly)

    monkeypatch.setattr(Flight, "begin", counted)
    with no_threads():
        assert [fetcher.token().value for _ in range(50)]
    assert len(begun) == 1


class _Asking(logging.Handler):
    """Asks a fetcher for a token, and another thread for its status, whenever one has failed."""

    def __init__(self, fetcher: TokenFetcher) -> None:
        super().__init__()
        self.fetcher = fetcher
        self.errors: list[D1SignerError] = []
        self.failures: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("token.failed"):
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(self.fetcher.status)
                self.failures.append(asked.result(20).failures)
            with pytest.raises(D1SignerError) as raised:
                self.fetcher.token(timeout=60)
            self.errors.append(raised.value)


def test_a_handler_of_the_log_that_asks_for_a_token_holds_up_nobody(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher(limits=Limits(total=5))
    handler = _Asking(fetcher)
    log = logging.getLogger("d1_signer.token")
    sandbox.misbehave(Fault.STATUS_503, retry_after=6)  # later than this renewal ends
    log.addHandler(handler)
    try:
        with pytest.raises(TokenUnavailable):
            fetcher.token()
    finally:
        log.removeHandler(handler)
    assert handler.failures == [1]
    assert [error.code for error in handler.errors] == ["configuration"]
    assert "waits for itself" in handler.errors[0].message
    assert "handler of the log" in handler.errors[0].message


def test_a_handler_of_a_signal_does_not_wait_for_what_it_interrupts(
    make_fetcher: FetcherMaker,
) -> None:
    fetcher = make_fetcher()
    raised: list[D1SignerError] = []

    def ask(*_: object) -> None:
        try:
            fetcher.token()
        except D1SignerError as error:
            raised.append(error)

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        with fetcher._locked():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [error.code for error in raised] == ["configuration"]
    assert fetcher.token().value
    assert fetcher.status().failures == 0


def test_while_a_renewal_is_under_way_and_after_the_end(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher()
    sandbox.misbehave(Fault.DELAY, seconds=30)
    fetcher.prefetch()
    status = fetcher.status()
    assert (status.renewing, status.next_renewal_at, status.closed) == (True, None, False)
    fetcher.close()
    status = fetcher.status()
    assert (status.closed, status.healthy, status.next_renewal_at) == (True, False, None)


def test_members_that_rest_are_told(make_fetcher: FetcherMaker, pem_uri: str) -> None:
    broken = open_signer(pem_uri, kid="broken")
    broken.close()
    with SignerSet([broken, open_signer(pem_uri, kid=KID)]) as signers:
        fetcher = make_fetcher(signer=signers)
        fetcher.token()
        told = {member.kid: member.last_error for member in fetcher.status().members}
    assert told == {"broken": "signer_closed", KID: None}


def test_a_renewal_is_told_with_its_names(
    make_fetcher: FetcherMaker, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.misbehave(Fault.STATUS_503, times=1)
    with caplog.at_level(logging.INFO, logger="d1_signer.token"):
        token = make_fetcher().token()
    retry, renewed = facts(line(caplog, "token.retry")), facts(line(caplog, "token.renewed"))
    first, second = sandbox.requests
    host = sandbox.base_url.split("/")[2]
    for told, sent, attempt, status in ((retry, first, "1", "503"), (renewed, second, "2", "200")):
        assert (told["host"], told["issuer"], told["kid"]) == (host, ISSUER, KID)
        assert told["jti"] == sent.claims["jti"]
        assert told["correlation_id"] == sent.correlation_id
        assert (told["attempt"], told["status"]) == (attempt, status)
        assert float(told["seconds"]) >= 0
    assert token.value not in caplog.text


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("fault", [Fault.INVALID_GRANT, Fault.STATUS_503, Fault.STATUS_403])
def test_a_failure_is_told_with_its_names(
    fetcher: TokenFetcher, sandbox: Sandbox, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    sandbox.misbehave(fault)
    with pytest.raises(TokenError) as raised:
        fetcher.token()
    text = line(caplog, "token.failed")
    told, sent = facts(text), sandbox.requests[-1]
    assert told.keys() >= {"host", "issuer", "kid", "jti", "status", "attempt", "seconds"}
    assert (told["code"], told["failures"]) == (raised.value.code, "1")
    assert told["jti"] == sent.claims["jti"] == raised.value.details["jti"]
    assert told["correlation_id"] == sent.correlation_id
    # The id stands beside the advice, where the details are not shown.
    assert f"with the correlation id {sent.correlation_id}" in str(raised.value)
    assert f"with the correlation id {sent.correlation_id}" in text


@pytest.mark.usefixtures("one_attempt")
def test_a_failure_tells_for_how_long_the_last_token_serves(
    make_fetcher: FetcherMaker, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[RenewalEvent] = []
    caplog.set_level(logging.INFO, "d1_signer.token")

    def note(event: Event) -> None:
        if isinstance(event, RenewalEvent):
            events.append(event)

    fetcher = make_fetcher(observers=[note])
    fetcher.token()
    until(lambda: len(events) == 1)
    age(fetcher, 800)
    sandbox.misbehave(Fault.STATUS_503, times=2)
    fetcher.token_now()
    until(lambda: len(events) == 2)
    age(fetcher, 800)  # beyond any back-off
    with pytest.raises(TokenError):
        fetcher.token()
    until(lambda: len(events) == 3)
    age(fetcher, 800)  # beyond any back-off
    fetcher.token()
    until(lambda: len(events) == 4)
    failed = [each for each in caplog.records if each.getMessage().startswith("token.failed")]
    assert [each.levelname for each in failed] == ["WARNING", "ERROR"]
    assert 80 < float(facts(failed[0].getMessage())["valid_for"]) < 100
    assert facts(failed[1].getMessage())["valid_for"] == "0.0"
    assert [round(event.valid_for, -2) for event in events] == [900, 100, 0, 900]
    renewed = [text for text in caplog.messages if text.startswith("token.renewed")]
    assert ["after_failures" in facts(text) for text in renewed] == [False, True]
    assert facts(renewed[1])["after_failures"] == "2"


def test_a_signer_that_fails_is_told_with_host_and_issuer(
    make_fetcher: FetcherMaker, pem_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    closed = open_signer(pem_uri)
    closed.close()
    with pytest.raises(D1SignerError):
        make_fetcher(signer=closed).token()
    told = facts(line(caplog, "token.failed"))
    assert (told["code"], told["issuer"]) == ("signer_closed", ISSUER)
    assert told["host"].startswith("127.0.0.1:")


def test_events_can_be_joined(make_fetcher: FetcherMaker, sandbox: Sandbox, pem_uri: str) -> None:
    events: list[Any] = []
    with open_signer(pem_uri, kid=KID, observers=[events.append]) as signer:
        make_fetcher(signer=signer, observers=[events.append]).token()
        thumbprint = signer.public_key.thumbprint()
    (signed,) = [event for event in events if isinstance(event, SignEvent)]
    (sent,) = [event for event in events if isinstance(event, RequestEvent)]
    assert signed.use is not None
    assert dict(signed.use.references)["jti"] == sent.jti == sandbox.requests[0].claims["jti"]
    assert signed.kid == sent.kid == KID
    assert signed.thumbprint == thumbprint
    assert signed.digest is not None
    assert re.fullmatch(r"[0-9a-f]{64}", signed.digest)
    assert signed.time is not None
    assert abs(signed.time - time.time()) < 60


@pytest.fixture
def healthz(sandbox: Sandbox, pem_uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, with settings from the environment as it stands there."""
    settings = {
        "D1_SIGNER_KEY": f"{pem_uri}#{KID}",
        "D1_ISSUER_ID": ISSUER,
        "D1_ENVIRONMENT": sandbox.base_url,
        "D1_CLIENT_CERT": str(sandbox.client_certificate),
        "D1_CLIENT_KEY": str(sandbox.client_key),
        "D1_CA_FILE": str(sandbox.ca_file),
        "D1_TOTAL_SECONDS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("healthz", "fleet_fetcher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import healthz

    with healthz.fetcher:
        yield healthz
    for name in ("healthz", "fleet_fetcher"):
        sys.modules.pop(name, None)


def judged(sandbox: Sandbox, fetcher: TokenFetcher, ask: Any) -> None:
    """Ask for the health before, after and without a token."""
    assert ask("/elsewhere")[0] == 404
    code, document = ask("/healthz")
    assert (code, document["token"], document["last_success"]) == (200, "expired", None)
    token = fetcher.token()
    code, document = ask("/healthz")
    assert (code, document["token"]) == (200, "fresh")
    assert document["last_success"]["attempt"]["kid"] == KID
    fetcher.invalidate(token)
    sandbox.misbehave(Fault.STATUS_503)
    with pytest.raises(TokenUnavailable):
        fetcher.token()
    until(lambda: ask("/healthz")[0] == 503, seconds=20)  # the renewal may outlast its waiter
    document = ask("/healthz")[1]
    assert document["healthy"] is False
    assert document["last_failure"]["code"] == "token_unavailable"
    known = {request.correlation_id for request in sandbox.requests}
    assert document["last_failure"]["correlation_id"] in known
    sandbox.misbehave(None)

    def recovered() -> bool:
        with contextlib.suppress(TokenUnavailable):
            fetcher.token()
        return bool(ask("/healthz")[0] == 200)

    until(recovered, seconds=20)


def test_the_recipe_for_wsgi(healthz: Any, sandbox: Sandbox) -> None:
    with make_server("127.0.0.1", 0, healthz.wsgi_application) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"

        def ask(path: str) -> tuple[int, Any]:
            answer = requests.get(url + path, timeout=30)
            return answer.status_code, answer.json() if answer.content else None

        judged(sandbox, healthz.fetcher, ask)
        server.shutdown()
        thread.join(20)


@pytest.mark.anyio
async def test_the_recipe_for_asgi(healthz: Any, sandbox: Sandbox) -> None:
    import anyio.from_thread
    import anyio.to_thread

    transport = httpx.ASGITransport(app=healthz.asgi_application)
    async with httpx.AsyncClient(transport=transport, base_url="http://health") as client:

        def ask(path: str) -> tuple[int, Any]:
            answer = anyio.from_thread.run(client.get, path)
            return answer.status_code, answer.json() if answer.content else None

        await anyio.to_thread.run_sync(judged, sandbox, healthz.fetcher, ask)

# SPDX-License-Identifier: Apache-2.0
"""HttpxD1Auth, sync and async: the token goes to D1 only, a 401 renews and replays once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from d1_signer import (
    AccessToken,
    D1SignerError,
    HttpxD1Auth,
    Limits,
    TokenFetcher,
    TokenRefusedError,
)
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import age, until
from tests.transport.test_answers import Server, place_of

BODY = b"payload " * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()

Call = Callable[..., httpx.Response]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker) -> TokenFetcher:
    return make_fetcher(retry_interval=0.01)


def client_settings(fetcher: TokenFetcher) -> dict[str, Any]:
    return {
        "auth": HttpxD1Auth(fetcher),
        "verify": fetcher.ssl_context,
        "trust_env": False,
        "timeout": 30.0,
    }


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, fetcher: TokenFetcher) -> Iterator[Call]:
    """Calls through one client of either kind."""
    if request.param == "sync":
        with httpx.Client(**client_settings(fetcher)) as client:
            yield client.request
        return
    with asyncio.Runner() as runner:
        asynchronous = httpx.AsyncClient(**client_settings(fetcher))
        yield lambda *args, **options: runner.run(asynchronous.request(*args, **options))
        runner.run(asynchronous.aclose())


def test_one_token_serves_many_calls(call: Call, sandbox: Sandbox) -> None:
    for _ in range(5):
        assert call("GET", f"{sandbox.banking_url}/ping").status_code == 200
    assert sandbox.counters.token_requests == 1


@pytest.mark.parametrize(
    "body", [{"content": BODY}, {"content": BODY.decode()}], ids=["bytes", "text"]
)
def test_a_401_renews_once_and_replays_the_body(
    call: Call, sandbox: Sandbox, body: dict[str, Any]
) -> None:
    url = f"{sandbox.banking_url}/ping"
    call("GET", url)
    sandbox.revoke_tokens()
    answer = call("POST", url, **body)
    assert answer.status_code == 200
    assert answer.json()["sha256"] == DIGEST
    assert [earlier.status_code for earlier in answer.history] == [401]
    assert sandbox.counters.token_requests == 2


def test_a_401_that_stays_is_returned(call: Call, sandbox: Sandbox) -> None:
    sandbox.misbehave_banking(Fault.STATUS_401)
    assert call("GET", f"{sandbox.banking_url}/ping").status_code == 401
    assert sandbox.counters.banking_requests == 2
    assert sandbox.counters.token_requests == 2


def parts() -> Iterator[bytes]:
    yield from (b"a", b"b")


async def async_parts() -> AsyncIterator[bytes]:
    for part in (b"a", b"b"):
        yield part


@pytest.mark.parametrize("form", ["stream", "file", "multipart"])
def test_a_streamed_body_is_not_sent_again(
    call: Call, sandbox: Sandbox, request: pytest.FixtureRequest, form: str
) -> None:
    url = f"{sandbox.banking_url}/ping"
    call("GET", url)
    sandbox.revoke_tokens()
    asynchronous = "async" in request.node.callspec.id
    bodies: dict[str, Callable[[], dict[str, Any]]] = {
        "stream": lambda: {"content": async_parts() if asynchronous else parts()},
        "file": lambda: {"content": async_parts() if asynchronous else io.BytesIO(BODY)},
        "multipart": lambda: {"files": {"f": ("f.txt", BODY)}},
    }
    answer = call("POST", url, **bodies[form]())
    assert answer.status_code == 401
    assert sandbox.counters.banking_requests == 2
    # The next call finds the refused token forgotten.
    assert call("GET", url).status_code == 200


def test_other_hosts_get_no_token(call: Call, sandbox: Sandbox) -> None:
    with Sandbox(issuer_id="another", tls=False) as other:
        answer = call("GET", f"{other.banking_url}/ping")
    assert answer.status_code == 401
    assert "authorization" not in answer.request.headers
    assert sandbox.counters.token_requests == 0


def test_a_redirect_to_another_host_gets_no_token(
    call: Call, fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    with Sandbox(issuer_id="another", tls=False) as other:
        sandbox.misbehave_banking(Fault.REDIRECT, location=f"{other.banking_url}/ping")
        answer = call("GET", f"{sandbox.banking_url}/ping", follow_redirects=True)
        assert other.counters.banking_refused == other.counters.banking_requests == 1
    assert answer.status_code == 401
    assert "authorization" not in answer.request.headers
    # And the 401 of that host says nothing about our token.
    assert sandbox.counters.token_requests == 1
    assert fetcher.token_now() is not None


def test_a_failure_is_ours(call: Call, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT)
    with pytest.raises(TokenRefusedError):
        call("GET", f"{sandbox.banking_url}/ping")
    assert sandbox.counters.banking_requests == 0


def test_the_context_is_the_mutual_tls_of_the_fetcher(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    context = fetcher.ssl_context
    assert context.verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(httpx.HTTPError), httpx.Client(trust_env=False) as plain:
        plain.get(f"{sandbox.banking_url}/ping")
    with httpx.Client(verify=context, trust_env=False) as mutual:
        assert mutual.get(f"{sandbox.banking_url}/ping").status_code == 401
    # What one consumer does to its own is no business of the next one's.
    context.verify_mode, context.check_hostname = ssl.CERT_REQUIRED, False
    assert fetcher.ssl_context.check_hostname
    assert fetcher.ssl_context is not context


async def gather(number: int, work: Callable[[], Awaitable[httpx.Response]]) -> list[Any]:
    return await asyncio.gather(*(work() for _ in range(number)), return_exceptions=True)


class Pulse:
    """The longest time for which the event loop did not turn."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._task = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.monotonic() - before)

    def stop(self) -> None:
        self._task.cancel()


@pytest.mark.anyio
async def test_two_hundred_cold_tasks_ask_once_and_the_event_loop_turns(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=1.0)
    auth = HttpxD1Auth(fetcher)
    pulse = Pulse()
    tokens = await asyncio.gather(*(auth._token() for _ in range(200)))
    pulse.stop()
    assert len({token.value for token in tokens}) == 1
    assert sandbox.counters.token_requests == 1
    # Waiting on the loop would have stopped it for a second.
    assert pulse.longest < 0.8
    assert sum("AnyIO" in thread.name for thread in threading.enumerate()) <= 4


@pytest.mark.anyio
async def test_tasks_that_wait_leave_the_event_loop_to_others(
    fetcher: TokenFetcher, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.5)
    looks = 0
    token_now = TokenFetcher.token_now

    def counted(self: TokenFetcher) -> AccessToken | None:
        nonlocal looks
        looks += 1
        return token_now(self)

    monkeypatch.setattr(TokenFetcher, "token_now", counted)
    auth = HttpxD1Auth(fetcher)
    await asyncio.gather(*(auth._token() for _ in range(200)))
    assert looks <= 2 * 200  # once before the wait, once after it


@pytest.mark.anyio
async def test_whoever_waits_for_all_may_be_cancelled(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.3)
    auth = HttpxD1Auth(fetcher)
    first, *others = [asyncio.create_task(auth._token()) for _ in range(20)]
    until_started = asyncio.get_running_loop().run_in_executor(
        None, until, lambda: sandbox.counters.token_requests == 1
    )
    await until_started
    first.cancel()
    tokens = await asyncio.gather(*others)
    assert first.cancelled()
    assert len({token.value for token in tokens}) == 1
    assert sandbox.counters.token_requests == 1


@pytest.mark.anyio
async def test_cold_tasks_share_one_failure(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    fetcher = make_fetcher()
    sandbox.misbehave(Fault.INVALID_GRANT)
    async with httpx.AsyncClient(**client_settings(fetcher)) as client:
        results = await gather(50, lambda: client.get(f"{sandbox.banking_url}/ping"))
    assert {type(result) for result in results} == {TokenRefusedError}
    assert sandbox.counters.token_requests == 1


@pytest.mark.anyio
async def test_a_stale_token_is_taken_on_the_loop_and_renewed_behind_it(
    fetcher: TokenFetcher, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetcher.token()
    age(fetcher, 700)
    monkeypatch.setattr(
        TokenFetcher, "token", lambda *_: pytest.fail("a thread waited for a token")
    )
    async with httpx.AsyncClient(**client_settings(fetcher)) as client:
        assert (await client.get(f"{sandbox.banking_url}/ping")).status_code == 200
    until(lambda: fetcher.token_now() not in {None, first})
    assert sandbox.counters.token_requests == 2


@pytest.mark.anyio
async def test_a_cancelled_call_leaves_at_once_and_the_renewal_goes_on(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.5)
    async with httpx.AsyncClient(**client_settings(fetcher)) as client:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.get(f"{sandbox.banking_url}/ping"), 0.1)
        assert time.monotonic() - started < 0.4
        assert (await client.get(f"{sandbox.banking_url}/ping")).status_code == 200
    assert sandbox.counters.token_requests == 1


@pytest.mark.anyio
async def test_calls_that_give_up_do_not_pile_up_threads(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.6)
    before = threading.active_count()

    async def give_up(client: httpx.AsyncClient) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.get(f"{sandbox.banking_url}/ping"), 0.03)

    async with httpx.AsyncClient(**client_settings(fetcher)) as client:
        for _ in range(5):
            await asyncio.gather(*(give_up(client) for _ in range(4)))
        # Four that wait, and the renewal itself.
        assert threading.active_count() - before <= 5
        assert (await client.get(f"{sandbox.banking_url}/ping")).status_code == 200


def test_one_auth_serves_event_loops_one_after_the_other_and_at_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    auth = HttpxD1Auth(make_fetcher(limits=Limits(total=10.0)))
    sandbox.misbehave(Fault.DELAY, seconds=0.2, times=1)
    results: list[Any] = []

    def loop() -> None:
        try:
            results.append(asyncio.run(auth._token()).value)
        except D1SignerError as error:
            results.append(error)

    threads = [threading.Thread(target=loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop()
    assert len(results) == 4
    assert len(set(results)) == 1
    assert sandbox.counters.token_requests == 1


def test_importing_the_package_imports_no_http_client_of_an_extra() -> None:
    code = "import d1_signer, sys; d1_signer.TokenFetcher; sys.exit('httpx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


KEPT = httpx.Limits()
NOT_KEPT = httpx.Limits(max_keepalive_connections=0)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        *((kind, KEPT) for kind in ("plain", "chunked", "interim", "late", "late-in-two")),
        *((kind, NOT_KEPT) for kind in ("second", "second-behind-chunks", "late")),
    ],
)
def test_whose_answer_a_call_gets_as_the_docs_say(
    tmp_path: Path, kind: str, limits: httpx.Limits
) -> None:
    server = Server()
    with (
        place_of(server, tmp_path, tls=True) as (url, context),
        httpx.Client(verify=context, trust_env=False, timeout=20, limits=limits) as client,
    ):
        for number in range(6):
            server.settled.clear()
            asked = f"{number:09}"
            got = client.get(f"{url}/{kind if number % 2 == 0 else 'plain'}_{asked}")
            assert got.json()["access_token"] == asked
            assert server.settled.wait(20)

# SPDX-License-Identifier: Apache-2.0
"""A proxy on the way: its password, what it refuses, and how seldom that is asked for again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from d1_signer import (
    ConfigurationError,
    D1SignerError,
    Limits,
    SecretSourceError,
    TokenFetcher,
    TokenUnavailable,
)
from d1_signer.sandbox import Sandbox
from d1_signer.secret import Secret
from d1_signer.transport import proxies
from d1_signer.transport.proxies import Proxy
from tests.conftest import LeakWatch
from tests.servers.connect_proxy import ConnectProxy
from tests.servers.fault_proxy import drop, listening
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import age, succeeded, together, until

PAIR = "d1-service:correct horse:battery"
WRONG = "d1-service:wrong-pass-word"


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    with ConnectProxy(credentials=PAIR).running() as proxy:
        yield proxy


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], str]:
    """Put credentials into the file; gives its source."""
    file = tmp_path / "proxy-credentials"

    def put(pair: str) -> str:
        file.touch(mode=0o600)
        file.write_text(f"{pair}\n")
        return f"file:{file}"

    return put


def refusal_of(call: Callable[[], object]) -> D1SignerError:
    with pytest.raises(D1SignerError) as failure:
        call()
    return failure.value


def target(sandbox: Sandbox) -> str:
    return sandbox.base_url.split("/")[2]


@pytest.mark.parametrize("kind", ["URL", "file", "env", "function"])
def test_credentials_open_the_tunnel(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    proxy: ConnectProxy,
    source: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("PROXY_PAIR", PAIR)
    if kind == "URL":
        options: dict[str, Any] = {
            "proxy": f"http://d1-service:correct%20horse:battery@127.0.0.1:{proxy.port}"
        }
    else:
        sources = {"file": source(PAIR), "env": "env:PROXY_PAIR", "function": lambda: PAIR}
        options = {"proxy": proxy.url, "proxy_credentials_source": sources[kind]}
    fetcher = make_fetcher(**options)
    assert fetcher.token().value
    with fetcher.session() as session:
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
        assert "127.0.0.1" in repr(session.proxies)  # and, as the leak watch sees, no password
    assert proxy.asked == [target(sandbox)] * 2
    assert proxy.sent == [PAIR] * 2
    assert proxy.refused == 0
    (request,) = sandbox.requests
    assert request.correlation_id


def test_refused_credentials_are_sent_once(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    proxy: ConnectProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However often and by however many: a directory locks an account after a few."""
    fetcher = make_fetcher(
        proxy=proxy.url, proxy_credentials_source=lambda: WRONG, retry_interval=0.01
    )
    results = together(50, fetcher.token)
    assert {(type(error), error.retryable) for error in results} == {(TokenUnavailable, False)}  # type: ignore[attr-defined]
    for _ in range(5):
        refusal_of(fetcher.token)
        age(fetcher, 60)
    error = refusal_of(fetcher.token)
    assert error.code == "token_unavailable"
    assert f"the proxy 127.0.0.1:{proxy.port} failed: it answers HTTP 407" in error.message
    assert "it refuses the credentials" in error.message
    assert "not sent again" in error.hint
    assert error.details["status"] == 407
    assert error.details["proxy"] == f"127.0.0.1:{proxy.port}"
    assert error.details["failed"] == "proxy"
    with fetcher.session() as session:
        session.auth = None
        for _ in range(5):
            with pytest.raises(requests.exceptions.ProxyError, match="HTTP 407"):
                session.get(f"{sandbox.banking_url}/ping")
    assert proxy.sent == [WRONG]
    assert "HTTP 407" in caplog.text


def test_a_crowd_of_sessions_sends_wrong_credentials_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox, proxy: ConnectProxy
) -> None:
    fetcher = make_fetcher(proxy=proxy.url, proxy_credentials_source=lambda: WRONG)

    def call() -> None:
        with fetcher.session() as session:
            session.auth = None
            with pytest.raises(requests.exceptions.ProxyError, match="HTTP 407"):
                session.get(f"{sandbox.banking_url}/ping")

    together(20, call)
    assert proxy.sent == [WRONG]


def test_a_corrected_file_is_taken_by_itself(
    make_fetcher: FetcherMaker, proxy: ConnectProxy, source: Callable[[str], str]
) -> None:
    fetcher = make_fetcher(
        proxy=proxy.url, proxy_credentials_source=source(WRONG), retry_interval=0.01
    )
    refusal_of(fetcher.token)
    source(PAIR)
    until(lambda: succeeded(fetcher), seconds=20)
    assert proxy.sent == [WRONG, PAIR]


def test_reload_asks_again(make_fetcher: FetcherMaker, proxy: ConnectProxy) -> None:
    """An account may be unlocked with its password unchanged."""
    fetcher = make_fetcher(
        proxy=proxy.url, proxy_credentials_source=lambda: PAIR, retry_interval=0.01
    )
    proxy.status = 407
    refusal_of(fetcher.token)
    proxy.status = None
    age(fetcher, 60)
    refusal_of(fetcher.token)
    fetcher.reload()
    age(fetcher, 60)
    assert fetcher.token().value
    assert proxy.sent == [PAIR] * 2


def test_credentials_that_had_worked_are_doubted_once(
    make_fetcher: FetcherMaker, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy whose directory is away for a moment refuses everybody."""
    fetcher = make_fetcher(
        proxy=proxy.url, proxy_credentials_source=lambda: PAIR, retry_interval=0.01
    )
    token = fetcher.token()

    def renewed() -> D1SignerError | None:
        age(fetcher, 895)
        fetcher._endpoint._session.close()  # each renewal needs a tunnel of its own
        try:
            fetcher.token()
        except D1SignerError as error:
            return error
        return None

    proxy.status = 407
    assert renewed()
    assert renewed()
    assert len(proxy.sent) == 2
    monkeypatch.setattr(proxies, "_REST", 0.0)
    memory = fetcher._proxy._memory  # type: ignore[union-attr]
    memory.refused = [(sent, told, 0.0) for sent, told, _ in memory.refused]  # the minute is over
    proxy.status = None
    assert renewed() is None
    assert fetcher.token().value != token.value
    proxy.status = 407
    for _ in range(5):
        assert renewed()
    # The second refusal in a row is the last one.
    assert len(proxy.sent) == 5


def test_a_proxy_that_asks_for_credentials_when_there_are_none(
    make_fetcher: FetcherMaker, proxy: ConnectProxy
) -> None:
    fetcher = make_fetcher(proxy=proxy.url)
    error = refusal_of(fetcher.token)
    assert not error.retryable
    assert "asks for credentials, and none are given" in error.message
    assert "--proxy-credentials-source" in error.hint
    proxy.headers = ("Proxy-Authenticate: Negotiate", "Proxy-Authenticate: NTLM")
    fetcher.reload()
    age(fetcher, 60)
    assert "not by Basic" in refusal_of(fetcher.token).message
    assert len(proxy.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 302])
def test_a_host_that_is_not_let_pass_is_not_asked_for_again_at_once(
    make_fetcher: FetcherMaker, sandbox: Sandbox, proxy: ConnectProxy, status: int
) -> None:
    fetcher = make_fetcher(
        proxy=proxy.url, proxy_credentials_source=lambda: PAIR, retry_interval=0.01
    )
    proxy.status = status
    for _ in range(3):
        refusal_of(fetcher.token)
        age(fetcher, 60)
    error = refusal_of(fetcher.token)
    assert (error.retryable, error.details["status"]) == (False, status)
    assert f"HTTP {status}, it does not let this host pass" in error.message
    assert target(sandbox) in error.hint
    assert len(proxy.asked) == 1
    proxy.status = None
    refusals = fetcher._proxy._memory.closed_to  # type: ignore[union-attr]
    refusals.update({host: (0.0, kept[1]) for host, kept in refusals.items()})  # the minute is over
    age(fetcher, 60)
    assert fetcher.token().value


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_proxy_that_does_not_reach_d1_is_asked_again(
    make_fetcher: FetcherMaker, proxy: ConnectProxy, status: int
) -> None:
    proxy.status = status
    fetcher = make_fetcher(proxy=proxy.url, proxy_credentials_source=lambda: PAIR)
    fetcher.prefetch()
    until(lambda: len(proxy.asked) >= 1)
    proxy.status = None
    assert fetcher.token(timeout=20).value
    proxy.status = status
    other = make_fetcher(
        proxy=proxy.url,
        proxy_credentials_source=lambda: PAIR,
        limits=Limits(total=2.0),
        retry_interval=60.0,
    )
    error = refusal_of(other.token)
    assert (error.retryable, error.details["status"]) == (True, status)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what it answers is not HTTP"),
        (b"", "what it answers is not HTTP"),  # it closes
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 110 + b"\r\n", "what it answers is not HTTP"),
        (None, "no tunnel within 0.3 seconds"),  # it keeps silent
    ],
)
def test_what_is_no_proxy_is_told_as_that(
    make_fetcher: FetcherMaker, proxy: ConnectProxy, answer: bytes | None, words: str
) -> None:
    proxy.answer, proxy.silent = answer, answer is None
    fetcher = make_fetcher(
        proxy=proxy.url,
        proxy_credentials_source=lambda: PAIR,
        limits=Limits(total=0.9, connect=0.3),
    )
    error = refusal_of(fetcher.token)
    assert isinstance(error, TokenUnavailable)
    assert error.retryable
    assert error.details["failed"] == "proxy"
    assert words in error.message


def test_a_proxy_that_closes_amid_its_answer(make_fetcher: FetcherMaker) -> None:
    with listening(drop) as port:
        fetcher = make_fetcher(proxy=f"http://127.0.0.1:{port}", limits=Limits(total=0.3))
        error = refusal_of(fetcher.token)
    assert error.details["failed"] == "proxy"


def test_no_caller_waits_for_a_proxy_while_a_token_lives(
    make_fetcher: FetcherMaker, proxy: ConnectProxy
) -> None:
    fetcher = make_fetcher(proxy=proxy.url, proxy_credentials_source=lambda: PAIR)
    token = fetcher.token()
    fetcher._endpoint._session.close()
    proxy.status = 407
    for _ in range(5):
        age(fetcher, 700 if proxy.refused == 0 and len(proxy.asked) == 1 else 20)
        assert fetcher.token() is token
        until(lambda: len(proxy.asked) == 2)
    assert len(proxy.sent) == 2


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"proxy_credentials_source": "env:PROXY_PAIR"}, ConfigurationError),
        ({"proxy": "http://127.0.0.1:1", "proxy_credentials_source": WRONG}, SecretSourceError),
        (
            {"proxy": "http://127.0.0.1:1", "proxy_credentials_source": "env:NOT_SET"},
            SecretSourceError,
        ),
        (
            {"proxy": "http://127.0.0.1:1", "proxy_credentials_source": lambda: "no-colon-here"},
            SecretSourceError,
        ),
        (
            {"proxy": "http://127.0.0.1:1", "proxy_credentials_source": lambda: f"{WRONG}\r\nX: y"},
            SecretSourceError,
        ),
        (
            {
                "proxy": f"http://{WRONG}@127.0.0.1:1",
                "proxy_credentials_source": "env:PROXY_PAIR",
            },
            ConfigurationError,
        ),
        ({"proxy": f"http://{WRONG}@127.0.0.1"}, ConfigurationError),
        ({"proxy": "http://a:b%0d%0ax@127.0.0.1:1"}, ConfigurationError),
    ],
)
def test_settings_that_cannot_be_used_show_no_secret(
    make_fetcher: FetcherMaker,
    leak_watch: LeakWatch,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[Exception],
) -> None:
    monkeypatch.setenv("PROXY_PAIR", PAIR)
    if options.get("proxy_credentials_source") != WRONG:  # the caller's own mistake
        leak_watch.note(WRONG.partition(":")[2])
    with pytest.raises(kind) as failure:
        make_fetcher(**options)
    assert "wrong-pass-word" not in str(failure.value)


def test_a_url_with_credentials_is_taken_in_a_secret_only() -> None:
    assert Proxy(Secret(f"http://{WRONG}@[::1]:3128")).address == "[::1]:3128"
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Proxy(f"http://{WRONG}@[::1]:3128")


def test_debugging_http_prints_no_credentials(
    make_fetcher: FetcherMaker,
    proxy: ConnectProxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("http.client.HTTPConnection.debuglevel", 1)
    logging.getLogger("urllib3").setLevel(logging.DEBUG)
    fetcher: TokenFetcher = make_fetcher(proxy=proxy.url, proxy_credentials_source=lambda: PAIR)
    try:
        fetcher.token()
    finally:
        logging.getLogger("urllib3").setLevel(logging.NOTSET)
    assert "Basic" not in "".join(capsys.readouterr())

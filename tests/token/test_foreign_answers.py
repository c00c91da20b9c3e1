# SPDX-License-Identifier: Apache-2.0
"""Answers that are no token: the status decides, the reason is told, nothing is kept of them."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from d1_signer import (
    AccessToken,
    D1SignerError,
    Limits,
    Signer,
    TokenFetcher,
    TokenRefusedError,
    TokenResponseError,
    TokenUnavailable,
)
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.secret import Secret
from d1_signer.token.endpoint import TokenEndpoint
from d1_signer.token.response import Grant
from tests.conftest import LeakWatch
from tests.servers.fault_proxy import listening
from tests.token.conftest import ISSUER, FetcherMaker, certificate_of, one_attempt

__all__ = ["one_attempt"]  # a fixture

GRANT = b'{"access_token":"a-token-of-d1","token_type":"Bearer","expires_in":900}'
Answer = Callable[[int], bytes]


def answered(status: str, body: bytes = b"", *lines: str, kind: str = "application/json") -> bytes:
    head = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {kind}", *lines)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Scripted:
    """A server without TLS that answers its n-th request as told."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        while True:
            data = connection.recv(65536)
            while data.count(b".") < 2 and data:
                data += connection.recv(65536)
            if not data:
                return
            self.requests.append(data)
            connection.sendall(self.answer(len(self.requests)))


FetcherOf = Callable[[Answer], tuple[TokenFetcher, Scripted]]


@pytest.fixture
def fetcher_of(make_fetcher: FetcherMaker) -> Iterator[FetcherOf]:
    with contextlib.ExitStack() as stack:

        def make(answer: Answer, **options: object) -> tuple[TokenFetcher, Scripted]:
            server = Scripted(answer)
            port = stack.enter_context(listening(server))
            settings = {"limits": Limits(total=20), "client_certificate": None, "ca_file": None}
            url = f"http://127.0.0.1:{port}/authz/v1"
            return make_fetcher(environment=url, **settings, **options), server

        yield make


def failure(fetcher: TokenFetcher) -> D1SignerError:
    with pytest.raises(D1SignerError) as caught:
        fetcher.token()
    return caught.value


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("head", [b"\x00\x01\x02\r\n\r\n", b"HTTP/2 200\r\n\r\n"])
def test_what_is_no_http_is_not_about_our_certificate(fetcher_of: FetcherOf, head: bytes) -> None:
    fetcher, _ = fetcher_of(lambda _: head)
    error = failure(fetcher)
    assert error.code == "token_unavailable"
    assert "the answer failed: what it answers is not HTTP" in error.message
    assert "certificate" not in str(error)
    assert "what stands before D1" in error.hint


@pytest.mark.parametrize("body", [b"[]", GRANT.replace(b"900", b"0"), b'{"access_token":"a"}'])
def test_who_is_asked_about_an_answer_that_cannot_be_used(
    fetcher_of: FetcherOf, body: bytes
) -> None:
    fetcher, _ = fetcher_of(lambda _: answered("200 OK", body))
    error = failure(fetcher)
    assert error.code == "token_response"
    # D1 itself may be what gives it.
    assert f"ask Thales with the correlation id {error.details['correlation_id']}" in error.hint


PAGE = b"<html>" + b"x" * 200_000
BODIES: dict[str, tuple[bytes, tuple[str, ...], str]] = {
    "compressed": (gzip.compress(PAGE), ("Content-Encoding: gzip",), "text/html"),
    "compressed twice": (b"x", ("Content-Encoding: identity, gzip",), "application/json"),
    "large": (PAGE, (), "text/html"),
    "large JSON": (b'{"x":"' + b"y" * 200_000 + b'"}', (), "application/json"),
    "two lengths": (b"{}", ("Content-Length: 9",), "application/json"),
    "length and chunks": (b"0\r\n\r\n", ("Transfer-Encoding: chunked",), "application/json"),
    "nothing": (b"", (), "application/json"),
}


@pytest.mark.parametrize("moment", ["Fri, 31 Dec 1999 23:59:59 GMT", "0"])
def test_a_pause_that_is_over_is_none(fetcher_of: FetcherOf, moment: str) -> None:
    fetcher, _ = fetcher_of(lambda _: answered("429 No", b"", f"Retry-After: {moment}"))
    assert failure(fetcher).details["retry_after"] == 0.0


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("status", [503, 429])
def test_the_status_decides_whatever_the_body_is(
    fetcher_of: FetcherOf, body: str, status: int
) -> None:
    content, lines, kind = BODIES[body]
    fetcher, _ = fetcher_of(
        lambda _: answered(f"{status} No", content, "Retry-After: 50", *lines, kind=kind)
    )
    error = failure(fetcher)
    assert error.code == "token_unavailable"
    assert error.retryable
    assert (error.details["status"], error.details["retry_after"]) == (status, 50.0)


@pytest.mark.parametrize("body", BODIES)
def test_a_refusal_is_one_whatever_its_body_is(fetcher_of: FetcherOf, body: str) -> None:
    content, lines, kind = BODIES[body]
    fetcher, server = fetcher_of(lambda _: answered("400 No", content, *lines, kind=kind))
    error = failure(fetcher)
    assert (error.code, error.retryable, error.details["status"]) == ("token_refused", False, 400)
    assert len(server.requests) == 1


@pytest.mark.parametrize("ending", ["cut", "hanging"])
def test_a_body_that_does_not_end_costs_only_the_reason(
    make_fetcher: FetcherMaker, ending: str
) -> None:
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 503 No\r\nRetry-After: 50\r\nContent-Length: 99\r\n\r\n{")
        if ending == "hanging":
            over.wait(20)

    with listening(serve) as port:
        fetcher = make_fetcher(
            environment=f"http://127.0.0.1:{port}/authz/v1",
            client_certificate=None,
            ca_file=None,
            limits=Limits(total=40, read=30),
        )
        started = time.monotonic()
        error = failure(fetcher)
        over.set()
    assert (error.details["status"], error.details["retry_after"]) == (503, 50.0)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("lines", [(), ("Content-Encoding:",), ("Content-Encoding: identity",)])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_token_is_read_from_what_says_no_encoding(
    fetcher_of: FetcherOf, lines: tuple[str, ...], mark: bytes
) -> None:
    fetcher, _ = fetcher_of(lambda _: answered("200 OK", mark + GRANT, *lines))
    assert fetcher.token().value == "a-token-of-d1"


@pytest.mark.parametrize(
    "answer",
    [
        answered("200 OK", GRANT, "Content-Length: 9"),
        answered("200 OK", GRANT, "Transfer-Encoding: chunked"),
        answered("200 OK", GRANT).replace(b"Length: ", b"Length: +"),
        answered("200 OK", GRANT).replace(b"Length: ", b"Length: 0x"),
        answered("200 OK", GRANT).replace(b"Length: ", b"Length: -"),
        answered("200 OK", GRANT, "Content-Encoding: gzip"),
        answered("200 OK", GRANT[:-1] + b',"scope":"a","scope":"b"}'),
    ],
)
def test_a_token_of_no_certain_length_is_none(fetcher_of: FetcherOf, answer: bytes) -> None:
    fetcher, server = fetcher_of(lambda _: answer)
    error = failure(fetcher)
    assert isinstance(error, TokenResponseError)
    assert len(server.requests) == 1
    assert "a-token-of-d1" not in str(error)


@pytest.mark.parametrize("status", ["408 Late", "421 Misdirected", "425 Early", "502 Bad"])
def test_what_passes_is_tried_again(fetcher_of: FetcherOf, status: str) -> None:
    fetcher, server = fetcher_of(
        lambda n: answered("200 OK", GRANT) if n > 1 else answered(status, b'{"message":"x"}')
    )
    assert fetcher.token().value == "a-token-of-d1"
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [408, 421, 425, 413, 431])
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_no_such_status_is_told_as_a_refusal(fetcher_of: FetcherOf, status: int, kind: str) -> None:
    body = PAGE[:60] if kind == "text/html" else b'{"message":"of the gateway"}'
    fetcher, _ = fetcher_of(lambda _: answered(f"{status} No", body, "Retry-After: 50", kind=kind))
    error = failure(fetcher)
    passes = status in {408, 421, 425}
    assert error.code == ("token_unavailable" if passes else "token_response")
    assert error.retryable == passes
    assert "refused the assertion" not in str(error)
    assert error.details["status"] == status


def test_a_token_request_keeps_and_sends_no_cookie(fetcher_of: FetcherOf) -> None:
    cookies = [f"Set-Cookie: c{n}={'x' * 200}; Path=/" for n in range(50)]

    def answer(number: int) -> bytes:
        status, body = ("503 No", b"") if number < 3 else ("200 OK", GRANT)
        return answered(status, body, *cookies)

    fetcher, server = fetcher_of(answer)
    assert fetcher.token().value
    assert len(server.requests) == 3
    assert not [request for request in server.requests if b"cookie" in request.lower()]
    assert len(fetcher._endpoint._session.cookies) == 0


def test_a_paused_machine_gets_another_token(fetcher_of: FetcherOf) -> None:
    def answer(number: int) -> bytes:
        if number > 1:
            return answered("200 OK", GRANT)
        threading.Event().wait(0.3)
        return answered("200 OK", GRANT.replace(b"900", b"0.2"))

    fetcher, server = fetcher_of(answer)
    assert fetcher.token().expires_at > time.time() + 800
    assert len(server.requests) == 2


def test_a_token_that_is_dead_on_arrival_twice_is_worth_a_try_later(fetcher_of: FetcherOf) -> None:
    fetcher, server = fetcher_of(lambda _: answered("200 OK", GRANT.replace(b"900", b"1e-9")))
    with pytest.raises(TokenUnavailable, match="before it arrived") as caught:
        fetcher._renewal.obtain(
            deadline=time.monotonic() + 20, stopped=threading.Event(), refused=None
        )
    assert caught.value.retryable
    assert "paused" in caught.value.hint
    assert len(server.requests) == 2


def test_a_pause_beyond_the_deadline_leaves_time_for_another_attempt(
    make_fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = make_fetcher()
    post, clock, paused = TokenEndpoint.post, time.monotonic, 0.0

    def monotonic() -> float:
        return clock() + paused

    def post_and_pause(self: TokenEndpoint, *args: Secret, **options: object) -> object:
        nonlocal paused
        reply = post(self, *args, **options)  # type: ignore[arg-type]
        if not paused:
            assert isinstance(reply.outcome, Grant)
            paused = 1000.0
            held = fetcher._renewal._clock
            fetcher._renewal._clock = lambda: held() + paused
        return reply

    monkeypatch.setattr(TokenEndpoint, "post", post_and_pause)
    monkeypatch.setattr(time, "monotonic", monotonic)
    held = fetcher._renewal.obtain(deadline=clock() + 30, stopped=threading.Event(), refused=None)
    assert held.token.value


@pytest.mark.parametrize("offset", [3600.0, 700.0, -3600.0])
def test_a_clock_that_is_far_off_is_told(
    make_fetcher: FetcherMaker, signer: Signer, offset: float
) -> None:
    with Sandbox(issuer_id=ISSUER, clock=lambda: time.time() + offset) as d1:
        d1.register_key(signer.kid, signer.public_key.jwk())
        fetcher = make_fetcher(
            environment=d1.base_url, ca_file=d1.ca_file, client_certificate=certificate_of(d1)
        )
        error = failure(fetcher)
    assert isinstance(error, TokenRefusedError)
    assert error.details["clock_offset"] == pytest.approx(offset, abs=5)
    told = re.search(r"clock is (\d+) seconds (behind|ahead of)", error.hint)
    assert told is not None
    assert int(told[1]) == pytest.approx(abs(offset), abs=5)
    assert told[2] == ("behind" if offset > 0 else "ahead of")


def test_a_clock_that_is_right_is_not_accused(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT)
    error = failure(make_fetcher())
    assert "clock" not in error.hint
    assert "clock_offset" not in error.details


@pytest.mark.parametrize("behind", [0.0, 4.0])
def test_the_longest_assertion_is_taken_by_a_clock_that_is_a_little_behind(
    make_fetcher: FetcherMaker, signer: Signer, behind: float
) -> None:
    with Sandbox(issuer_id=ISSUER, clock=lambda: time.time() - behind) as d1:
        d1.register_key(signer.kid, signer.public_key.jwk())
        fetcher = make_fetcher(
            environment=d1.base_url,
            ca_file=d1.ca_file,
            client_certificate=certificate_of(d1),
            assertion_lifetime=900,
        )
        assert fetcher.token().value
        assert d1.counters.token_requests == 1


def test_nothing_of_a_token_is_kept_after_close(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    fetcher = make_fetcher()
    token: AccessToken = fetcher.token()
    fetcher.invalidate(token)
    fetcher.close()
    assert sandbox.counters.token_requests == 1
    assert token.value not in repr(vars(fetcher))


class Stop(BaseException):
    """What a signal's handler raises."""


def test_an_interrupted_exchange_leaves_the_assertion_in_no_frame(
    make_fetcher: FetcherMaker,
    monkeypatch: pytest.MonkeyPatch,
    leak_watch: LeakWatch,
) -> None:
    endpoint = make_fetcher()._endpoint
    assertion = Secret("header.payload.a-signature-that-nobody-sees")

    def interrupted(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(http.client.HTTPConnection, "send", interrupted)
    with pytest.raises(LookupError) as own:
        raise LookupError

    def amid_another() -> None:
        try:
            raise own.value
        finally:
            endpoint.post(assertion, correlation_id="x", deadline=time.monotonic() + 20)

    with pytest.raises(Stop) as caught:
        amid_another()
    assert own.value.__traceback__ is not None  # what the caller was handling is the caller's
    leak_watch.errors.append(caught.value)


def test_http_clients_debuglevel_prints_nothing(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    fetcher = make_fetcher()
    with fetcher.session() as session:
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
    assert not capsys.readouterr().out

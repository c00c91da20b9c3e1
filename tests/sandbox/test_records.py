# SPDX-License-Identifier: Apache-2.0
"""What the sandbox tells afterwards, and what it never tells."""

from __future__ import annotations

import dataclasses
import logging
import socket
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from d1_signer.sandbox import Counters, Fault, Sandbox
from d1_signer.sandbox.recorder import MAX_EXCHANGES, MAX_REQUESTS, Recorder
from d1_signer.sandbox.records import Exchange, TokenRequest
from tests.sandbox.client import GRANT_TYPE, ISSUER, KID, Client

if TYPE_CHECKING:
    from joserfc.jwk import ECKey


def test_counters(client: Client, sandbox: Sandbox) -> None:
    assert sandbox.counters == Counters()
    token = client.token()
    client.post("not a JWT")
    client.session.get(sandbox.token_endpoint, timeout=10)
    client.ping(token)
    client.ping("unknown")
    expected = Counters(
        connections=1,
        token_requests=3,
        tokens_issued=1,
        tokens_refused=2,
        banking_requests=2,
        banking_refused=1,
    )
    assert sandbox.counters == expected
    answer = client.session.get(sandbox.base_url.replace("/authz/v1", "/counters"), timeout=10)
    assert answer.json() == dataclasses.asdict(expected)


def test_a_token_request_is_recorded_without_its_assertion(
    client: Client, sandbox: Sandbox
) -> None:
    sandbox.misbehave(Fault.STATUS_503, times=1)
    assertion = client.assertion(jti="one")
    client.post(assertion, headers={"x-correlation-id": "run-1"})
    client.post(client.assertion(jti="two"))
    first, second = sandbox.requests
    assert first.content_type == "application/x-www-form-urlencoded"
    assert first.correlation_id == "run-1"
    assert first.headers["host"] == urlsplit(sandbox.base_url).netloc
    assert first.grant_type == GRANT_TYPE
    assert first.header == {"alg": "ES256", "typ": "JWT", "kid": KID}
    assert (first.claims["iss"], first.claims["jti"]) == (ISSUER, "one")
    assert (first.fault, first.refusal, first.status) == (Fault.STATUS_503, "", 503)
    assert (second.fault, second.claims["jti"], second.status) == (None, "two", 200)
    assert assertion not in repr(first)
    assert assertion not in repr(dataclasses.asdict(first))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.status = 200  # type: ignore[misc]


def test_an_exchange_is_kept_as_it_was(client: Client, sandbox: Sandbox) -> None:
    assertion = client.assertion()
    answer = client.post(assertion)
    (exchange,) = sandbox.exchanges
    assert (exchange.method, exchange.path) == ("POST", "/authz/v1/oauth2/token")
    assert parse_qs(exchange.request_body.decode()) == {
        "grant_type": [GRANT_TYPE],
        "assertion": [assertion],
    }
    assert dict(exchange.request_headers)["Accept"] == "*/*"
    assert (exchange.status, exchange.response_body) == (200, answer.content)
    assert dict(exchange.response_headers)["Content-Type"] == "application/json"
    assert assertion not in repr(exchange)
    assert answer.json()["access_token"] not in repr(exchange)


def test_the_records_are_bounded() -> None:
    recorder = Recorder()
    request = TokenRequest(
        at=0.0,
        content_type="",
        correlation_id=None,
        headers={},
        grant_type=None,
        header={},
        claims={},
        refusal="",
        fault=None,
        status=None,
    )
    exchange = Exchange(
        method="GET",
        path="/",
        request_headers=(),
        request_body=b"",
        status=200,
        response_headers=(),
        response_body=b"",
    )
    numbers = [recorder.arrived(request) for _ in range(MAX_REQUESTS + 5)]
    for _ in range(MAX_EXCHANGES + 5):
        recorder.exchanged(exchange)
    recorder.answered(numbers[0], 200)  # forgotten by now
    recorder.answered(numbers[-1], 204)
    assert len(recorder.requests) == MAX_REQUESTS
    assert recorder.requests[-1].status == 204
    assert len(recorder.exchanges) == MAX_EXCHANGES


def test_a_long_body_is_kept_in_part(client: Client, sandbox: Sandbox) -> None:
    client.ping(client.token(), data=b"x" * 200_000)
    assert sandbox.exchanges[-1].request_body == b"x" * 65_536


def test_the_log_shows_no_secret(
    client: Client, sandbox: Sandbox, key: ECKey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "urllib3")  # the client's own log shows the URL it calls
    caplog.set_level(logging.DEBUG)
    assertions = [client.assertion(), client.assertion(sub="someone"), client.assertion()]
    token = client.post(assertions[0]).json()["access_token"]
    client.post(assertions[1])
    sandbox.misbehave(Fault.HOSTILE_ECHO, times=1)
    client.post(assertions[2])
    client.ping(token)
    client.session.get(f"{sandbox.banking_url}/ping/{token}", timeout=10)
    assert "token endpoint: POST answered 200" in caplog.messages
    for secret in (*assertions, token, str(key.as_dict(private=True)["d"])):
        assert secret not in caplog.text


def test_an_unreadable_request_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "d1_signer.sandbox")
    secret = "Bearer-of-a-secret"
    with Sandbox(issuer_id=ISSUER, tls=False) as sandbox:
        address = ("127.0.0.1", urlsplit(sandbox.base_url).port or 0)
        for text in (f"{secret}\r\n\r\n", f"GET / HTTP/1.1\r\nHost: x\r\n{secret} \x00: 1\r\n\r\n"):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(text.encode())
                assert connection.recv(65536).startswith(b"HTTP/1.0 400")
    assert caplog.messages
    assert secret not in caplog.text

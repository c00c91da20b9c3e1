# SPDX-License-Identifier: Apache-2.0
"""Each fault as it is seen on the wire."""

from __future__ import annotations

import email.utils
import json
import math
import socket
import ssl
import time
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest
import requests

from d1_signer.errors import InvalidInputError
from d1_signer.sandbox import Fault
from d1_signer.sandbox.faults import FAULTS
from tests.sandbox.client import GRANT_TYPE

if TYPE_CHECKING:
    from d1_signer.sandbox import Sandbox
    from tests.sandbox.client import Client

# What stays the same whatever the assertion: status and body.
PLAIN: dict[Fault, tuple[int, str]] = {
    Fault.STATUS_401: (401, '{"error": "invalid_token"}'),
    Fault.STATUS_403: (403, '{"error": "access_denied"}'),
    Fault.STATUS_4XX: (418, '{"error": "unheard_of"}'),
    Fault.STATUS_429: (429, '{"error": "temporarily_unavailable"}'),
    Fault.STATUS_500: (500, '{"error": "server_error"}'),
    Fault.STATUS_503: (503, '{"error": "temporarily_unavailable"}'),
    Fault.HTML_400: (400, "<html><body><h1>400 Bad Request</h1></body></html>"),
    Fault.EMPTY_400: (400, ""),
    Fault.EMPTY_BODY: (200, ""),
    Fault.REDIRECT: (307, ""),
}

# Members of a token answer that differ from a good one; None where the member is missing.
ALTERED: dict[Fault, tuple[str, Any]] = {
    Fault.WRONG_TOKEN_TYPE: ("token_type", "mac"),
    Fault.EXPIRES_IN_MISSING: ("expires_in", None),
    Fault.EXPIRES_IN_ZERO: ("expires_in", 0),
    Fault.EXPIRES_IN_SHORT: ("expires_in", 1),
    Fault.EXPIRES_IN_STRING: ("expires_in", "900"),
    Fault.EXPIRES_IN_NEGATIVE: ("expires_in", -1),
    Fault.EXPIRES_IN_HUGE: ("expires_in", math.inf),
    Fault.ACCESS_TOKEN_MISSING: ("access_token", None),
    Fault.ACCESS_TOKEN_NOT_STRING: ("access_token", ["not", "a", "string"]),
}

WITH_OWN_TEST = {
    Fault.DELAY,
    Fault.INVALID_GRANT,
    Fault.HOSTILE_ECHO,
    Fault.HUGE_BODY,
    Fault.SLOW_BODY,
    Fault.GZIP_BOMB,
    Fault.BROKEN_JSON,
    Fault.JSON_ARRAY,
    Fault.WRONG_CONTENT_TYPE,
    Fault.EXPIRES_IN_NAN,
    Fault.ACCESS_TOKEN_ILLEGAL,
    Fault.CLOSE_BEFORE_ANSWER,
    Fault.CLOSE_MID_BODY,
}


def test_every_fault_is_made_and_tested() -> None:
    assert set(FAULTS) == set(Fault)
    assert PLAIN.keys() | ALTERED.keys() | WITH_OWN_TEST == set(Fault)


@pytest.mark.parametrize("fault", PLAIN)
def test_faults_that_look_at_nothing(client: Client, sandbox: Sandbox, fault: Fault) -> None:
    sandbox.misbehave(fault, times=1)
    answer = client.post()
    assert (answer.status_code, answer.text) == PLAIN[fault]
    assert sandbox.requests[-1].fault is fault
    assert sandbox.requests[-1].status == answer.status_code
    assert sandbox.counters.tokens_issued == 0
    assert client.post().status_code == 200


@pytest.mark.parametrize("fault", ALTERED)
def test_faults_that_alter_one_member(client: Client, sandbox: Sandbox, fault: Fault) -> None:
    good = client.post().json()
    sandbox.misbehave(fault, times=1)
    answer = client.post()
    document = answer.json()
    name, value = ALTERED[fault]
    assert answer.status_code == 200
    assert document.get(name) == value
    assert (name in document) is (value is not None)
    assert set(document) | {name} == set(good)
    sandbox.misbehave(fault, times=1)
    assert client.post(client.assertion(sub="someone")).json()["error"] == "invalid_grant"


def test_expires_in_nan(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.EXPIRES_IN_NAN)
    assert math.isnan(client.post().json()["expires_in"])


def test_expires_in_huge_is_any_text(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.EXPIRES_IN_HUGE, value="1" + "0" * 5000)
    assert b'"expires_in": 1000000000' in client.post().content


def test_access_token_illegal(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.ACCESS_TOKEN_ILLEGAL)
    assert client.post().json()["access_token"].endswith("\r\nX-Injected: 1")
    sandbox.misbehave(Fault.ACCESS_TOKEN_ILLEGAL, characters="\x00é")
    assert client.post().json()["access_token"].endswith("\x00é")


def test_unauthorized_has_the_challenge(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_401)
    assert client.post().headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def test_delay(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=0.2)
    before = time.monotonic()
    assert client.post().status_code == 200
    assert time.monotonic() - before >= 0.2
    assert client.post(client.assertion(sub="someone")).status_code == 400


def test_a_client_that_does_not_wait_is_on_record(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, times=1, seconds=60)
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.post(timeout=0.2)
    assert sandbox.requests[-1].status is None
    assert sandbox.counters.tokens_issued == 0
    assert client.post().status_code == 200


@pytest.mark.parametrize("fault", [Fault.STATUS_429, Fault.STATUS_503])
def test_retry_after(client: Client, sandbox: Sandbox, fault: Fault) -> None:
    sandbox.misbehave(fault)
    assert client.post().headers["Retry-After"] == "1"
    sandbox.misbehave(fault, retry_after="soon")
    assert client.post().headers["Retry-After"] == "soon"
    sandbox.misbehave(fault, retry_after=None)
    assert "Retry-After" not in client.post().headers
    sandbox.misbehave(fault, retry_after=120, as_date=True)
    assert _seconds_ahead(client.post().headers["Retry-After"]) == pytest.approx(120, abs=30)


def test_invalid_grant_and_a_clock_that_is_off(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT, date_offset=-7200)
    answer = client.post()
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert _seconds_ahead(answer.headers["Date"]) == pytest.approx(-7200, abs=30)


def _seconds_ahead(text: str) -> float:
    return email.utils.parsedate_to_datetime(text).timestamp() - time.time()


def test_hostile_echo(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HOSTILE_ECHO)
    assertion = client.assertion()
    answer = client.post(assertion)
    assert answer.status_code == 400
    assert answer.reason == assertion
    assert answer.headers["X-Echo"] == assertion
    assert answer.json()["error"] == assertion
    assert assertion in answer.json()["error_description"]


def test_redirect(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.REDIRECT, location="https://127.0.0.1:1/x", status=302)
    answer = client.post()
    assert (answer.status_code, answer.headers["Location"]) == (302, "https://127.0.0.1:1/x")


def test_huge_body_is_a_good_answer_for_who_reads_it_all(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HUGE_BODY, size=300_000)
    answer = client.post()
    assert "Content-Length" not in answer.headers
    assert len(answer.content) == 300_000
    assert client.ping(answer.json()["access_token"]).status_code == 200


def test_huge_body_may_be_left_unread(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HUGE_BODY, times=1)
    with client.post(stream=True) as answer:
        assert answer.raw.read(1000) == b" " * 1000
        assert sandbox.requests[-1].status == 200
    assert client.post().status_code == 200


def test_slow_body(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.SLOW_BODY, times=1, seconds=0.001)
    before = time.monotonic()
    answer = client.post()
    assert client.ping(answer.json()["access_token"]).status_code == 200
    assert time.monotonic() - before >= 0.001 * len(answer.content)
    sandbox.misbehave(Fault.SLOW_BODY, times=1, seconds=60)
    with client.post(stream=True) as answer:
        assert answer.raw.read(1) == b"{"


def test_gzip_bomb(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.GZIP_BOMB)
    with client.post(stream=True) as answer:
        packed = answer.raw.read(decode_content=False)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(packed) < 100_000
    opened = zlib.decompress(packed, wbits=31)
    assert len(opened) == 64 << 20
    assert json.loads(opened)["token_type"] == "Bearer"


def test_broken_json(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.BROKEN_JSON)
    answer = client.post()
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    with pytest.raises(requests.exceptions.JSONDecodeError):
        answer.json()


def test_json_array(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.JSON_ARRAY)
    assert client.post().json()[0]["token_type"] == "Bearer"


def test_wrong_content_type(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.WRONG_CONTENT_TYPE)
    answer = client.post()
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.json()["token_type"] == "Bearer"


def test_close_before_answer(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.CLOSE_BEFORE_ANSWER, times=1)
    assert _raw_answer(client) == b""
    assert sandbox.requests[-1].status is None
    sandbox.misbehave(Fault.CLOSE_BEFORE_ANSWER, times=1)
    with pytest.raises(requests.exceptions.ConnectionError):
        client.post()
    assert client.post().status_code == 200


def test_close_mid_body(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.CLOSE_MID_BODY)
    head, _, body = _raw_answer(client).partition(b"\r\n\r\n")
    announced = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    assert head.startswith(b"HTTP/1.1 200")
    assert 0 < len(body) < announced
    assert sandbox.requests[-1].status == 200


def _raw_answer(client: Client) -> bytes:
    """All bytes of the answer to a good request, up to the end of the connection."""
    sandbox = client.sandbox
    context = ssl.create_default_context(cafile=str(sandbox.ca_file))
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    form = urlencode({"grant_type": GRANT_TYPE, "assertion": client.assertion()}).encode()
    url = urlsplit(sandbox.token_endpoint)
    head = (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(form)}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    )
    received = bytearray()
    with (
        socket.create_connection((url.hostname or "", url.port or 0), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=url.hostname) as connection,
    ):
        connection.sendall(head.encode() + form)
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except (ssl.SSLEOFError, ConnectionResetError):
            pass  # cut off without a farewell, as it is meant
    return bytes(received)


def test_times(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.STATUS_500, times=2)
    assert [client.post().status_code for _ in range(3)] == [500, 500, 200]
    sandbox.misbehave(Fault.STATUS_500)
    assert [client.post().status_code for _ in range(3)] == [500, 500, 500]
    sandbox.misbehave(None)
    assert client.post().status_code == 200


def test_a_value_is_as_good_as_a_fault(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave("html-400")
    assert client.post().headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    ("fault", "options", "text"),
    [
        ("no-such", {}, "There is no fault 'no-such'"),
        (Fault.DELAY, {"minutes": 1}, "no parameter 'minutes'"),
        (Fault.STATUS_500, {"seconds": 1}, "no parameter 'seconds'"),
        (Fault.DELAY, {"seconds": "1"}, "wrong type"),
        (Fault.HUGE_BODY, {"size": 1.5}, "wrong type"),
        (Fault.STATUS_503, {"retry_after": b"1"}, "wrong type"),
        (Fault.DELAY, {"times": 0}, "`times`"),
        (Fault.DELAY, {"times": True}, "`times`"),
    ],
)
def test_orders_that_cannot_be_obeyed_are_refused(
    sandbox: Sandbox, fault: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=text):
        sandbox.misbehave(fault, **options)

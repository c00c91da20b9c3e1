# SPDX-License-Identifier: Apache-2.0
"""Answers of a token endpoint, from correct to malicious."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from email.utils import format_datetime
from wsgiref.handlers import format_date_time

import pytest
from hypothesis import example, given, strategies as st

from d1_signer import jose
from d1_signer.errors import TokenError, TokenRefusedError, TokenResponseError, TokenUnavailable
from d1_signer.secret import Secret
from d1_signer.token import jwt
from d1_signer.token.response import (
    TRANSIENT,
    Grant,
    error_from,
    read_grant as read_grant_of,
    seconds_until,
)

GOOD: dict[str, object] = {
    "access_token": "eyJ.a.b-_~+/=",
    "expires_in": 900,
    "scope": "d1-api:account:full d1-api:consumer:read",
    "token_type": "Bearer",
}
# In its real form, so that pieces of it look as they would.
SENT = jose.compact(
    jwt.signing_input("bank-2026", {"iss": "bank", "sub": "bank", "exp": 1, "jti": "x" * 22}),
    bytes(range(100, 164)),
)
HEADER, PAYLOAD, SIGNATURE = SENT.split(".")
# A server's status line may be anything that http.client lets through.
statuses = st.one_of(
    st.sampled_from([201, 204, 302, 400, 401, 403, 429, 500, 503]), st.integers(100, 999)
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
members = st.dictionaries(
    st.sampled_from([*GOOD, "error", "error_description", "error_uri", "x"]), values
)
bodies = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    members.map(lambda value: json.dumps({**GOOD, **value}).encode()),
    members.map(lambda value: json.dumps(value).encode()),
)


def body(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def read_grant(data: bytes) -> Grant:
    return read_grant_of(data, assertion=Secret(SENT))


def error(said: object, status: int = 400) -> TokenError:
    return error_from(status, json.dumps(said).encode(), assertion=Secret(SENT), retry_after=None)


# -- 200 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Bearer", "bearer", "BEARER"])
def test_good_answer(kind: str) -> None:
    grant = read_grant(body(token_type=kind, unknown={"x": [1]}))
    assert (grant.value, grant.expires_in, grant.scope) == (
        GOOD["access_token"],
        900.0,
        GOOD["scope"],
    )
    assert str(GOOD["access_token"]) not in repr(grant)
    without_scope = {name: value for name, value in GOOD.items() if name != "scope"}
    assert read_grant(json.dumps(without_scope).encode()).scope == ""
    assert read_grant(body(scope=None)).scope == ""
    assert read_grant(body(expires_in=0.5)).expires_in == 0.5
    assert read_grant(b"\xef\xbb\xbf" + body()).value == GOOD["access_token"]
    assert read_grant(body(error=None)).value == read_grant(body(error="")).value


@pytest.mark.parametrize("name", ["access_token", "expires_in", "token_type"])
def test_members_that_must_be_there(name: str) -> None:
    answer = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(TokenResponseError, match=name):
        read_grant(json.dumps(answer).encode())
    with pytest.raises(TokenResponseError, match=name):
        read_grant(body(**{name: None}))


WRONG: dict[str, list[object]] = {
    "access_token": ["", " ", "a b", "a\n", "é", "a\0", 7, ["a"], "x" * 16385],
    "token_type": ["", "mac", "Bearer ", "DPoP", 1, ["Bearer"], "N_A"],
    "expires_in": [0, -1, -0.0, "900", True, [900], {}, -(10**400)],
    "scope": [7, False, ["a"], "a\nb", "é", "x" * 4097],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, all_ in WRONG.items() for value in all_]
)
def test_wrong_members(name: str, value: object) -> None:
    with pytest.raises(TokenResponseError, match=name):
        read_grant(body(**{name: value}))


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "9" * 4000])
def test_huge_expires_in_is_taken_as_for_ever(number: str) -> None:
    text = body().decode().replace("900", number)
    assert read_grant(text.encode()).expires_in == math.inf


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1" * 5000, "-1e999", "0x10", "1."]
)
def test_what_is_no_number_is_refused(number: str) -> None:
    text = body().decode().replace("900", number)
    with pytest.raises(TokenResponseError):
        read_grant(text.encode())


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b" ", b"null", b"[]", b"7", b'"x"', b"{", b"{}x", b"<html>", b"\xff\xfe{\0}\0"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf" * 2 + body(),
        body() + b"\0",
        body().replace(b"}", b', "a_member_that_nobody_reads": NaN}'),
        body().decode().encode("utf-16"),
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(TokenResponseError) as caught:
        read_grant(data)
    assert caught.value.__context__ is None  # a JSONDecodeError would carry the whole body


@given(bodies)
def test_any_body_gives_a_grant_or_our_error(data: bytes) -> None:
    try:
        grant = read_grant(data)
    except (TokenResponseError, TokenRefusedError) as refused:
        refused.fresh()  # what a caller gets: without the traceback, whose frames hold the token
    else:
        assert grant.expires_in > 0
        assert grant.value.isascii()
        assert grant.value.isprintable()


@pytest.mark.parametrize("name", ["access_token", "expires_in", "token_type", "scope", "error"])
def test_a_member_that_is_there_twice_is_refused(name: str) -> None:
    said = body(error="")[:-1]
    for second in (b'"x"', b"900", b"null", json.dumps(GOOD.get(name)).encode()):
        with pytest.raises(TokenResponseError, match=f"{name} is there twice"):
            read_grant(said + b',"%s":%s}' % (name.encode(), second))
    escaped = name.replace(name[0], f"\\u{ord(name[0]):04x}", 1).encode()
    with pytest.raises(TokenResponseError, match="twice"):
        read_grant(said + b',"%s":1}' % escaped)


def test_what_nobody_reads_may_be_there_twice() -> None:
    said = body(x={"scope": 1})[:-1] + b',"x":{"scope":1,"scope":2},"y":0,"y":1}'
    assert read_grant(said).scope == GOOD["scope"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"error": "invalid_grant", "error_description": "unknown kid"}, "unknown kid"),
        ({**GOOD, "error": "server_error"}, "server_error"),
        ({"error": {"code": 7, "message": "no such issuer"}}, "no such issuer"),
    ],
)
def test_200_with_an_error_is_a_refusal(said: object, told: str) -> None:
    with pytest.raises(TokenRefusedError, match=told) as caught:
        read_grant(json.dumps(said).encode())
    assert caught.value.status == 200
    assert caught.value.error == caught.value.details.get("error", "")


def test_an_assertion_that_comes_back_with_200_is_masked() -> None:
    with pytest.raises(TokenRefusedError) as caught:
        read_grant(json.dumps({"error": "x", "error_description": SENT}).encode())
    told = caught.value.fresh()  # what a caller gets: see above
    assert not leaked(f"{told} {told.details}", 8)


# -- errors -----------------------------------------------------------------------------------


@given(statuses, bodies, st.one_of(st.none(), st.floats(allow_nan=False)))
@example(400, b"[" * 70_000, None)
def test_any_answer_gives_our_error(status: int, data: bytes, retry_after: float | None) -> None:
    answer = error_from(status, data, assertion=Secret(SENT), retry_after=retry_after)
    assert answer.details["status"] == status
    assert answer.details.get("retry_after") == retry_after
    assert str(answer).isascii()
    assert str(answer).isprintable()
    assert len(str(answer)) < 1000
    if status in TRANSIENT or status >= 500:
        assert type(answer) is TokenUnavailable
        assert answer.retryable
    elif isinstance(answer, TokenRefusedError):
        assert 400 <= status < 500
        assert answer.status == status
        assert not answer.retryable
    else:
        assert type(answer) is TokenResponseError
        assert status not in {400, 401, 403}
        assert not answer.retryable


@pytest.mark.parametrize("status", [408, 421, 425, 429, 500, 502, 503, 504, 599])
def test_a_status_that_passes_is_no_refusal(status: int) -> None:
    answer = error({"error": "invalid_grant", "message": "too early"}, status)
    assert answer.code == "token_unavailable"
    assert "refused" not in answer.message
    assert "too early" in answer.message


@pytest.mark.parametrize("status", [406, 407, 411, 413, 414, 415, 417, 426, 428, 431])
def test_a_request_that_is_at_fault_is_no_refusal_of_the_assertion(status: int) -> None:
    answer = error({"message": "of the gateway"}, status)
    assert (answer.code, answer.retryable) == ("token_response", False)
    assert "refused" not in answer.message
    assert str(status) in answer.message
    assert "of the gateway" in answer.message
    assert ("json" in answer.hint) == (status in {406, 415})
    # An OAuth error is a judgement of the assertion, whatever the status.
    assert error({"error": "invalid_grant"}, status).code == "token_refused"


@pytest.mark.parametrize(
    "said",
    [
        {"message": "why not"},
        {"Message": "why not"},
        {"type": "about:blank", "title": "Bad", "status": 400, "detail": "why not"},
        {"title": "why not"},
        {"error": {"message": "why not", "status": "DENIED"}},
        {"error": "x", "error_description": "why not", "message": "else"},
    ],
)
def test_the_reason_is_told_wherever_it_stands(said: object) -> None:
    for status in (400, 403, 503):
        assert "why not" in error(said, status).message
    marked = b"\xef\xbb\xbf" + json.dumps(said).encode()
    told = error_from(400, marked, assertion=Secret(SENT), retry_after=None)
    assert "why not" in told.message


def test_a_reason_that_is_there_twice_is_not_told() -> None:
    twice = b'{"error":"invalid_grant","error":"invalid_client","message":"why not"}'
    told = error_from(400, twice, assertion=Secret(SENT), retry_after=None)
    assert isinstance(told, TokenRefusedError)
    assert told.error == ""
    assert "why not" in told.message


def test_oauth_error_is_told() -> None:
    answer = error({"error": "invalid_grant", "error_description": "unknown kid 'x'"})
    assert isinstance(answer, TokenRefusedError)
    assert answer.error == answer.details["error"] == "invalid_grant"
    assert "unknown kid" in answer.message
    assert "issuer id" in answer.hint
    assert "issuer id" in error({"error": "invalid_client"}).hint
    assert "client certificate" in error({"error": "x"}).hint


@pytest.mark.parametrize(
    "code", ["a b", "x" * 65, "", 7, None, ["invalid_grant"], "é", "a\nb", "<x>"]
)
def test_error_code_of_another_form_is_dropped(code: object) -> None:
    answer = error({"error": code, "error_description": "why"})
    assert isinstance(answer, TokenRefusedError)
    assert answer.error == ""
    assert "error" not in answer.details


def test_control_characters_do_not_reach_a_log() -> None:
    answer = error({"error_description": "a\r\nERROR forged\x1b[31m\u202e\u2028b"})
    assert answer.message.isprintable()
    assert answer.message.isascii()
    assert "forged" in answer.message


def leaked(shown: str, least: int) -> str:
    """The longest run of the assertion in a text, where it has at least so many characters."""
    runs = (
        SENT[start : start + size]
        for size in range(len(SENT), least - 1, -1)
        for start in range(len(SENT) - size + 1)
    )
    return next((run for run in runs if run in shown), "")


@pytest.mark.parametrize("member", ["error", "error_description"])
@pytest.mark.parametrize(
    "echo",
    [
        SENT,
        f"bad assertion {SENT} given",
        f"assertion={SENT}",
        f"[{SENT}]",
        f"'{SENT}',",
        f"assertion={SIGNATURE[:50]}",  # short enough to pass as a word of its own
        f"sig={SIGNATURE[50:]}.",
        f"/{SIGNATURE[:40]}/",
        f"{HEADER[:30]} {SIGNATURE}",
        SIGNATURE[:20],
        SIGNATURE[-12:],
        f"{SIGNATURE[:8]}x",
        "x" * 190 + SIGNATURE,
        "é" * 190 + SIGNATURE,
        SENT.replace(".", " "),
        "\n".join(SENT[i : i + 64] for i in range(0, len(SENT), 64)),
        "\u200b".join(SIGNATURE[i : i + 10] for i in range(0, len(SIGNATURE), 10)),
    ],
)
def test_echoed_assertion_is_masked(member: str, echo: str) -> None:
    for status in (400, 500, 302):
        answer = error({member: echo}, status)
        told = f"{answer} {answer.details} {getattr(answer, 'error', '')} {answer.args}"
        assert not leaked(told, 8)


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("separator", [" ", ", ", "\n", "...", ";", "é", "%20"[:1], "\x00"])
def test_assertion_in_small_pieces_is_masked(size: int, separator: str) -> None:
    echo = separator.join(SIGNATURE[i : i + size] for i in range(0, len(SIGNATURE), size))
    answer = error({"error": "invalid_grant", "error_description": f"no: {echo}"})
    together = "".join(character for character in str(answer) if character in SIGNATURE + "-_")
    assert not leaked(together, 16)
    assert "[masked]" in answer.message
    assert "invalid_grant" in answer.message


@given(st.integers(0, len(SENT)), st.integers(8, 200), st.text(max_size=10), st.text(max_size=10))
def test_any_piece_between_any_texts_is_masked(
    start: int, size: int, before: str, after: str
) -> None:
    answer = error({"error_description": before + SENT[start : start + size] + after})
    assert not leaked(answer.message, 8)


def test_honest_description_is_not_masked() -> None:
    text = "The assertion's signature could not be verified; kid=bank-2026 issuer=my-bank (D1-4711)"
    assert text in error({"error_description": text}).message.replace('"', "'")


# -- Retry-After and Date ---------------------------------------------------------------------

NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("007", 7),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("soon", None),
        ("\u0661\u0662", None),
        ("1e3", None),
        (format_date_time(NOW + 30), 30),
        (format_date_time(NOW - 30), -30),
        (datetime.fromtimestamp(NOW + 60, UTC).strftime("%A, %d-%b-%y %H:%M:%S GMT"), 60),
        (datetime.fromtimestamp(NOW + 60, UTC).strftime("%a %b %d %H:%M:%S %Y"), 60),
        (format_datetime(datetime.fromtimestamp(NOW + 5, UTC)), 5),
        ("Mon, 99 Jan 2027 00:00:00 GMT", None),
        ("Mon, 01 Jan 99999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2027 00:00:00 +9999999", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert seconds_until(header, now=NOW) == seconds


@given(st.integers(0, 2**40), st.integers(0, 2**31))
def test_seconds_stay_seconds(seconds: int, now: int) -> None:
    read = seconds_until(str(seconds), now=now)
    assert read is not None
    assert 0 <= read <= seconds
    assert read == seconds or read >= 10**8  # beyond, only that it is far away matters


@given(st.integers(86400, 2**32))
def test_any_http_date_is_read(moment: int) -> None:
    assert seconds_until(format_date_time(moment), now=NOW) == moment - NOW


@given(
    st.one_of(st.text(), st.from_regex(r"\A[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,6} .*"))
)
@example("Thu, 01 Jan 0001 00:00:00 +2359")
@example("1 Jan 10000 00:00:00 GMT")
@example("9" * 5000)
def test_any_header_is_seconds_or_none(header: str) -> None:
    read = seconds_until(header, now=NOW)
    assert read is None or math.isfinite(read)


def test_the_reason_of_another_keeps_one_full_stop() -> None:
    said = {"error": "invalid_grant", "error_description": "The assertion has expired."}
    told = error(said)
    assert told.message.endswith(": 'invalid_grant' 'The assertion has expired'.")
    assert "If all of that is right, ask Thales" in told.hint

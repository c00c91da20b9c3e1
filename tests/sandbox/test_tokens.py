# SPDX-License-Identifier: Apache-2.0
"""The token endpoint: what it issues tokens for, and what it refuses and why."""

from __future__ import annotations

import base64
import email.utils
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from joserfc import jws
from joserfc.jwk import ECKey

from d1_signer.errors import InvalidInputError, InvalidKeyError
from d1_signer.sandbox.assertions import Ledger
from tests.sandbox.client import GRANT_TYPE, KID, Client, Clock, public_jwk

if TYPE_CHECKING:
    from collections.abc import Callable

    from d1_signer.sandbox import Sandbox


def test_a_good_assertion_is_answered_by_a_bearer_token(client: Client) -> None:
    answer = client.post(headers={"x-correlation-id": "run_1-a"})
    document = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["x-correlation-id"] == "run_1-a"
    assert set(document) == {"access_token", "token_type", "expires_in", "scope"}
    assert document["token_type"] == "Bearer"
    assert document["expires_in"] == 900
    assert client.ping(document["access_token"]).status_code == 200


def test_a_json_body_does_as_well(client: Client) -> None:
    body = {"grant_type": GRANT_TYPE, "assertion": client.assertion()}
    assert client.post(data=None, json=body).status_code == 200


def test_an_assertion_made_by_pyjwt_is_accepted(client: Client) -> None:
    pem = client.key.as_pem(private=True)
    assertion = pyjwt.encode(client.claims(), pem, algorithm="ES256", headers={"kid": KID})
    assert client.post(assertion).status_code == 200


@pytest.mark.parametrize("missing", ["aud", "iat", "jti"])
def test_claims_that_d1_does_not_require_may_be_missing(client: Client, missing: str) -> None:
    assert client.post(client.assertion(**{missing: None})).status_code == 200


def test_the_audience_may_be_one_of_several(client: Client) -> None:
    audience = ["https://other.example", client.sandbox.token_endpoint]
    assert client.post(client.assertion(aud=audience)).status_code == 200


def test_expires_in_follows_the_lifetime(client: Client) -> None:
    client.sandbox.set_token_lifetime(42)
    assert client.post().json()["expires_in"] == 42
    client.sandbox.set_token_lifetime(1.5)
    assert client.post().json()["expires_in"] == 1.5
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError):
            client.sandbox.set_token_lifetime(bad)


def _now() -> int:
    return int(time.time())


REFUSED_CLAIMS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no iss": (lambda: {"iss": None}, "The iss is not a known issuer."),
    "other iss": (lambda: {"iss": "someone"}, "The iss is not a known issuer."),
    "no sub": (lambda: {"sub": None}, "The sub is not a known issuer."),
    "other sub": (lambda: {"sub": "someone"}, "The sub is not a known issuer."),
    "other aud": (lambda: {"aud": "https://x.example"}, "The aud is not the URL"),
    "list of others": (lambda: {"aud": ["https://x.example"]}, "The aud is not the URL"),
    "no exp": (lambda: {"exp": None}, "The exp is not an integer."),
    "exp as a string": (lambda: {"exp": str(_now() + 60)}, "The exp is not an integer."),
    "exp as a float": (lambda: {"exp": _now() + 60.5}, "The exp is not an integer."),
    "exp as a bool": (lambda: {"exp": True}, "The exp is not an integer."),
    "exp in the past": (lambda: {"exp": _now() - 1}, "The assertion has expired."),
    "exp too far": (lambda: {"exp": _now() + 903}, "The exp is more than 15 minutes ahead."),
    "iat in the future": (lambda: {"iat": _now() + 60}, "The iat lies in the future."),
    "nbf in the future": (lambda: {"nbf": _now() + 60}, "The nbf lies in the future."),
    "iat days ago": (lambda: {"iat": _now() - 90_000}, "The iat lies more than a day back."),
    "absurd iat": (lambda: {"iat": -(10**400)}, "The iat lies more than a day back."),
    "nbf days ago": (lambda: {"nbf": _now() - 90_000}, "The nbf lies more than a day back."),
    "iat after exp": (lambda: {"iat": _now() + 4, "exp": _now() + 3}, "The iat is not before the"),
    "nbf after exp": (lambda: {"nbf": _now() + 4, "exp": _now() + 3}, "The nbf is not before the"),
    "aud with no text": (lambda: {"aud": [None]}, "The aud is not the URL"),
    "iat as a string": (lambda: {"iat": "now"}, "The iat is not a number."),
    "jti as a number": (lambda: {"jti": 7}, "The jti is not a string."),
    "empty jti": (lambda: {"jti": ""}, "The jti is not a string."),
}


@pytest.mark.parametrize("case", REFUSED_CLAIMS)
def test_bad_claims_are_an_invalid_grant(client: Client, case: str) -> None:
    changes, reason = REFUSED_CLAIMS[case]
    assert_refused(client, client.assertion(**changes()), reason)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"kid": "unknown"}, "The kid of the assertion is unknown."),
        ({"kid": ""}, "The assertion names no kid."),
        ({"typ": "at+jwt"}, "The typ of the assertion is not JWT."),
        ({"jku": "https://x.example/keys"}, "The header of the assertion has other parameters."),
    ],
)
def test_a_bad_header_is_an_invalid_grant(
    client: Client, header: dict[str, str], reason: str
) -> None:
    assert_refused(client, client.assertion(header=header), reason)


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"none","alg":"ES256","typ":"JWT","kid":"%s"}',
        b'{"alg":"ES256","typ":"JWT","kid":"other","kid":"%s"}',
        b'{"alg":"ES256","typ":"at+jwt","typ":"JWT","kid":"%s"}',
        b'\xef\xbb\xbf{"alg":"ES256","typ":"JWT","kid":"%s"}',
        "utf-16",
    ],
)
def test_header_that_is_read_in_two_ways_is_refused(client: Client, header: bytes | str) -> None:
    """RFC 7515 section 4: the names are unique, and section 2: the text is UTF-8."""
    plain = b'{"alg":"ES256","typ":"JWT","kid":"%s"}' % KID.encode()
    raw = plain.decode().encode(header) if isinstance(header, str) else header % KID.encode()
    payload = client.assertion().split(".")[1]
    signed = f"{_base64url(raw)}.{payload}"
    key = load_pem_private_key(client.key.as_pem(private=True), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    signature = _base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
    assert_refused(client, f"{signed}.{signature}", "The header of the assertion is not a JSON")


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def test_another_algorithm_is_refused(client: Client, sandbox: Sandbox) -> None:
    other = ECKey.generate_key("P-384")
    assertion = client.assertion(header={"alg": "ES384"}, key=other)
    assert_refused(client, assertion, "The algorithm of the assertion is not ES256.")
    unsigned = pyjwt.encode(client.claims(), "", algorithm="none", headers={"kid": KID})
    assert_refused(client, unsigned + "AA", "The algorithm of the assertion is not ES256.")
    confused = pyjwt.encode(client.claims(), b"k" * 64, algorithm="HS256", headers={"kid": KID})
    assert_refused(client, confused, "The algorithm of the assertion is not ES256.")
    assert sandbox.counters.tokens_issued == 0


def test_a_signature_by_another_key_is_refused(client: Client) -> None:
    assertion = client.assertion(key=ECKey.generate_key("P-256"))
    assert_refused(client, assertion, "The signature of the assertion does not verify")


def test_tampering_is_refused(client: Client) -> None:
    header, _, signature = client.assertion().split(".")
    forged = base64.urlsafe_b64encode(json.dumps(client.claims(exp=_now() + 800)).encode())
    assertion = f"{header}.{forged.decode().rstrip('=')}.{signature}"
    assert_refused(client, assertion, "The signature of the assertion does not verify")


@pytest.mark.parametrize("length", [63, 65, 70])
def test_a_signature_of_another_length_is_refused(client: Client, length: int) -> None:
    head, _, signature = client.assertion().rpartition(".")
    raw = (base64.urlsafe_b64decode(signature + "==") + bytes(6))[:length]
    cut = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    assert_refused(client, f"{head}.{cut}", "The signature of the assertion does not verify")


@pytest.mark.parametrize("text", ["x", "a.b", "a.b.c.d", "....", "é.a.b", "{}"])
def test_what_is_no_compact_jwt_is_refused(client: Client, text: str) -> None:
    assert_refused(client, text, "The assertion is not a compact JWT.")


def test_padding_and_blanks_are_refused(client: Client) -> None:
    for altered in ("{}=", "{}\n", " {}"):
        assertion = altered.format(client.assertion())
        assert_refused(client, assertion, "The assertion is not a compact JWT.")


@pytest.mark.parametrize("head", ["a", "W10", "eyJhIjoxfQ", "MQ", "ImFsZyI"])
def test_an_unreadable_header_is_refused(client: Client, head: str) -> None:
    _, claims, signature = client.assertion().split(".")
    assert_refused(client, f"{head}.{claims}.{signature}", "The header of the assertion")


@pytest.mark.parametrize(
    "payload",
    [
        b"no json",
        b"[]",
        b'{"iss":"demo-issuer","iss":"demo-issuer"}',
        b'{"exp":NaN}',
        b"\xff{}",
        b"[" * 30_000,
    ],
)
def test_claims_that_are_no_json_object_are_refused(client: Client, payload: bytes) -> None:
    header = {"alg": "ES256", "typ": "JWT", "kid": KID}
    assertion = jws.serialize_compact(header, payload, client.key)
    assert_refused(client, assertion, "The claims of the assertion are not a JSON object.")


def test_a_replay_is_refused_until_the_assertion_expires(client: Client, clock: Clock) -> None:
    used = uuid.uuid4().hex
    assert client.post(client.assertion(jti=used)).status_code == 200
    assert_refused(client, client.assertion(jti=used), "The jti was used before.")
    clock.ahead = 301
    later = _now() + 301
    assert client.post(client.assertion(jti=used, iat=later, exp=later + 60)).status_code == 200


def test_the_ledger_forgets_what_has_expired() -> None:
    ledger = Ledger()
    for number in range(5000):
        ledger.add(str(number), expires_at=number + 10.0, now=float(number))
    assert len(ledger._expiries) <= 1024
    assert ledger.holds("4999", now=5000.0)
    assert not ledger.holds("4999", now=5009.0)
    assert not ledger.holds("unknown", now=0.0)


def test_a_refused_assertion_does_not_use_up_its_jti(client: Client) -> None:
    used = uuid.uuid4().hex
    assert client.post(client.assertion(jti=used, sub="someone")).status_code == 400
    assert client.post(client.assertion(jti=used)).status_code == 200


def assert_refused(client: Client, assertion: str, reason: str) -> None:
    answer = client.post(assertion)
    document = answer.json()
    assert answer.status_code == 400
    assert document["error"] == "invalid_grant"
    assert document["error_description"].startswith(reason)
    assert assertion not in answer.text
    assert client.sandbox.requests[-1].refusal == document["error_description"]


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({}, "invalid_request"),
        ({"grant_type": GRANT_TYPE}, "invalid_request"),
        ({"assertion": "a.b.c"}, "invalid_request"),
        ({"grant_type": "", "assertion": "a.b.c"}, "invalid_request"),
        ({"grant_type": GRANT_TYPE, "assertion": ""}, "invalid_request"),
        ({"grant_type": "client_credentials", "assertion": "a.b.c"}, "unsupported_grant_type"),
        ([("grant_type", GRANT_TYPE)] * 2 + [("assertion", "a.b.c")], "invalid_request"),
        ("%zz", "invalid_request"),
        (b"\xff\xfe", "invalid_request"),
    ],
)
def test_a_form_that_is_wrong_is_refused(client: Client, form: Any, error: str) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post(data=form, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"grant_type": 1, "assertion": "a.b.c"}',
        b'{"assertion":1,"assertion":2}',
    ],
)
def test_a_json_body_that_is_wrong_is_refused(client: Client, body: bytes) -> None:
    answer = client.post(data=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_another_content_type_is_refused(client: Client) -> None:
    answer = client.post(data=b"x", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


@pytest.mark.parametrize("value", ["a b", "a.b", "x" * 65, "", "é"])
def test_a_correlation_id_outside_the_pattern_is_refused(client: Client, value: str) -> None:
    answer = client.post(headers={"x-correlation-id": value.encode()})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert "x-correlation-id" not in answer.headers


def test_other_methods_and_paths_are_refused(client: Client, sandbox: Sandbox) -> None:
    session = client.session
    answer = session.get(sandbox.token_endpoint, timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    for path in ("", "/oauth2", "/oauth2/token/", "/oauth2/tokens"):
        answer = session.post(sandbox.base_url + path, timeout=10)
        assert (answer.status_code, answer.json()) == (404, {"error": "not_found"})


def test_a_body_of_more_than_a_mebibyte_is_refused(client: Client) -> None:
    answer = client.post(data={"grant_type": GRANT_TYPE, "assertion": "x" * 2_000_000})
    assert answer.status_code == 413
    assert client.post().status_code == 200


def test_two_keys_are_known_during_a_rotation(client: Client, sandbox: Sandbox) -> None:
    new = ECKey.generate_key("P-256")
    sandbox.register_key("bank-2027", public_jwk(new))
    assert client.post().status_code == 200
    assert client.post(client.assertion(header={"kid": "bank-2027"}, key=new)).status_code == 200
    sandbox.forget_key(KID)
    assert_refused(client, client.assertion(), "The kid of the assertion is unknown.")
    sandbox.forget_key(KID)


def test_only_public_p256_keys_are_registered(sandbox: Sandbox, key: ECKey) -> None:
    public = public_jwk(key)
    private = {name: str(value) for name, value in key.as_dict(private=True).items()}
    bad: list[dict[str, str]] = [
        private,
        public_jwk(ECKey.generate_key("P-384")),
        public | {"kty": "RSA"},
        public | {"crv": "secp256k1"},
        public | {"x": public["x"][:-1]},
        public | {"x": public["y"]},
        public | {"use": "enc"},
        public | {"alg": "ES384"},
        {"kty": "EC", "crv": "P-256", "x": public["x"]},
        {},
    ]
    for jwk in bad:
        with pytest.raises(InvalidKeyError) as caught:
            sandbox.register_key("new", jwk)
        assert private["d"] not in str(caught.value)
        if jwk is private:
            assert "PublicKey.jwk()" in caught.value.hint
            assert "d1-signer public-key --format jwk" in caught.value.hint
    wrong: list[tuple[Any, Any]] = [
        ("", public),
        (None, public),
        ("new", public | {"kid": "other"}),
        ("new", None),
        ("new", [("kty", "EC")]),
    ]
    for kid, key_like in wrong:
        with pytest.raises(InvalidInputError):
            sandbox.register_key(kid, key_like)
    with pytest.raises(InvalidInputError):
        sandbox.forget_key([])  # type: ignore[arg-type]


def test_the_clock_is_the_callers(client: Client, clock: Clock) -> None:
    clock.ahead = 3600.0
    answer = client.post()
    assert answer.json()["error_description"] == "The assertion has expired."
    assert_date(answer.headers["Date"], time.time() + 3600)
    assert client.sandbox.requests[-1].at == pytest.approx(time.time() + 3600, abs=30)


def assert_date(text: str, expected: float) -> None:
    assert email.utils.parsedate_to_datetime(text).timestamp() == pytest.approx(expected, abs=30)

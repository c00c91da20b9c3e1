# SPDX-License-Identifier: Apache-2.0
"""JWTs built by hand, read by joserfc and PyJWT."""

from __future__ import annotations

import json
import math

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, strategies as st
from joserfc import jws, jwt as joserfc_jwt
from joserfc.jwk import ECKey
from joserfc.util import urlsafe_b64decode

from d1_signer import jose
from d1_signer.es256 import PublicKey, raw_from_der
from d1_signer.events import SignEvent
from d1_signer.signing.signer import Signer
from d1_signer.token import jwt
from d1_signer.token.assertion import PURPOSE, sign_assertion
from d1_signer.token.d1 import AssertionProfile
from tests.signing.backends import KeyBackend

KEY = ec.derive_private_key(7, ec.SECP256R1())
printable = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60)
claims = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.one_of(
        st.integers(-(2**53), 2**53),
        st.booleans(),
        st.none(),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.lists(st.integers(0, 9)),
    ),
    max_size=6,
)


def signed(unsigned: bytes) -> str:
    return jose.compact(unsigned, raw_from_der(KEY.sign(unsigned, ec.ECDSA(SHA256()))))


@given(printable, claims)
def test_two_libraries_read_what_we_write(kid: str, claims: dict[str, object]) -> None:
    unsigned = jwt.signing_input(kid, claims)
    token = signed(unsigned)
    theirs = jws.deserialize_compact(token, ECKey.import_key(KEY), algorithms=["ES256"])
    assert theirs.protected == {"alg": "ES256", "kid": kid, "typ": "JWT"}
    assert json.loads(theirs.payload) == claims
    assert theirs.segments["header"] + b"." + theirs.segments["payload"] == unsigned
    complete = pyjwt.api_jws.decode_complete(token, KEY.public_key(), algorithms=["ES256"])
    assert complete["header"] == theirs.protected
    assert complete["payload"] == theirs.payload


@given(printable)
def test_header_is_exactly_three_members(kid: str) -> None:
    header = urlsafe_b64decode(jwt.protected_header(kid))
    shown = json.dumps(kid, ensure_ascii=False)
    assert header == f'{{"alg":"ES256","kid":{shown},"typ":"JWT"}}'.encode()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        jwt.signing_input("k", {"exp": number})


@pytest.mark.parametrize("issuer", ["bank-1", "Sparkasse Köln", "銀行", 'a"b\\c', "🏦"])
def test_assertion_is_new_each_time_and_verifies(issuer: str) -> None:
    events: list[object] = []
    signer = Signer(KeyBackend(KEY), kid="schlüssel-1", observers=[events.append])
    audience = "https://d1.example/oauth2/token"
    profile = AssertionProfile(issuer_id=issuer, audience=audience)
    tokens = [sign_assertion(signer, profile, clock_offset=0.5, timeout=5) for _ in range(2)]
    assert "ey" not in repr(tokens)
    keys = ECKey.import_key(KEY)
    read = [joserfc_jwt.decode(token.reveal(), keys, algorithms=["ES256"]) for token in tokens]
    for token in read:
        assert token.header["kid"] == "schlüssel-1"
        assert token.claims["iss"] == token.claims["sub"] == issuer
        assert set(token.claims) == {"iss", "sub", "aud", "exp", "iat", "jti"}
        joserfc_jwt.JWTClaimsRegistry(iss={"value": issuer}, aud={"value": audience}).validate(
            token.claims
        )
    assert read[0].claims["jti"] != read[1].claims["jti"]
    for event, token in zip(events, read, strict=True):
        assert isinstance(event, SignEvent)
        assert event.use is not None
        assert event.use.purpose == PURPOSE
        assert dict(event.use.references) == {"iss": issuer, "jti": token.claims["jti"]}


def test_public_key_of_the_signer_is_what_verifies() -> None:
    token = signed(jwt.signing_input("k", {"a": 1}))
    key = PublicKey(KEY.public_key())
    assert pyjwt.decode(token, key.pem(), algorithms=["ES256"]) == {"a": 1}

# SPDX-License-Identifier: Apache-2.0
"""Each decoder of foreign bytes: an error of ours, or what another library reads in them too.

`make test` tries some hundred cases of each, the same ones every time; `make fuzz` goes on until it
is stopped, with other ones.
"""

from __future__ import annotations

import base64
import json
import re
import socket
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)
from hypothesis import given, settings, strategies as st
from joserfc.jwk import ECKey

from d1_signer.backends.pkcs11.isolation import wire
from d1_signer.backends.pkcs11.public_keys import read_point
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.errors import (
    D1SignerError,
    InvalidKeyError,
    InvalidSignatureError,
    KeyUriError,
    TokenError,
    TokenResponseError,
)
from d1_signer.es256 import PublicKey, raw_from_der
from d1_signer.jose import b64url_decode
from d1_signer.sandbox.strict_json import read_object
from d1_signer.secret import Secret
from d1_signer.signing.key_uri import KeyUri, split_fragment, without_secrets
from d1_signer.token.response import error_from, read_grant
from d1_signer.token.stores import Sealer, SharedToken
from tests.fuzz.mutations import mutated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # a PIN in a URI

FUZZ = settings.get_profile("fuzz")
KEY = ec.derive_private_key(0xD1, ec.SECP256R1())
OTHER = ec.derive_private_key(0xD2, ec.SECP384R1())
_PIN = "pin-8461"


def _spki(key: ec.EllipticCurvePrivateKey, encoding: Encoding = Encoding.DER) -> bytes:
    return key.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)


def _point(form: PublicFormat) -> bytes:
    return KEY.public_key().public_bytes(Encoding.X962, form)


def _certificate() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fuzz")])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return (
        x509.CertificateBuilder(name, name, KEY.public_key(), 1, now, now + timedelta(1))
        .sign(KEY, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


@FUZZ
@given(mutated(utils.encode_dss_signature(2**255, 7), utils.encode_dss_signature(2**200, 2**254)))
def test_der_signature(der: bytes) -> None:
    try:
        raw = raw_from_der(der)
    except InvalidSignatureError:
        return
    r, s = (int.from_bytes(half, "big") for half in (raw[:32], raw[32:]))
    assert len(raw) == 64
    assert utils.decode_dss_signature(der) == (r, s)
    assert utils.encode_dss_signature(r, s) == der, "one value has one form"


@FUZZ
@given(mutated(_spki(KEY), _spki(OTHER)))
def test_public_key_in_der(der: bytes) -> None:
    try:
        key = PublicKey.from_der(der)
    except InvalidKeyError:
        return
    theirs = load_der_public_key(der)
    assert isinstance(theirs, ec.EllipticCurvePublicKey)
    assert isinstance(theirs.curve, ec.SECP256R1)
    assert load_der_public_key(key.der()) == theirs


@FUZZ
@given(mutated(_spki(KEY, Encoding.PEM), _spki(OTHER, Encoding.PEM)))
def test_public_key_in_pem(pem: bytes) -> None:
    try:
        key = PublicKey.from_pem(pem)
    except InvalidKeyError:
        return
    assert load_pem_public_key(pem) == load_der_public_key(key.der())


_POINTS = (_point(PublicFormat.UncompressedPoint), _point(PublicFormat.CompressedPoint))


@FUZZ
@given(mutated(*_POINTS))
def test_point(point: bytes) -> None:
    try:
        key = PublicKey.from_point(point)
    except InvalidKeyError:
        return
    theirs = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    assert load_der_public_key(key.der()) == theirs


@FUZZ
@given(mutated(*_POINTS, b"\x04\x41" + _POINTS[0], _spki(KEY), _certificate()))
def test_point_of_a_token(value: bytes) -> None:
    key = read_point(value)
    if key is not None:
        assert load_der_public_key(key.der()) is not None


@FUZZ
@given(mutated(json.dumps(PublicKey(KEY.public_key()).jwk()).encode()))
def test_jwk(text: bytes) -> None:
    try:
        jwk = json.loads(text)
    except (ValueError, RecursionError):
        return
    try:
        key = PublicKey.from_jwk(jwk)
    except InvalidKeyError:
        return
    theirs = ECKey.import_key({name: jwk[name] for name in ("kty", "crv", "x", "y")})
    assert theirs.as_pem(private=False) == _spki_of(key)


def _spki_of(key: PublicKey) -> bytes:
    return load_der_public_key(key.der()).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )


@FUZZ
@given(mutated(b"eyJhbGciOiJFUzI1NiJ9", b"_-8", b"AA"))
def test_base64url(text: bytes) -> None:
    try:
        data = b64url_decode(text)
    except ValueError:
        return
    assert base64.urlsafe_b64encode(data).rstrip(b"=") == text, "one value has one form"


_URIS = (
    f"pkcs11:token=bank;object=d1;id=%00%01?module-path=/m.so&pin-value={_PIN}",
    "pkcs11:slot-id=3;library-version=2.40;serial=00?module-name=x&pin-source=file:/p",
    f"hashivault://host/transit/d1?x=1&pin-value={_PIN}#kid",
    "file:/etc/d1/key.pem#kid",
)
_TEXTS = mutated(*(uri.encode() for uri in _URIS)).map(lambda raw: raw.decode("utf-8", "replace"))


@FUZZ
@given(_TEXTS)
def test_pkcs11_uri(uri: str) -> None:
    try:
        parsed = Pkcs11Uri.parse(split_fragment(uri)[0])
    except KeyUriError as error:
        _hides(_PIN, uri, error)
        return
    if parsed.pin_value is not None:
        assert parsed.pin_value.reveal() not in repr(parsed.pin_value)
        assert "pin_value=<Secret ****>" in repr(parsed)


@FUZZ
@given(_TEXTS)
def test_key_uri(uri: str) -> None:
    try:
        KeyUri.parse(split_fragment(uri)[0], query_names=frozenset({"x"}))
    except KeyUriError as error:
        _hides(_PIN, uri, error)


def _hides(secret: str, uri: str, error: D1SignerError) -> None:
    """Where its place is readable at all: after a mutation it may stand in another one."""
    assert secret not in f"{error.hint} {error.details}"
    if re.search(rf"[?&]pin-value={secret}([&#]|$)", uri):
        assert secret not in f"{error} {without_secrets(uri)}"


_ASSERTION = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJpIn0.c2lnbmF0dXJlLW9mLWQx"
_ANSWER = b'{"access_token":"t0ken-of-d1","token_type":"Bearer","expires_in":900,"scope":"a b"}'


@FUZZ
@given(mutated(_ANSWER, b"\xef\xbb\xbf" + _ANSWER))
def test_token_answer(body: bytes) -> None:
    try:
        grant = read_grant(body, assertion=Secret(_ASSERTION))
    except TokenError as error:
        assert not re.search("t0ken", f"{error} {error.hint} {error.details}")  # noqa: PT017
        return
    members = json.loads(body.decode("utf-8-sig"))
    assert members["access_token"] == grant.value
    assert members["token_type"].lower() == "bearer"


_REFUSAL = f'{{"error":"invalid_grant","error_description":"no: {_ASSERTION}","message":"m"}}'


@FUZZ
@given(st.integers(300, 599), mutated(_REFUSAL.encode(), b"<html>bad gateway</html>"))
def test_refusal(status: int, body: bytes) -> None:
    error = error_from(status, body, assertion=Secret(_ASSERTION), retry_after=None)
    assert isinstance(error, TokenError)
    assert _ASSERTION.rpartition(".")[2] not in f"{error} {error.details}"
    assert str(error).isprintable()


_SEALER = Sealer(Secret("00" * 32), issuer_id="i", base_url="https://d1.example")
_TOKEN = SharedToken(value="t0ken", scope="a", requested_at=1.0, expires_at=901.0)
_SEALED = _SEALER.seal(_TOKEN)


@FUZZ
@given(mutated(_SEALED))
def test_sealed_token(sealed: bytes) -> None:
    opened = _SEALER.open(sealed)
    if opened is not None:
        assert opened == _TOKEN


_FRAMES = [
    b"D" + (64).to_bytes(4, "big") + bytes(64),
    b"F" + (2).to_bytes(4, "big") + b"{}",
]


@FUZZ
@given(mutated(*_FRAMES))
def test_frame_of_a_child(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(data)
        try:
            _, body = wire.receive(ours)
        except wire.Gone:
            return
    assert body in data


@FUZZ
@given(mutated(wire.encoded_error(TokenResponseError("t", hint="h", details={"a": 1}), refused={})))
def test_error_of_a_child(body: bytes) -> None:
    try:
        error, _ = wire.decoded_error(body)
    except wire.Gone:
        return
    assert isinstance(error, D1SignerError)
    assert isinstance(error.message, str)
    assert isinstance(error.details, dict)


@FUZZ
@given(mutated(b'{"alg":"ES256","kid":"k","n":{"a":[1,2.5,null]}}'))
def test_json_of_the_sandbox(text: bytes) -> None:
    try:
        value = read_object(text)
    except ValueError:
        return
    assert value == json.loads(text)

# SPDX-License-Identifier: Apache-2.0
"""ES256 against `cryptography`, joserfc and jwcrypto, and the example of RFC 7515 appendix A.3."""

from __future__ import annotations

import hashlib
import subprocess
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils, x25519
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import example, given, strategies as st
from joserfc.jwk import ECKey
from jwcrypto.jwk import JWK

from d1_signer import es256
from d1_signer.errors import InvalidInputError, InvalidKeyError, InvalidSignatureError as Refused
from d1_signer.es256 import PublicKey, check_raw, der_from_raw, raw_from_der

N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
SPKI = PublicFormat.SubjectPublicKeyInfo


def _view(data: bytes) -> memoryview:
    return memoryview(data)


# Numbers of every length, the ones at the edges more often than chance gives them.
scalars = st.one_of(
    st.integers(1, N - 1),
    st.integers(0, 31).flatmap(lambda size: st.integers(1, 2 ** (8 * size + 8) - 1)),
    st.sampled_from([1, 0x7F, 0x80, 0xFF, 0x100, 2**255 - 1, 2**255, N - 2, N - 1]),
).filter(lambda value: 0 < value < N)
anything = st.one_of(
    st.none(),
    st.integers(),
    st.text(),
    st.binary().map(bytearray),
    st.binary().map(_view),
    st.lists(st.integers(0, 255)),
    st.dictionaries(st.text(), st.text()),
)


def raw_of(r: int, s: int) -> bytes:
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def tlv(tag: int, content: bytes) -> bytes:
    return bytes((tag, len(content))) + content


def refused(der: object) -> None:
    with pytest.raises(Refused):
        raw_from_der(der)  # type: ignore[arg-type]


@given(scalars, scalars)
@example(1, 1)
@example(N - 1, N - 1)
@example(0x80, 0x7F)
def test_both_ways_agree_with_cryptography(r: int, s: int) -> None:
    der = utils.encode_dss_signature(r, s)
    assert raw_from_der(der) == raw_of(r, s)
    assert der_from_raw(raw_of(r, s)) == der
    assert utils.decode_dss_signature(der_from_raw(raw_of(r, s))) == (r, s)


@pytest.mark.parametrize("r", [0, N, N + 1, 2**256 - 1, 2**256, -1, -N])
@pytest.mark.parametrize("swapped", [False, True])
def test_out_of_range_is_refused(r: int, swapped: bool) -> None:
    pair = (1, r) if swapped else (r, 1)
    size = 34
    integers = b"".join(_integer(value, size) for value in pair)
    refused(tlv(0x30, integers))
    if 0 <= r < 2**256:
        refused(utils.encode_dss_signature(*pair))
        for check in (der_from_raw, check_raw):
            with pytest.raises(Refused):
                check(raw_of(*pair))


def _integer(value: int, most: int) -> bytes:
    shortest = next(
        n for n in range(1, most + 1) if -(2 ** (8 * n - 1)) <= value < 2 ** (8 * n - 1)
    )
    return tlv(0x02, value.to_bytes(shortest, "big", signed=True))


R, S = 2**255 + 5, 2**250 + 7
GOOD = utils.encode_dss_signature(R, S)
RI, SI = _integer(R, 34), _integer(S, 34)


@pytest.mark.parametrize(
    "der",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x30", id="tag alone"),
        pytest.param(b"\x30\x00", id="empty sequence"),
        pytest.param(b"\x05\x00", id="null"),
        pytest.param(GOOD + b"\x00", id="trailing byte"),
        pytest.param(GOOD + GOOD[:0] + b"\x05\x00", id="trailing value"),
        pytest.param(GOOD[:-1], id="cut short"),
        pytest.param(tlv(0x30, RI + SI + b"\x05\x00"), id="third member"),
        pytest.param(tlv(0x30, RI), id="one integer"),
        pytest.param(tlv(0x30, RI + SI + _integer(1, 1)), id="three integers"),
        pytest.param(tlv(0x30, tlv(0x02, b"\x00" + RI[2:]) + SI), id="padded r"),
        pytest.param(tlv(0x30, RI + tlv(0x02, b"\x00" + SI[2:])), id="padded s"),
        pytest.param(tlv(0x30, tlv(0x02, RI[3:]) + SI), id="negative r (sign byte lost)"),
        pytest.param(tlv(0x30, tlv(0x02, b"\xff\xff") + SI), id="padded negative"),
        pytest.param(tlv(0x30, tlv(0x02, b"") + SI), id="integer without content"),
        pytest.param(b"\x30\x81" + GOOD[1:], id="long-form length of sequence"),
        pytest.param(b"\x30\x82\x00" + GOOD[1:], id="longer long-form length"),
        pytest.param(b"\x30\x84\x00\x00\x00" + GOOD[1:], id="longest long-form length"),
        pytest.param(tlv(0x30, b"\x02\x81" + RI[1:] + SI), id="long-form length of r"),
        pytest.param(tlv(0x30, RI + b"\x02\x81" + SI[1:]), id="long-form length of s"),
        pytest.param(b"\x30\x80" + RI + SI + b"\x00\x00", id="indefinite length"),
        pytest.param(b"\x30\x80" + RI + SI, id="indefinite length without end"),
        pytest.param(b"\x30\xff" + GOOD[2:], id="reserved length"),
        pytest.param(b"\x31" + GOOD[1:], id="set"),
        pytest.param(b"\x10" + GOOD[1:], id="sequence not constructed"),
        pytest.param(b"\xa0" + GOOD[1:], id="context tag"),
        pytest.param(b"\x3f\x10" + GOOD[1:], id="long-form tag"),
        pytest.param(tlv(0x30, b"\x03" + RI[1:] + SI), id="bit string for r"),
        pytest.param(tlv(0x30, b"\x22" + RI[1:] + SI), id="constructed integer"),
        pytest.param(tlv(0x30, b"\x0a" + RI[1:] + SI), id="enumerated for r"),
        pytest.param(tlv(0x30, b"\x82" + RI[1:] + SI), id="implicit tag for r"),
        pytest.param(tlv(0x30, GOOD), id="nested"),
        pytest.param(tlv(0x04, GOOD), id="inside an octet string"),
        pytest.param(tlv(0x03, b"\x00" + GOOD), id="inside a bit string"),
        pytest.param(raw_of(R, S), id="raw"),
        pytest.param(b64encode(GOOD), id="base64"),
        pytest.param(GOOD + bytes(100_000), id="huge"),
    ],
)
def test_anything_but_strict_der_is_refused(der: bytes) -> None:
    refused(der)


def test_the_pieces_above_are_right() -> None:
    # Otherwise the refusals above could be for another reason than their names say.
    assert tlv(0x30, RI + SI) == GOOD
    assert raw_from_der(GOOD) == raw_of(R, S)


@given(st.integers(0, 8 * len(GOOD) - 1))
def test_each_flipped_bit_is_refused_or_read_as_cryptography_reads_it(bit: int) -> None:
    _same_as_cryptography((int.from_bytes(GOOD, "big") ^ (1 << bit)).to_bytes(len(GOOD), "big"))


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_bytes_too(changes: list[tuple[int, int]]) -> None:
    mutated = bytearray(GOOD)
    for place, value in changes:
        mutated[place % len(GOOD)] = value
    _same_as_cryptography(bytes(mutated))


def _same_as_cryptography(der: bytes) -> None:
    try:
        expected = utils.decode_dss_signature(der)
    except ValueError:
        refused(der)
        return
    if all(0 < value < N for value in expected):
        assert raw_from_der(der) == raw_of(*expected)
    else:
        refused(der)


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=70).map(lambda body: tlv(0x30, body))))
def test_arbitrary_bytes_raise_one_error_only(data: bytes) -> None:
    for convert in (raw_from_der, der_from_raw):
        try:
            answer = convert(data)
        except Refused:
            continue
        assert (der_from_raw if convert is raw_from_der else raw_from_der)(answer) == data


@given(anything)
def test_other_types_are_refused(value: object) -> None:
    for function in (raw_from_der, der_from_raw, check_raw):
        with pytest.raises(Refused):
            function(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_raw_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(Refused):
        der_from_raw(b"\x01" * length)


# -- RFC 7515 appendix A.3 --------------------------------------------------------------------

A3_HEADER = "eyJhbGciOiJFUzI1NiJ9"
A3_PAYLOAD = (
    "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
)
A3_SIGNATURE = (
    "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
A3_JWK: dict[str, str | list[str]] = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


def test_rfc7515_example_verifies() -> None:
    message = f"{A3_HEADER}.{A3_PAYLOAD}".encode()
    signature = urlsafe_b64decode(A3_SIGNATURE + "==")
    key = PublicKey.from_jwk(A3_JWK)
    key.verify(signature, message)
    key.verify_digest(signature, hashlib.sha256(message).digest())
    key.cryptography_key().verify(der_from_raw(signature), message, ec.ECDSA(SHA256()))
    with pytest.raises(Refused):
        key.verify(signature, message + b".")
    with pytest.raises(Refused):
        key.verify(signature[32:] + signature[:32], message)


def test_rfc7515_signature_has_the_octets_of_the_rfc() -> None:
    signature = urlsafe_b64decode(A3_SIGNATURE + "==")
    assert list(signature[:8]) == [14, 209, 33, 83, 121, 99, 108, 72]
    assert list(signature[32:40]) == [197, 10, 7, 211, 140, 60, 112, 229]


def test_thumbprint_agrees_with_two_others() -> None:
    ours = PublicKey.from_jwk(A3_JWK).thumbprint()
    assert ours == ECKey.import_key(A3_JWK).thumbprint() == JWK(**A3_JWK).thumbprint()


# -- the public key ---------------------------------------------------------------------------


def test_every_form_gives_the_same_key(
    private_key: ec.EllipticCurvePrivateKey, public_key: PublicKey
) -> None:
    theirs = private_key.public_key()
    flat = theirs.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    short = theirs.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    pem = theirs.public_bytes(Encoding.PEM, SPKI)
    forms = [
        PublicKey.from_pem(pem),
        PublicKey.from_pem(pem.decode()),
        PublicKey.from_der(theirs.public_bytes(Encoding.DER, SPKI)),
        PublicKey.from_jwk(ECKey.import_key(private_key).as_dict(private=False)),
        PublicKey.from_jwk({**public_key.jwk(), "kid": "k", "use": "sig", "alg": "ES256"}),
        PublicKey.from_point(flat),
        PublicKey.from_point(short),
        PublicKey.from_point(tlv(0x04, flat)),
        PublicKey.from_point(tlv(0x04, short)),
        PublicKey(theirs),
    ]
    for form in forms:
        assert form == public_key
        assert hash(form) == hash(public_key)
        assert form.pem().encode() == pem
        assert form.der() == theirs.public_bytes(Encoding.DER, SPKI)
        assert form.jwk() == public_key.jwk()
    assert len(set(forms)) == 1
    assert len(public_key.der()) == 91


def test_different_keys_differ(public_key: PublicKey) -> None:
    other = PublicKey(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert other != public_key
    assert public_key != public_key.der()
    assert public_key != "key"
    assert public_key.thumbprint() in repr(public_key)
    assert "P-256" in repr(public_key)


def test_coordinates_with_leading_zeros_keep_their_length() -> None:
    # About one key in 128; looked for by multiplying the base point.
    scalar = next(
        n
        for n in range(1, 5000)
        if ec.derive_private_key(n, ec.SECP256R1()).public_key().public_numbers().x < 2**248
    )
    key = PublicKey(ec.derive_private_key(scalar, ec.SECP256R1()).public_key())
    assert len(key.jwk()["x"]) == 43
    assert key.jwk()["x"].startswith("A")
    assert key.thumbprint() == JWK(**key.jwk()).thumbprint()
    assert PublicKey.from_jwk(key.jwk()) == key


def test_a_bare_point_that_looks_wrapped_is_bare() -> None:
    # An OCTET STRING of 63 bytes begins as a point does whose x begins with 0x3F: one key in 256.
    keys = (ec.derive_private_key(n, ec.SECP256R1()).public_key() for n in range(1, 5000))
    theirs = next(key for key in keys if key.public_numbers().x >> 248 == 0x3F)
    flat = theirs.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert PublicKey.from_point(flat) == PublicKey(theirs)
    assert PublicKey.from_point(tlv(0x04, flat)) == PublicKey(theirs)


def invalid_point(public_key: PublicKey) -> bytes:
    return public_key.der()[-65:-1] + bytes((public_key.der()[-1] ^ 1,))


def test_points_that_are_none_are_refused(public_key: PublicKey) -> None:
    flat = public_key.der()[-65:]
    x = flat[1:33]
    short = bytes((2 + flat[-1] % 2,)) + x
    p384 = ec.generate_private_key(ec.SECP384R1()).public_key()
    off_curve_x = next(n.to_bytes(32, "big") for n in range(2, 100) if not _is_x_of_a_point(n))
    bad: list[object] = [
        b"",
        b"\x00",  # infinity
        bytes(65),
        b"\x04" + bytes(64),
        b"\x04" + P.to_bytes(32, "big") * 2,
        invalid_point(public_key),
        b"\x02" + off_curve_x,
        b"\x02" + P.to_bytes(32, "big"),
        b"\x05" + x,
        b"\x06" + flat[1:],
        b"\x07" + flat[1:],
        flat[:-1],
        flat + b"\x00",
        flat[1:],
        x,
        tlv(0x04, flat) + b"\x00",
        tlv(0x04, flat[:-1]),
        tlv(0x03, b"\x00" + flat),
        b"\x04\x81\x41" + flat,
        tlv(0x04, tlv(0x04, flat)),
        *(b"\x05\x41" + flat, b"\x04\x42" + flat, b"\x04\x40" + flat, b"\x00\x00" + flat),
        *(b"\x05\x21" + short, b"\x04\x22" + short, b"\x04\x20" + short, b"\x00\x00" + short),
        p384.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        "04" + "00" * 64,
        None,
        65,
        list(flat),
    ]
    for point in bad:
        with pytest.raises(InvalidKeyError):
            PublicKey.from_point(point)  # type: ignore[arg-type]


def _is_x_of_a_point(x: int) -> bool:
    b = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
    return pow(x**3 - 3 * x + b, (P - 1) // 2, P) == 1


def other_keys() -> dict[str, PublicKeyTypes]:
    return {
        "P-384": ec.generate_private_key(ec.SECP384R1()).public_key(),
        "P-521": ec.generate_private_key(ec.SECP521R1()).public_key(),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()).public_key(),
        "RSA": rsa.generate_private_key(65537, 2048).public_key(),
        "Ed25519": ed25519.Ed25519PrivateKey.generate().public_key(),
        "X25519": x25519.X25519PrivateKey.generate().public_key(),
    }


def test_other_kinds_of_key_are_refused_by_name() -> None:
    expected = {"P-384": "secp384r1", "P-521": "secp521r1"}
    for name, key in other_keys().items():
        for encoding, read in (
            (Encoding.PEM, PublicKey.from_pem),
            (Encoding.DER, PublicKey.from_der),
        ):
            data = key.public_bytes(encoding, SPKI)
            with pytest.raises(InvalidKeyError, match=expected.get(name, name)):
                read(data)


def test_private_keys_and_certificates_are_no_public_key(
    private_key: ec.EllipticCurvePrivateKey,
) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder(name, name)
        .serial_number(1)
        .public_key(private_key.public_key())
        .not_valid_before(moment)
        .not_valid_after(moment.replace(year=2027))
        .sign(private_key, SHA256())
    )
    texts = [certificate.public_bytes(Encoding.PEM)]
    binaries = [certificate.public_bytes(Encoding.DER)]
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        texts.append(private_key.private_bytes(Encoding.PEM, form, NoEncryption()))
        binaries.append(private_key.private_bytes(Encoding.DER, form, NoEncryption()))
    for text in texts:
        with pytest.raises(InvalidKeyError):
            PublicKey.from_pem(text)
    for binary in binaries:
        with pytest.raises(InvalidKeyError):
            PublicKey.from_der(binary)


def test_private_jwk_is_refused(private_key: ec.EllipticCurvePrivateKey) -> None:
    jwk = ECKey.import_key(private_key).as_dict(private=True)
    assert "d" in jwk
    with pytest.raises(InvalidKeyError, match="private") as caught:
        PublicKey.from_jwk(jwk)
    assert str(jwk["d"]) not in str(caught.value)


def test_jwk_with_a_wrong_member_is_refused(public_key: PublicKey) -> None:
    good = public_key.jwk()
    x = urlsafe_b64decode(good["x"] + "=")
    stray = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = stray[stray.index(good["x"][-1]) | 1]  # 43 characters carry two bits too many
    changes: list[dict[str, object]] = [
        {"kty": "RSA"},
        {"kty": "ec"},
        {"crv": "P-384"},
        {"crv": "p-256"},
        {"crv": ["P-256"]},
        {"x": good["y"], "y": good["x"]},
        {"x": urlsafe_b64encode(x[1:]).rstrip(b"=").decode()},
        {"x": urlsafe_b64encode(b"\x00" + x).rstrip(b"=").decode()},
        {"x": good["x"] + "="},
        {"x": good["x"] + "\n"},
        {"x": " " + good["x"]},
        {"x": good["x"][:-1] + last},
        {"x": good["x"][:-1] + "é"},
        {"x": "\ud800"},
        {"x": b64encode(b"\xff" * 32).decode()},
        {"x": ""},
        {"x": None},
        {"x": 7},
        {"x": ["a"]},
        {"x": {}},
        {"x": "A" * 43, "y": "A" * 43},
    ]
    for change in changes:
        with pytest.raises(InvalidKeyError):
            PublicKey.from_jwk({**good, **change})
    for name in good:
        with pytest.raises(InvalidKeyError):
            PublicKey.from_jwk({key: value for key, value in good.items() if key != name})


@given(st.one_of(anything, st.binary(), st.floats()))
def test_garbage_of_any_type_is_one_error(value: object) -> None:
    readers = (PublicKey.from_pem, PublicKey.from_der, PublicKey.from_jwk, PublicKey.from_point)
    for read in (*readers, PublicKey):
        with pytest.raises(InvalidKeyError):
            read(value)  # type: ignore[arg-type]


@given(st.integers(0, 90), st.integers(1, 255))
def test_changed_der_is_refused_or_another_key(place: int, change: int) -> None:
    der = bytearray(PublicKey.from_jwk(A3_JWK).der())
    der[place] ^= change
    with pytest.raises(InvalidKeyError):
        PublicKey.from_der(bytes(der))  # no single byte leads to another point on the curve


def test_curve_given_by_explicit_parameters_is_refused_or_the_same_key() -> None:
    made = subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"],
        check=True,
        capture_output=True,
        timeout=20,
    )
    forms = {}
    for form in ("named_curve", "explicit"):
        forms[form] = subprocess.run(
            ["openssl", "ec", "-pubout", "-param_enc", form],
            check=True,
            capture_output=True,
            timeout=20,
            input=made.stdout,
        ).stdout
    assert len(forms["explicit"]) > len(forms["named_curve"])
    named = PublicKey.from_pem(forms["named_curve"])
    try:
        explicit = PublicKey.from_pem(forms["explicit"])
    except InvalidKeyError:
        return
    # Handled: then what is given on is the named curve, never the parameters of the file.
    assert explicit == named
    assert explicit.der() == named.der()


# -- verification -----------------------------------------------------------------------------


def test_signatures_of_cryptography_verify(
    private_key: ec.EllipticCurvePrivateKey, public_key: PublicKey
) -> None:
    for count in range(50):
        message = bytes((count,)) * count
        raw = raw_from_der(private_key.sign(message, ec.ECDSA(SHA256())))
        public_key.verify(raw, message)
        public_key.verify_digest(raw, hashlib.sha256(message).digest())
        with pytest.raises(Refused):
            public_key.verify(raw, message + b"x")
        with pytest.raises(Refused):
            public_key.verify_digest(raw, hashlib.sha256(message + b"x").digest())


@pytest.mark.parametrize("length", [0, 20, 31, 33, 48, 64])
def test_digest_of_another_length_is_refused(public_key: PublicKey, length: int) -> None:
    with pytest.raises(InvalidInputError, match="32"):
        public_key.verify_digest(raw_of(1, 1), bytes(length))


@given(st.one_of(anything, st.binary(max_size=80)))
def test_verify_raises_our_error_for_any_signature(value: object) -> None:
    key = PublicKey.from_jwk(A3_JWK)
    for verify in (key.verify, key.verify_digest):
        with pytest.raises(Refused):
            verify(value, bytes(32))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "text", 32, [1], 1.5, object()])
def test_verify_refuses_a_message_that_is_not_bytes(public_key: PublicKey, value: object) -> None:
    with pytest.raises(InvalidInputError):
        public_key.verify(raw_of(1, 1), value)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        public_key.verify_digest(raw_of(1, 1), value)  # type: ignore[arg-type]


def test_cryptography_refuses_what_we_refuse(
    private_key: ec.EllipticCurvePrivateKey, public_key: PublicKey
) -> None:
    raw = raw_from_der(private_key.sign(b"m", ec.ECDSA(SHA256())))
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    public_key.verify(raw_of(r, N - s), b"m")  # ECDSA's own twin: valid for both
    private_key.public_key().verify(der_from_raw(raw_of(r, N - s)), b"m", ec.ECDSA(SHA256()))
    for twin in (raw_of(N - r, s), raw_of(s, r)):
        with pytest.raises(Refused):
            public_key.verify(twin, b"m")
        with pytest.raises(InvalidSignature):
            private_key.public_key().verify(der_from_raw(twin), b"m", ec.ECDSA(SHA256()))


def test_constants_are_those_of_the_curve() -> None:
    assert es256.ORDER == N
    key = ec.derive_private_key(N - 1, ec.SECP256R1())  # the largest scalar there is
    assert key.private_numbers().private_value == N - 1
    assert es256.ALGORITHM == "ES256"

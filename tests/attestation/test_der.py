# SPDX-License-Identifier: Apache-2.0
"""DER has one form for each value; certificates and PEM are of bounded size."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from d1_signer.attestation import AttestationError, der, keys
from d1_signer.attestation.certificates import armoured, read_certificate, read_certificates
from tests.attestation.makers import ROOT
from tests.attestation.pki import Settings, certificate, pem, value, without_sign_octets

WHOLE = [
    "",
    "0500",
    "020100",
    "02020080",
    "0202ff7f",
    "0101ff",
    "010100",
    "3003020101",
    "04818000" + "00" * 127,
    "a003020101",
]
BROKEN = [
    "30",
    "0201",
    "0200",
    "0202007f",
    "0202ff80",
    "010101",
    "0100",
    "050100",
    "3080020101" + "0000",
    "048101" + "00",
    "0482008000" + "00" * 127,
    "0480",
    "24030401" + "00",
    "1000",
    "1100",
    "1f8101" + "00",
    "30030201",
    "300402010100",
]


@pytest.mark.parametrize("text", WHOLE)
def test_der_is_taken(text: str) -> None:
    der.check(bytes.fromhex(text))


@pytest.mark.parametrize("text", BROKEN)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(AttestationError):
        der.check(bytes.fromhex(text))


def test_values_of_exactly_these_tags() -> None:
    assert der.values(bytes.fromhex("02010104017f"), der.INTEGER, der.OCTET_STRING) == [
        b"\x01",
        b"\x7f",
    ]
    assert der.unsigned(bytes.fromhex("02020080")) == 0x80
    assert der.bits(bytes.fromhex("0303000101")) == 0x0101
    for read, text in (
        (der.unsigned, "040101"),
        (der.unsigned, "020180"),
        (der.unsigned, "0202007f"),
        (der.unsigned, "02010100"),
        (der.unsigned, ""),
        (der.bits, "0302010e"),
        (der.bits, "0300"),
        (der.bits, "020101"),
    ):
        with pytest.raises(AttestationError):
            read(bytes.fromhex(text))


def test_pairs_of_unsigned_numbers() -> None:
    signature = encode_dss_signature(2**255, 7)
    assert der.unsigned_pair(signature) == (2**255, 7)
    assert der.unsigned_pair(without_sign_octets(signature)) == (2**255, 7)
    for content in ("020101", "020101020101020101", "020101040101", "0201010200"):
        with pytest.raises(AttestationError, match="two INTEGERs"):
            der.unsigned_pair(value(0x30, bytes.fromhex(content)))
    with pytest.raises(AttestationError, match="behind"):
        der.unsigned_pair(signature + b"\0")


def test_a_certificate_is_of_bounded_size_and_agrees_with_itself() -> None:
    long = Settings(ROOT, ROOT, extensions=[("1.2.3.4", False, bytes(16_384))])
    with pytest.raises(AttestationError, match="longer than 16384"):
        read_certificate(certificate(long))
    old = Settings(ROOT, ROOT, version="v1", extensions=[("1.2.3.4", False, b"\x05\x00")])
    with pytest.raises(AttestationError, match="not of version 3"):
        read_certificate(certificate(old))
    with pytest.raises(AttestationError):
        read_certificate(certificate(Settings(ROOT, ROOT)) + b"\0")


def test_certificates_are_counted_once_and_not_many() -> None:
    one = certificate(Settings(ROOT, ROOT))
    (read,) = read_certificates([one, pem(one) * 3, b"text before\n" + pem(one) + b"and behind"])
    assert read.encoding == one
    many = [
        certificate(Settings(ROOT, ROOT, extensions=[("1.2.3.4", False, bytes([number]))]))
        for number in range(65)
    ]
    assert len(read_certificates(many[:64])) == 64
    with pytest.raises(AttestationError, match="more than 64"):
        read_certificates(many)


def test_pem_of_another_label_or_cut_is_refused() -> None:
    whole = pem(b"\x30\x00")
    assert armoured(whole, "CERTIFICATE") == [b"\x30\x00"]
    for text in (pem(b"\x30\x00", "PRIVATE KEY"), whole[:-10], whole * 65):
        with pytest.raises(AttestationError, match="its PEM is cut"):
            armoured(text, "CERTIFICATE")
    with pytest.raises(AttestationError, match="neither DER nor PEM"):
        armoured(b"no block", "CERTIFICATE")


def test_rsa_keys_are_of_bounded_length() -> None:
    with pytest.raises(AttestationError, match="longer than 8192"):
        keys.rsa_key(2**8192 + 1, 65537)

# SPDX-License-Identifier: Apache-2.0
"""Luna: one confirmation, by the device whose number it has, each certificate for its purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d1_signer.attestation import AttestationError
from tests.attestation.changing import refusal, to
from tests.attestation.makers import KEY, LUNA, ROOT, luna, package
from tests.attestation.pki import Holder, Settings, certificate, ec_key, pem, rsa_key, spki


def test_confirmations_of_both_kinds_of_keys() -> None:
    assert luna(key=rsa_key("statement")).verify().spki == spki(rsa_key("statement"))
    verified = luna(serial=7).verify()
    assert verified.device == "Thales Luna HSM 7"
    assert verified.facts["serial number"] == 7
    assert verified.fips_mode is None


def test_a_package_in_pem() -> None:
    made = luna()
    statement = replace(made.statement, content=pem(made.statement.content, "PKCS7"))
    assert replace(made, statement=statement).verify().spki == spki(KEY)


def test_exactly_one_confirmation() -> None:
    assert "2 public key confirmations" in refusal(luna(more=1))
    assert "0 public key" in refusal(luna({"key": to(purposes=[f"{LUNA}.1.12"])}))
    assert "0 public key" in refusal(luna({"key": to(purposes=None)}))


@pytest.mark.parametrize("role", ["integrity", "origin", "device"])
@pytest.mark.parametrize("purposes", [None, [f"{LUNA}.1.13"], ["1.3.6.1.5.5.7.3.2"], [LUNA]])
def test_each_certificate_is_for_its_purpose(role: str, purposes: list[str] | None) -> None:
    with pytest.raises(AttestationError):
        luna({role: to(purposes=purposes)}).verify()


def test_the_device_is_the_one_that_the_confirmation_names() -> None:
    other = [(f"{LUNA}.2.1", False, (8).to_bytes(4, "little"))]
    assert "serial number" in refusal(luna({"key": to(extensions=other)}))
    assert "no number" in refusal(luna({"key": to(extensions=[])}))
    assert "no number" in refusal(luna({"key": to(extensions=[(f"{LUNA}.2.1", False, b"\1")])}))
    device = Holder("Luna K7-8", ec_key("luna device"))
    assert "serial number" in refusal(luna({"device": to(subject=device)}))


def test_a_confirmation_right_under_the_root_is_refused() -> None:
    assert "serial number" in refusal(luna({"key": to(issuer=ROOT)}))


def test_a_device_right_under_the_root_is_taken() -> None:
    assert luna({"device": to(issuer=ROOT)}).verify().device == "Thales Luna HSM 521174"


def test_a_package_of_another_type_or_of_too_many_is_refused() -> None:
    made = luna()
    data = made.statement.content.replace(b"\x01\x07\x02", b"\x01\x07\x01", 1)
    many = package([*made.certificates.values()] * 20)
    for content, told in ((data, "PKCS #7 one of"), (many, "more than 64 certificates")):
        assert told in refusal(replace(made, statement=replace(made.statement, content=content)))


def test_a_package_of_something_else_is_refused() -> None:
    made = luna()
    other = certificate(Settings(ROOT, ROOT))
    for content in (other, b"", package([]), b"\x30\x80" + made.statement.content[4:] + b"\0\0"):
        with pytest.raises(AttestationError):
            replace(made, statement=replace(made.statement, content=content)).verify()

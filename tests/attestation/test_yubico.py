# SPDX-License-Identifier: Apache-2.0
"""YubiHSM: origin, capabilities, label. PIV: who may attest for a key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d1_signer.attestation import AttestationError, Verified
from tests.attestation.changing import refusal, to
from tests.attestation.makers import HSM, KEY, PIV, ROOT, Made, yubihsm, yubikey_piv
from tests.attestation.pki import Holder, Settings, certificate, ec_key, pem, spki


def answers(verified: Verified) -> tuple[bool | None, ...]:
    return verified.exportable, verified.never_exportable, verified.generated_in_place


def test_made_in_the_device_and_not_to_be_wrapped() -> None:
    verified = yubihsm().verify()
    assert answers(verified) == (False, True, True)
    assert verified.device == "YubiHSM 2 1234"
    assert verified.facts["origin"] == "generated"
    assert verified.facts["label"] == "d1"


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (0x02, "imported"),
        (0x10, "imported under wrap"),
        (0x11, "generated, imported under wrap"),
        (0x03, "generated, imported"),
        (0x21, "generated, 0x20"),
        (0x00, "not stated"),
    ],
)
def test_an_origin_elsewhere_sinks_the_claim(origin: int, told: str) -> None:
    """A key under wrap was made in some device, and it left that one."""
    verified = yubihsm(origin=origin).verify()
    assert answers(verified) == (True, False, False)
    assert verified.facts["origin"] == told


def test_a_key_that_may_be_wrapped_is_exportable() -> None:
    verified = yubihsm(capabilities=0x80 | 1 << 16).verify()
    assert answers(verified) == (True, False, True)
    assert verified.facts["exportable-under-wrap"] is True


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 9])
def test_every_extension_of_a_yubihsm_is_due(number: int) -> None:
    assert f"{HSM}.{number}" in refusal(yubihsm(without=f"{HSM}.{number}"))


def test_key_and_device_are_of_one_serial_number() -> None:
    assert "different serial numbers" in refusal(yubihsm(serial=4321))


def test_freshness_by_the_label() -> None:
    made = yubihsm(label=b"challenge-77")
    assert made.verify(nonce=b"challenge-77").spki == spki(KEY)
    assert yubihsm(label=b"00ff").verify(nonce=b"\x00\xff").spki == spki(KEY)
    for nonce in (b"challenge-7", b"challenge-777", b"\x00\xff"):
        assert "label" in refusal(made, nonce=nonce)
    kept = replace(made, statement=replace(made.statement, nonce=b"another"))
    assert "label" in refusal(kept, nonce=b"challenge-77")


def test_an_attested_key_attests_no_other() -> None:
    """A key in a device may sign anything, also a certificate that looks like an attestation."""
    made = yubihsm()
    leaf = Holder("YubiHSM Attestation id:0x0005", KEY)
    forged = pem(certificate(Settings(Holder("YubiHSM Attestation id:0x0006", ec_key("f")), leaf)))
    statement = replace(
        made.statement,
        content=forged,
        certificates=(*made.statement.certificates, made.statement.content),
    )
    assert "not an authority's" in refusal(replace(made, statement=statement))


@pytest.mark.parametrize("old", [True, False])
def test_the_same_of_a_yubikey(old: bool) -> None:
    """Where a device's certificate has no basic constraints, a key's looks much like it."""
    made = yubikey_piv(old=old)
    assert answers(made.verify()) == (False, True, True)
    assert made.verify().device == "YubiKey 1234, PIV slot 9a"
    stated = [(f"{PIV}.3", False, b"\x04\x03\x07" if old else b"\x05\x04\x03")]
    stated += [(f"{PIV}.8", False, b"\x01\x01")]
    attested = Holder("YubiKey PIV Attestation 9a", KEY)
    forged = Settings(
        Holder("YubiKey PIV Attestation 9c", ec_key("f")), attested, extensions=stated
    )
    statement = replace(
        made.statement,
        content=pem(certificate(forged)),
        certificates=(*made.statement.certificates, made.statement.content),
    )
    assert "not an authority's" in refusal(replace(made, statement=statement))


def test_a_device_without_constraints_is_right_below_an_anchor() -> None:
    between = Holder("between", ec_key("between"))
    made = yubikey_piv({"device": to(issuer=between)}, old=True)
    above = Settings(between, ROOT, ca=True, usages={"key_cert_sign"})
    statement = replace(
        made.statement, certificates=(*made.statement.certificates, pem(certificate(above)))
    )
    assert "not that of a device" in refusal(replace(made, statement=statement))


def test_a_key_right_below_an_anchor_has_no_device() -> None:
    assert "no device" in refusal(yubikey_piv({"key": to(issuer=ROOT)}))
    assert "no device" in refusal(yubihsm({"key": to(issuer=ROOT)}))


def crossed(one: Made, other: Made) -> Made:
    return replace(one, statement=replace(one.statement, content=other.statement.content))


def test_crossed_pairs_are_refused() -> None:
    """Devices have one name and different keys."""
    other = Holder("Yubico PIV Attestation", ec_key("another yubikey"))
    new, old = yubikey_piv(), yubikey_piv({"device": to(subject=other)}, old=True)
    assert new.verify().spki == old.verify().spki == spki(KEY)
    assert "no trusted key" in refusal(crossed(new, old))
    assert "no trusted key" in refusal(crossed(old, new))


def test_only_the_certificate_of_a_key_in_a_slot() -> None:
    named = Holder("Somebody", KEY)
    assert "PIV slot" in refusal(yubikey_piv({"key": to(subject=named)}))
    assert "PIV slot" in refusal(yubikey_piv(policies=b"\x01"))
    assert "lacks" in refusal(yubikey_piv({"key": to(extensions=[])}))
    short = [(f"{PIV}.3", False, b"\x05\x04"), (f"{PIV}.8", False, b"\x01\x01")]
    assert "no firmware version" in refusal(yubikey_piv({"key": to(extensions=short)}))
    firmware = [(f"{PIV}.3", False, b"\x05\x04\x04")]
    assert "different firmware" in refusal(yubikey_piv({"device": to(extensions=firmware)}))


def test_a_statement_of_one_format_is_none_of_another() -> None:
    """One root stands above both (Yubico Attestation Root 1)."""
    hsm, piv = yubihsm(), yubikey_piv()
    for made, name in ((hsm, "yubikey-piv"), (piv, "yubihsm")):
        with pytest.raises(AttestationError):
            replace(made, statement=replace(made.statement, format=name)).verify()


def test_content_of_two_certificates_is_refused() -> None:
    made = yubihsm()
    content = made.statement.content + made.statement.certificates[0]
    statement = replace(made.statement, content=content)
    assert "one certificate of the key" in refusal(replace(made, statement=statement))

# SPDX-License-Identifier: Apache-2.0
"""Real statements of six vendors, verified offline."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from asn1crypto import csr, pem, x509

from d1_signer.attestation import PUBLISHED, AttestationError, Verified, verify
from d1_signer.es256 import PublicKey
from tests.attestation.pki import ec_key, spki
from tests.attestation.samples import AK, AT, NeedSamples, read, statement

pytestmark = NeedSamples

WHOLE = {
    "marvell ec": "Marvell LiquidSecurity HSM 5.2G1804-ICM000678, partition 1",
    "marvell rsa": "Marvell LiquidSecurity HSM 5.3G2041-ICM002696, partition 1",
    "luna-pkc ecc": "Thales Luna HSM 521174",
    "luna-pkc rsa": "Thales Luna HSM 521174",
    "yubihsm": "YubiHSM 2 31650425",
    "yubikey-piv ValidChain": "YubiKey 15732500, PIV slot 9a",
    "yubikey-piv ValidChain2018": "YubiKey (no serial number stated), PIV slot 9a",
    "securosys": "Securosys Primus HSM 18386101",
    "tpm2 certcreation": f"TPM 2.0 of the attestation key under {AK}",
    "tpm2 certify": f"TPM 2.0 of the attestation key under {AK}",
}
EachSample = pytest.mark.parametrize("name", WHOLE)


def verified(name: str, **more: Any) -> Verified:
    made, asked = statement(name)
    return verify(made, **{"at": AT, **asked, **more})


def refused(name: str, **more: Any) -> str:
    with pytest.raises(AttestationError) as caught:
        verified(name, **more)
    return caught.value.message


@EachSample
def test_it_is_verified_after_marvells_first_root_expired(name: str) -> None:
    result = verified(name)
    assert result.device == WHOLE[name]
    answers = (result.exportable, result.never_exportable, result.generated_in_place)
    assert answers == (False, True, True)
    assert result.hardware is (None if name.startswith("tpm2") else True)
    assert result.fips_mode is (True if name.startswith("marvell") else None)


@EachSample
def test_time_is_judged_where_there_are_certificates(name: str) -> None:
    assert verified(name, at=None).spki == verified(name).spki
    if not name.startswith("tpm2"):
        assert "not valid at the given time" in refused(name, at=0)
        assert "not valid" in refused(name, at=datetime(2200, 1, 1, tzinfo=UTC).timestamp())


def test_a_luna_chain_ends_in_2030() -> None:
    last, after = (datetime(2030, 8, day, tzinfo=UTC).timestamp() for day in (12, 13))
    assert verified("luna-pkc ecc", at=last).exportable is False
    assert "not valid" in refused("luna-pkc ecc", at=after)


@EachSample
def test_another_key_is_refused(name: str) -> None:
    assert "about another key" in refused(name, public_key=spki(ec_key("another")))
    key = verified(name).spki
    assert verified(name, public_key=key).spki == key


@EachSample
def test_other_anchors_are_refused(name: str) -> None:
    assert refused(name, anchors=())
    assert refused(name, anchors=("ab" * 32,))
    others = [each for each in PUBLISHED if each.spki_sha256 != verified(name).anchor]
    assert refused(name, anchors=others)


def test_keys_are_those_of_the_requests_and_certificates() -> None:
    for kind in ("ecc", "rsa"):
        _, _, der = pem.unarmor(read(f"thales-luna/{kind}-test.csr"))
        request = csr.CertificationRequest.load(der)["certification_request_info"]
        assert verified(f"luna-pkc {kind}").spki == request["subject_pk_info"].dump()
    tpm = PublicKey.from_pem(read("tpm-swtpm/key.pem"))
    assert verified("tpm2 certcreation", public_key=tpm).spki == tpm.der()


def test_the_published_keys_are_those_of_the_vendors_certificates() -> None:
    files = [
        "gcp-cloudhsm/marvell-root-2024.pem",
        "thales-luna/luna-rsa-root-certificate.pem",
        "thales-luna/luna-ecc-root-certificate.pem",
        "yubihsm2/yubihsm2-attestation-root.pem",
        "yubihsm2/yubico-attestation-root.pem",
        "yubikey-piv/yubicoPIVCAPEMAfter2018.pem",
        "yubikey-piv/yubicoPIVCAPEMU2F.pem",
        "securosys/root.pem",
    ]
    spkis = set()
    for file in files:
        _, _, der = pem.unarmor(read(file))
        spkis.add(x509.Certificate.load(der)["tbs_certificate"]["subject_public_key_info"].dump())
    bundle = pem.unarmor(read("gcp-cloudhsm/ec.certs"), multiple=True)
    hawksbill = x509.Certificate.load([der for _, _, der in bundle][3])
    spkis.add(hawksbill["tbs_certificate"]["subject_public_key_info"].dump())
    assert {anchor.spki for anchor in PUBLISHED} == spkis


def test_a_symmetric_key_is_refused() -> None:
    assert "symmetric" in refused("marvell aes")


def test_the_bundle_of_another_card_is_refused() -> None:
    made, _ = statement("marvell ec")
    other, _ = statement("marvell rsa")
    mixed = replace(made, certificates=other.certificates)
    with pytest.raises(AttestationError, match="not by the partition's key"):
        verify(mixed, at=AT)


@pytest.mark.parametrize("which", ["InvalidChain", "InvalidChain2"])
def test_crossed_pairs_are_refused(which: str) -> None:
    assert "no trusted key" in refused(f"yubikey-piv {which}")


def test_an_imported_key_of_a_tpm_is_exportable() -> None:
    result = verified("tpm2 soft")
    assert (result.exportable, result.generated_in_place) == (True, False)


def test_the_nonce_of_a_tpm() -> None:
    assert "nonce" in refused("tpm2 certcreation", nonce=b"another")
    assert "nonce" in refused("tpm2 certify", nonce=b"\x00\xff\x55")
    assert verified("tpm2 certify", nonce=b"\x00\xff\x55\xaa").facts["nonce"] == "00ff55aa"


def test_an_endorsement_certificate_does_not_certify_the_attestation_key() -> None:
    made, _ = statement("tpm2 certcreation")
    files = ("ek.crt", "issuercert.pem", "swtpm-localca-rootca-cert.pem")
    certificates = tuple(read(f"tpm-swtpm/{each}") for each in files)
    root = "10cccb3b1d874fae0b5150a21c0a89eb974c605b3cc13c15f76f06882816c871"
    with pytest.raises(AttestationError, match="neither trusted nor certified"):
        verify(replace(made, certificates=certificates), anchors={root}, at=AT)


def test_the_label_of_a_yubihsm_is_its_nonce() -> None:
    assert verified("yubihsm", nonce=b"hsmaudit-test").facts["label"] == "hsmaudit-test"
    assert "label" in refused("yubihsm", nonce=b"hsmaudit")


def test_when_securosys_stated_it() -> None:
    result = verified("securosys")
    assert result.stated_at == datetime(2025, 10, 18, 20, 19, 33, tzinfo=UTC).timestamp()

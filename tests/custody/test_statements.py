# SPDX-License-Identifier: Apache-2.0
"""Statements at opening, from files and from Cloud KMS, and what they make of claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.cloud import kms_v1 as kms

from d1_signer.attestation import AttestationError, Statement
from d1_signer.backends.gcp_kms.keys import evidence as evidence_of_google
from d1_signer.custody.bundle import KeyReport, make_bundle
from d1_signer.custody.chain import links
from d1_signer.custody.evidence import Assurance, Evidence
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.report import Maker
from d1_signer.custody.statements import read_anchor_file, read_statement
from d1_signer.custody.verifying import check_bundle
from d1_signer.errors import ConfigurationError, CustodyError, SignerError
from d1_signer.signing.signer import Signer
from tests.attestation import makers
from tests.attestation.makers import KEY, OWNER_ROOT, ROOT
from tests.attestation.pki import END, NOW, Holder, Settings, certificate, ec_key, pem, spki_sha256
from tests.signing.backends import KeyBackend

_UNKNOWN = Evidence(
    location="unit:key", exportable=None, generated_in_place=None, hardware=None, facts=()
)
_MAKERS: list[Callable[[], makers.Made]] = [
    makers.marvell,
    makers.luna,
    makers.yubihsm,
    makers.yubikey_piv,
    makers.securosys,
    makers.tpm2,
]


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> str:
    roots = [pem(certificate(Settings(root, root))) for root in (ROOT, OWNER_ROOT)]
    file: Path = tmp_path_factory.mktemp("anchors") / "roots.pem"
    file.write_bytes(b"for tests\n" + b"".join(roots))
    return str(file)


def key_backend(evidence: Evidence = _UNKNOWN) -> KeyBackend:
    assert isinstance(KEY, ec.EllipticCurvePrivateKey)
    return KeyBackend(KEY, evidence=evidence)


@pytest.mark.parametrize("make", _MAKERS)
def test_every_format_is_verified_at_opening_and_in_the_bundle(
    make: Callable[[], makers.Made], anchors: str
) -> None:
    made = make()
    policy = CustodyPolicy(generated_in_place=True, attested=True)
    options: dict[str, Any] = {"attestation": made.statement, "attestation_anchors": anchors}
    signer = Signer(key_backend(), custody_policy=policy, **options)
    report = signer.custody()
    facts = [fact for fact in report.evidence.facts if fact.assurance is Assurance.ATTESTED]
    assert {(fact.format, fact.anchor) for fact in facts} <= {
        (made.statement.format, spki_sha256(root.key)) for root in (ROOT, OWNER_ROOT)
    }
    assert facts
    assert report.to_dict()["limits"]
    json.dumps(report.to_dict())
    told = KeyReport(use="assertion", location="unit:key", report=report)
    content = make_bundle([(told, signer)], challenge="c", made_by=Maker.here(), made_at=int(NOW))
    checked = check_bundle(content, anchors=read_anchor_file(anchors))
    assert checked.all_findings == ()
    (key,) = checked.keys
    assert key.report is not None
    found = key.report.evidence
    assert found.attested_by("generated_in_place") is not None
    assert found.generated_in_place is True
    # The published keys alone do not vouch for it, and it is about no other key.
    assert check_bundle(content, anchors=read_anchor_file(None)).all_findings
    other = KeyBackend(ec.generate_private_key(ec.SECP256R1()), evidence=_UNKNOWN)
    with pytest.raises(AttestationError, match="about another key"):
        Signer(other, **options)
    with pytest.raises(AttestationError):
        Signer(key_backend(), attestation=made.statement)


def test_certificates_expire_for_an_auditor(anchors: str) -> None:
    made = makers.luna()
    signer = Signer(key_backend(), attestation=made.statement, attestation_anchors=anchors)
    told = KeyReport(use="assertion", location="unit:key", report=signer.custody())
    late = int(NOW) + 40 * 365 * 86_400
    content = make_bundle([(told, signer)], challenge=None, made_by=Maker.here(), made_at=late)
    assert "statement is refused" in " ".join(
        check_bundle(content, anchors=read_anchor_file(anchors)).all_findings
    )


def google(statement: Statement | None) -> Evidence:
    """What the backend makes of a version of Cloud KMS with such an attestation."""
    attestation = kms.KeyOperationAttestation()
    if statement is not None:
        attestation = kms.KeyOperationAttestation(
            format=kms.KeyOperationAttestation.AttestationFormat.CAVIUM_V2_COMPRESSED,
            content=statement.content,
            cert_chains=kms.KeyOperationAttestation.CertificateChains(
                cavium_certs=[one.decode() for one in statement.certificates]
            ),
        )
    return evidence_of_google(
        kms.CryptoKeyVersion(
            name="projects/p", protection_level=kms.ProtectionLevel.HSM, attestation=attestation
        )
    )


def test_what_cloud_kms_delivers_is_attested_once_it_is_verified(anchors: str) -> None:
    policy = CustodyPolicy(never_exportable=True, generated_in_place=True, attested=True)
    evidence = google(makers.marvell().statement)
    signer = Signer(key_backend(evidence), custody_policy=policy, attestation_anchors=anchors)
    assert signer.custody().evidence.attested_by("exportable") is not None
    with pytest.raises(CustodyError, match="only claimed"):
        Signer(key_backend(evidence), custody_policy=policy)
    with pytest.raises(CustodyError, match="only claimed"):
        Signer(key_backend(google(None)), custody_policy=policy, attestation_anchors=anchors)
    # A statement that says what is worse than Google's word counts.
    once = makers.marvell(private={0x0162: b"\x01"}).statement
    found = Signer(key_backend(google(once)), attestation_anchors=anchors).custody().evidence
    assert found.exportable is True
    assert found.attested_by("exportable") is not None


@pytest.mark.parametrize("make", _MAKERS)
def test_a_statement_is_read_from_its_files(
    make: Callable[[], makers.Made], tmp_path: Path
) -> None:
    statement = make().statement
    names = [*("attest", "signature", "public", "ak_public", "creation_data")]
    parts = statement.parts
    pieces = [statement.content] if parts is None else [parts.get(name, b"") for name in names]
    pieces += statement.certificates
    paths = []
    for number, piece in enumerate(pieces):
        file = tmp_path / f"{number}.bin"
        file.write_bytes(piece)
        paths.append(str(file) if piece else "")
    read = read_statement(f"{statement.format}:{','.join(paths)}")
    assert (read.content, read.certificates) == (
        statement.content if parts is None else b"",
        statement.certificates,
    )
    assert read.parts == parts


@pytest.mark.parametrize(
    "text", ["", "luna-pkc", "luna-pkc:", "luna:/etc/x", ":/etc/x", "/etc/x", "tpm2:/etc/hostname"]
)
def test_what_is_no_attestation_is_a_wrong_setting(text: str) -> None:
    with pytest.raises(ConfigurationError, match="attestation"):
        read_statement(text)


def test_a_file_of_anchors_adds_or_replaces(tmp_path: Path) -> None:
    published = read_anchor_file(None)
    file = tmp_path / "anchors"
    line = f"{'ab' * 32} formats=tpm2 hardware=no ours"
    file.write_text(f"# ours\n{line}\n")
    more = read_anchor_file(str(file))
    assert more > published
    file.write_text(f"\ninstead\n{line}\n")
    assert read_anchor_file(str(file)) == more - published
    root = pem(certificate(Settings(ROOT, ROOT)))
    file.write_bytes(b"instead\nsubject=root of the tests\n" + root)
    (only,) = read_anchor_file(str(file))
    assert only.spki_sha256 == spki_sha256(ROOT.key)
    file.write_bytes(root)
    assert read_anchor_file(str(file)) == published | {only}
    both = f"{line}\n".encode() + root  # one of them would count for nothing
    for wrong in (
        both,
        root + both[:64],
        b"instead\n" + both,
        b"",
        b"instead\n",
        b"no hash",
        b"\xff",
        b"-----BEGIN CERTIFICATE-----\nAA",
    ):
        file.write_bytes(wrong)
        with pytest.raises(ConfigurationError, match="anchors"):
            read_anchor_file(str(file))


@pytest.mark.parametrize("make", _MAKERS)
def test_the_chain_is_what_was_judged_and_no_more(make: Callable[[], makers.Made]) -> None:
    """A certificate that came along, signed by nobody, is no step of it."""
    made = make()
    stranger = Holder("FIPS 140-3 level 4, says the vendor", ec_key("stranger"))
    forged = pem(certificate(Settings(stranger, ROOT)))
    forged += pem(certificate(Settings(ROOT, stranger)))
    statement = replace(made.statement, certificates=(*made.statement.certificates, forged))
    verified = replace(made, statement=statement).verify()
    drawn = links(verified)
    assert len(drawn) == len(made.certificates)
    assert set(verified.certificates) == set(made.certificates.values())
    assert not any("FIPS 140-3" in link.subject + link.issuer for link in drawn)
    for below, above in pairwise(drawn):
        root = f"Common Name: {ROOT.name}"
        assert below.issuer in {above.subject, root}
    assert all(link.until == END.date().isoformat() for link in drawn)


def test_a_backend_whose_statements_are_none_is_a_defect() -> None:
    told = replace(_UNKNOWN, statements=(b"bytes",))  # type: ignore[arg-type]
    with pytest.raises(SignerError, match="gave no evidence"):
        Signer(key_backend(told)).custody()

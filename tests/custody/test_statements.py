# SPDX-License-Identifier: Apache-2.0
"""Statements at opening, from files and from Cloud KMS, and what they make of claims."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from d1_signer.errors import ConfigurationError, CustodyError
from d1_signer.signing.signer import Signer
from tests.attestation import makers
from tests.attestation.makers import KEY, OWNER_ROOT, ROOT
from tests.attestation.pki import NOW, Settings, certificate, pem, spki_sha256
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
    for wrong in (b"", b"instead\n", b"no hash", b"\xff", b"-----BEGIN CERTIFICATE-----\nAA"):
        file.write_bytes(wrong)
        with pytest.raises(ConfigurationError, match="anchors"):
            read_anchor_file(str(file))


@pytest.mark.parametrize("make", _MAKERS)
def test_the_chain_is_drawn_as_far_as_it_can_be_read(make: Callable[[], makers.Made]) -> None:
    statement = make().statement
    drawn = links(statement)
    places = {link.subject: number for number, link in enumerate(drawn)}
    for number, link in enumerate(drawn):
        assert places.get(link.issuer, len(drawn)) >= number
    if statement.format in {"luna-pkc", "marvell", "yubihsm", "yubikey-piv"}:
        assert len(drawn) >= 2
    broken = Statement(format=statement.format, content=b"\x30\x80", certificates=(b"\x30", b""))
    assert links(broken) == []

# SPDX-License-Identifier: Apache-2.0
"""Securosys: what the XML says, and how little of XML and JSON is read."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from d1_signer.attestation import AttestationError
from tests.attestation.changing import refusal, to
from tests.attestation.makers import ROOT, securosys
from tests.attestation.pki import Holder, ec_key


def test_what_it_says() -> None:
    verified = securosys().verify()
    assert verified.device == "Securosys Primus HSM 18"
    assert verified.stated_at == datetime(2026, 1, 2, tzinfo=UTC).timestamp()
    assert verified.facts["key_use_count"] == "3"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attributes": {"extractable": True}}, (True, False, True)),
        ({"attributes": {"never_extractable": False}}, (False, False, True)),
        ({"attributes": {"always_sensitive": False}}, (False, False, True)),
        ({"attributes": {"sensitive": False}}, (True, False, True)),
        ({"creation": "imported"}, (False, False, False)),
        ({"creation": ""}, (False, False, False)),
    ],
)
def test_answers_follow_the_attributes(
    changes: dict[str, object], expected: tuple[bool, ...]
) -> None:
    """A key from elsewhere may have never been extractable here."""
    verified = securosys(**changes).verify()  # type: ignore[arg-type]
    answers = verified.exportable, verified.never_exportable, verified.generated_in_place
    assert answers == expected


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("<label>d1</label>", "<label>d1</label><label>d2</label>", "twice"),
        ("<label>d1</label>", "<label><a><b>x</b></a></label>", "too deep"),
        ("<extractable>false</extractable>", "", "whether it is extractable"),
        ("<extractable>false", "<extractable>False", "whether it is extractable"),
        ("<extractable>false</", "<extractable>true</extractable><extractable>false</", "twice"),
        ("<attest_time>2026-01-02T00:00:00Z</attest_time>", "", "lacks attest_time"),
        ("private_key", "public_key_of", "whether it is extractable"),
        ("<private_key", "<!DOCTYPE p [<!ENTITY e 'x'>]><private_key", "document type"),
    ],
)
def test_another_description_is_refused(old: str, new: str, told: str) -> None:
    """Though it is signed: what has another form than ours is not guessed at."""
    made = securosys(change=lambda xml: xml.replace(old, new))
    with pytest.raises(AttestationError) as caught:
        made.verify()
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2026-01-02T00:00:00Z", "yesterday"),
        ("</private_key>", ""),
        ("<public_key>", "<public_key>A"),
        ("<label>", "<label>&e;"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(old: str, new: str) -> None:
    with pytest.raises(AttestationError):
        securosys(change=lambda xml: xml.replace(old, new)).verify()


def test_a_description_that_the_hsm_did_not_sign_is_refused() -> None:
    made = securosys()
    document = json.loads(made.statement.content)
    xml = base64.b64decode(document["attestationData"]).replace(b"d1", b"d2")
    made = securosys(members={"attestationData": base64.b64encode(xml).decode()})
    assert "not by the HSM's attestation key" in refusal(made)


def test_members_of_the_json() -> None:
    made = securosys()
    twice = made.statement.content.replace(b"{", b'{"attestationData": "",', 1)
    assert "twice" in refusal(replace(made, statement=replace(made.statement, content=twice)))
    for content, told in ((b"[]", "not an object"), (b"{}", "due in base64")):
        assert told in refusal(replace(made, statement=replace(made.statement, content=content)))
    for content in (b"null", b"[" * 100_000, b"\xff{}"):
        with pytest.raises(AttestationError):
            replace(made, statement=replace(made.statement, content=content)).verify()
    assert "list of certificates" in refusal(securosys(members={"attestationCertChain": "x"}))


def test_the_attestation_key_is_an_hsms() -> None:
    somebody = Holder("SOMEBODY", ec_key("primus"))
    assert "one HSM" in refusal(securosys({"device": to(subject=somebody)}))
    assert "one HSM" in refusal(securosys({"signer": to(issuer=ROOT)}))
    root_in_its_name = Holder("PRIMUS HSM KEY (SN: 18)", ROOT.key)
    assert "not by the HSM" in refusal(securosys({"signer": to(issuer=root_in_its_name)}))


def test_a_long_description_is_refused() -> None:
    made = securosys(change=lambda xml: xml.replace("<label>", "<label>" + " " * 65_536))
    assert "longer than 65536" in refusal(made)


def test_the_files_of_the_hsm_become_the_json_as_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/custody/attestation.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"test_securosys\.py -->\n```sh\n(.*?)```", page, re.DOTALL)
    made = securosys()
    document = json.loads(made.statement.content)
    files = {"d1.xml": "attestationData", "d1.sig": "attestationSignature"}
    for file, member in files.items():
        (tmp_path / file).write_bytes(base64.b64decode(document[member]))
    chain = "".join(document["attestationCertChain"])
    for ends in ("\n", "\r\n"):
        crt = chain.replace("\n", ends).encode()
        (tmp_path / "PrimusHSM_Attestation.crt").write_bytes(crt)
        subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, timeout=30)
        content = (tmp_path / "d1.json").read_bytes()
        assert replace(made, statement=replace(made.statement, content=content)).verify() == (
            made.verify()
        )

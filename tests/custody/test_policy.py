# SPDX-License-Identifier: Apache-2.0
"""What is demanded: of a claim, of what is attested, in words, and of a key that is opened anew."""

from __future__ import annotations

import dataclasses
import logging
from itertools import product
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer.attestation import Statement, Verified
from d1_signer.custody.evidence import ANSWERS, Assurance, Attestation, Evidence, Fact
from d1_signer.custody.policy import WORDS, CustodyPolicy
from d1_signer.errors import ConfigurationError, CustodyError
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.signing.backends import KeyBackend

GOOD = Evidence(
    location="unit:key",
    exportable=False,
    generated_in_place=True,
    hardware=True,
    facts=(Fact(name="a", value=1, source="unit", assurance=Assurance.ATTESTED, anchor="x"),),
    never_exportable=True,
    fips_mode=True,
)
FIELDS = {"exportable": "non_exportable", **{name: name for name in [*ANSWERS][1:]}}


def statement(**answers: bool | None) -> Attestation:
    told: dict[str, Any] = {**dict.fromkeys(ANSWERS), **answers}
    verified = Verified(spki=b"", device="HSM 1", stated_at=None, anchor="ab" * 32, **told)
    return Attestation(statement=Statement(format="marvell"), verified=verified)


def demand(name: str, value: bool | Assurance = True) -> dict[str, Any]:  # noqa: FBT002 (a demand)
    return {FIELDS[name]: value}


def test_each_demand_is_met_by_its_good_answer_alone() -> None:
    for name, (good, told) in ANSWERS.items():
        policy = CustodyPolicy(**demand(name))
        policy.check(GOOD)
        for answer in {True, False, None} - {good}:
            with pytest.raises(CustodyError, match=f"shown to be {told}") as caught:
                policy.check(dataclasses.replace(GOOD, **{name: answer}))  # type: ignore[arg-type]
            assert caught.value.details["policy"] == ",".join(policy.words)


def test_attested_is_demanded_of_one_answer_or_of_all() -> None:
    signed = {"exportable": False, "hardware": True}
    evidence = GOOD.with_attestations((statement(**signed),))
    for name in ANSWERS:
        policies = (
            CustodyPolicy(**demand(name, Assurance.ATTESTED)),
            CustodyPolicy(**demand(name), attested=True),
        )
        for policy in policies:
            assert bool(policy.unmet(evidence)) is (name not in signed), (name, policy)
            assert policy.unmet(GOOD)
    assert not CustodyPolicy(attested=True).unmet(evidence)
    assert CustodyPolicy(attested=True).unmet(GOOD)
    assert not CustodyPolicy().unmet(dataclasses.replace(GOOD, hardware=None))


def test_the_worse_of_claim_and_statement_counts() -> None:
    answers = (True, False, None)
    for claimed, signed in product(answers, repeat=2):
        evidence = dataclasses.replace(GOOD, exportable=claimed)
        found = evidence.with_attestations((statement(exportable=signed),))
        known = {claimed, signed} - {None}
        assert found.exportable is (None if not known else True in known)
        by = found.attested_by("exportable")
        assert (by is not None) is (signed is not None and found.exportable is signed)


def test_nothing_that_a_backend_calls_attested_is() -> None:
    forged = dataclasses.replace(GOOD, attestations=(statement(hardware=True),))
    backend = KeyBackend(ec.generate_private_key(ec.SECP256R1()), evidence=forged)
    evidence = Signer(backend).custody().evidence
    assert evidence.attestations is None
    assert {(fact.assurance, fact.anchor) for fact in evidence.facts} == {("claimed", None)}
    with pytest.raises(CustodyError, match="only claimed"):
        Signer(backend, custody_policy=CustodyPolicy(hardware=Assurance.ATTESTED))


def test_words_name_the_fields_and_nothing_else() -> None:
    for word, name in WORDS.items():
        policy = CustodyPolicy.parse(word)
        assert policy == CustodyPolicy(**{name: True})
        assert policy.words == (word,)
    assert CustodyPolicy.parse(" hardware , fips,") == CustodyPolicy(hardware=True, fips_mode=True)
    one = CustodyPolicy(hardware=Assurance.ATTESTED, never_exportable=True)
    assert one.words == ("never-exportable", "hardware(attested)")
    for text in ("", ",", "Hardware", "hardware attested", "hardware;fips", "exportable"):
        with pytest.raises(ConfigurationError) as caught:
            CustodyPolicy.parse(text)
        assert "never-exportable" in caught.value.hint


@pytest.mark.parametrize("value", [None, 1, "yes", "attested", 0])
def test_what_is_no_demand_is_refused(value: object) -> None:
    for name in WORDS.values():
        if name == "attested" and value in {0, 1}:
            continue
        if value == "attested" and name != "attested":
            continue  # it is Assurance.ATTESTED, a text
        with pytest.raises(ConfigurationError, match=name):
            CustodyPolicy(**{name: value})  # type: ignore[arg-type]


def test_the_environment_holds_where_code_names_none(
    monkeypatch: pytest.MonkeyPatch, key_uri: str
) -> None:
    monkeypatch.setenv("D1_CUSTODY_POLICY", "hardware,attested")
    with pytest.raises(CustodyError, match="held by hardware"):
        open_signer(key_uri)
    open_signer(key_uri, custody_policy=CustodyPolicy()).close()
    monkeypatch.setenv("D1_CUSTODY_POLICY", "hardwar")
    with pytest.raises(ConfigurationError, match="D1_CUSTODY_POLICY"):
        open_signer(key_uri)
    monkeypatch.setenv("D1_CUSTODY_POLICY", " ")
    open_signer(key_uri).close()


class Reopening(KeyBackend):
    """A backend that says when it has opened its key anew."""

    openings = 0
    reopens_at_signing = False

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        if self.reopens_at_signing:
            self.openings += 1
            self.reopens_at_signing = False
        return super().sign_digest(digest, deadline)

    def custody_within(self, deadline: float | None) -> Evidence:
        self.limits = [*getattr(self, "limits", []), deadline]
        return self.custody()


def test_a_key_that_is_opened_anew_is_held_again(caplog: pytest.LogCaptureFixture) -> None:
    backend = Reopening(ec.generate_private_key(ec.SECP256R1()), evidence=GOOD)
    policy = CustodyPolicy(never_exportable=True)
    with caplog.at_level(logging.INFO, "d1_signer"):
        signer = Signer(backend, custody_policy=policy, kid="k")
        signer.sign(b"1")
        backend.reopens_at_signing = True
        signer.sign(b"2", timeout=7)
    (limit,) = backend.limits
    assert limit is not None
    (line,) = [r.getMessage() for r in caplog.records if "custody.policy" in r.getMessage()]
    assert "policy=never-exportable" in line
    assert "never_exportable=yes(claimed)" in line
    backend.evidence = dataclasses.replace(GOOD, never_exportable=False)
    signer.sign(b"3")  # nothing was opened since
    backend.reopens_at_signing = True
    with pytest.raises(CustodyError, match="never exportable"):
        signer.sign(b"4")
    asked = len(backend.asked)
    with pytest.raises(CustodyError):
        signer.sign(b"5")
    assert len(backend.asked) == asked  # refused before the key is used
    backend.evidence = GOOD
    signer.sign(b"6")
    assert len(backend.asked) == asked + 1


def test_without_a_policy_nothing_is_asked_again() -> None:
    backend = Reopening(ec.generate_private_key(ec.SECP256R1()), evidence=GOOD)
    signer = Signer(backend)
    backend.reopens_at_signing = True
    signer.sign(b"1")
    assert not hasattr(backend, "limits")

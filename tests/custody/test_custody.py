# SPDX-License-Identifier: Apache-2.0
"""The custody policy over every combination of demand and answer, and the report's form."""

from __future__ import annotations

import json
from itertools import product

import pytest

from d1_signer.custody.evidence import Assurance, Evidence, Fact
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.report import CustodyReport
from d1_signer.errors import CustodyError

ANSWERS = (True, False, None)


def evidence(*, exportable: bool | None, made: bool | None, hardware: bool | None) -> Evidence:
    return Evidence(
        location="pkcs11:token=a",
        exportable=exportable,
        generated_in_place=made,
        hardware=hardware,
        facts=(),
    )


@pytest.mark.parametrize("demands", [*product((True, False), repeat=3)])
def test_policy_is_met_by_what_is_shown_and_by_nothing_else(demands: tuple[bool, ...]) -> None:
    policy = CustodyPolicy(
        non_exportable=demands[0], generated_in_place=demands[1], hardware=demands[2]
    )
    for exportable, made, hardware in product(ANSWERS, repeat=3):
        found = evidence(exportable=exportable, made=made, hardware=hardware)
        met = (exportable is False, made is True, hardware is True)
        unmet = [
            name
            for name, demand, shown in zip(
                ("not exportable", "generated in place", "held by hardware"),
                demands,
                met,
                strict=True,
            )
            if demand and not shown
        ]
        if not unmet:
            policy.check(found)
            continue
        with pytest.raises(CustodyError) as caught:
            policy.check(found)
        assert f"to be {', '.join(unmet)}." in caught.value.message
        assert found.location in caught.value.message
        assert not caught.value.retryable


def test_an_answer_that_only_looks_true_does_not_count() -> None:
    found = evidence(exportable=0, made=1, hardware="yes")  # type: ignore[arg-type]
    for demand in ({"non_exportable": True}, {"generated_in_place": True}, {"hardware": True}):
        with pytest.raises(CustodyError):
            CustodyPolicy(**demand).check(found)


def test_report_is_json_with_claimed_and_attested_apart() -> None:
    facts = (
        Fact(name="CKA_EXTRACTABLE", value=False, source="PKCS#11 attribute"),
        Fact(name="level", value=3, source="a signed statement", assurance=Assurance.ATTESTED),
        Fact(name="unknown", value=None, source="nobody"),
    )
    report = CustodyReport(
        backend="pkcs11",
        kid="é",
        thumbprint="t",
        collected_at=1,
        evidence=Evidence(
            location="l", exportable=False, generated_in_place=None, hardware=True, facts=facts
        ),
    )
    read = json.loads(json.dumps(report.to_dict()))
    answers = ("exportable", "never_exportable", "generated_in_place", "hardware", "fips_mode")
    assert {name: read.pop(name) for name in answers} == {
        "exportable": False,
        "never_exportable": None,
        "generated_in_place": None,
        "hardware": True,
        "fips_mode": None,
    }
    for fact in read["facts"]:
        assert (fact.pop("format"), fact.pop("anchor")) == (None, None)
    assert read == {
        "backend": "pkcs11",
        "plug_in": None,
        "kid": "é",
        "thumbprint": "t",
        "collected_at": 1,
        "time": "1970-01-01T00:00:01Z",
        "made_by": None,
        "location": "l",
        "attested": [],
        "limits": [],
        "facts": [
            {
                "name": "CKA_EXTRACTABLE",
                "value": False,
                "source": "PKCS#11 attribute",
                "assurance": "claimed",
            },
            {"name": "level", "value": 3, "source": "a signed statement", "assurance": "attested"},
            {"name": "unknown", "value": None, "source": "nobody", "assurance": "claimed"},
        ],
    }
    assert all(type(fact["assurance"]) is str for fact in report.to_dict()["facts"])  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        report.kid = "x"  # type: ignore[misc]

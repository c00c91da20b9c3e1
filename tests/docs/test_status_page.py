# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/observability.md on states have every member, and none that is not there."""

from __future__ import annotations

import dataclasses
import re
from enum import StrEnum

import pytest

from d1_signer import FetcherStatus, MemberHealth
from d1_signer.audit.process import TrailStatus
from d1_signer.token.access_token import State
from d1_signer.token.attempt import Attempt
from d1_signer.token.status import (
    CertificateStatus,
    Failure,
    LeaseState,
    SettingsStatus,
    StoreState,
    Success,
)
from tests.docs.reading import ROOT, rows, section

PAGE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
FETCHER = {
    name: meaning
    for first, meaning in rows(section(PAGE, "The status of a fetcher"), 2)
    for name in re.findall(r"`(\w+)`", first)
}


def members(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_status_of_a_fetcher() -> None:
    assert {*FETCHER} == members(FetcherStatus) | {"healthy"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("last_success", [Success, Attempt]),
        ("last_failure", [Failure]),
        ("members", [MemberHealth]),
        ("settings", [SettingsStatus]),
        ("client_certificate", [CertificateStatus]),
    ],
)
def test_its_parts(name: str, kinds: list[type]) -> None:
    told = set(re.findall(r"`(\w+)`", FETCHER[name]))
    assert told == set().union(*map(members, kinds))


@pytest.mark.parametrize(
    ("name", "states"), [("token", State), ("store", StoreState), ("lease", LeaseState)]
)
def test_its_states(name: str, states: type[StrEnum]) -> None:
    assert set(re.findall(r"`(\w+)`", FETCHER[name])) == {state.value for state in states}


def test_the_status_of_an_audit_trail() -> None:
    told = {
        name
        for first, _ in rows(section(PAGE, "The status of an audit trail"), 2)
        for name in re.findall(r"`(\w+)`", first)
    }
    assert told == members(TrailStatus)

# SPDX-License-Identifier: Apache-2.0
"""What has changed from one report to the next."""

from __future__ import annotations

from dataclasses import dataclass

from d1_signer.custody.evidence import ANSWERS, Evidence
from d1_signer.custody.report import CustodyReport
from d1_signer.custody.verifying import Checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that is not as it was.

    Attributes:
        key: Thumbprint of the key.
        what: What has changed: an answer, a fact with its source, or the key itself.
        before: How it was; None where it was not there.
        after: How it is; None where it is not there.
    """

    key: str
    what: str
    before: str | None
    after: str | None


def changes(old: Checked, new: Checked) -> list[Change]:
    """What has changed from one bundle to another, key by key."""
    before, after = _reports(old), _reports(new)
    found: list[Change] = []
    for use, thumbprint in sorted({*before, *after}):
        was, now = before.get((use, thumbprint)), after.get((use, thumbprint))
        if was is None or now is None:
            kids = [None if report is None else report.kid for report in (was, now)]
            found.append(Change(key=thumbprint, what=f"key ({use})", before=kids[0], after=kids[1]))
            continue
        told = [dict(_told(report)) for report in (was, now)]
        names = [*told[0], *(name for name in told[1] if name not in told[0])]
        found += [
            Change(key=thumbprint, what=name, before=told[0].get(name), after=told[1].get(name))
            for name in names
            if told[0].get(name) != told[1].get(name)
        ]
    return found


def _reports(checked: Checked) -> dict[tuple[str, str], CustodyReport]:
    """By use and thumbprint: one key may sign assertions and be the client's."""
    found = [(key.use, key.report) for key in checked.keys if key.report is not None]
    return {(use, report.thumbprint): report for use, report in found}


def _told(report: CustodyReport) -> list[tuple[str, str]]:
    evidence = report.evidence
    backend = report.plug_in or report.backend
    plain = [("kid", report.kid), ("backend", backend), ("location", evidence.location)]
    answers = [(name, _answer(evidence, name)) for name in ANSWERS]
    facts: dict[str, list[str]] = {}
    for fact in evidence.facts:
        told = f"{fact.value} ({fact.assurance})"
        facts.setdefault(f"{fact.name} [{fact.source}]", []).append(told)
    return [*plain, *answers, *((name, ", ".join(values)) for name, values in facts.items())]


def _answer(evidence: Evidence, name: str) -> str:
    answer: bool | None = getattr(evidence, name)
    if answer is None:
        return "unknown"
    by = evidence.attested_by(name)
    told = "claimed" if by is None else f"attested under {by.verified.anchor}"
    return f"{'yes' if answer else 'no'} ({told})"

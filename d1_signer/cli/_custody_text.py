# SPDX-License-Identifier: Apache-2.0
"""What is known of a key, for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from d1_signer.cli._output import explanation, facts, indented, moment, printable, said, table
from d1_signer.errors import CustodyError

if TYPE_CHECKING:
    from d1_signer.custody.bundle import KeyReport
    from d1_signer.custody.evidence import Evidence
    from d1_signer.custody.policy import CustodyPolicy
    from d1_signer.custody.report import CustodyReport

NAMES = {
    "exportable": "Exportable",
    "never_exportable": "Never exportable",
    "generated_in_place": "Generated in place",
    "hardware": "Hardware",
    "fips_mode": "FIPS mode",
}
USES = {"assertion": "signs assertions", "client": "TLS client key", "audit": "audit trail"}


def key_text(told: KeyReport, unmet: Sequence[str] = ()) -> str:
    """What is told of one key."""
    if told.report is None:
        lines = [f"Error: {printable(told.location)} could not be asked."]
        if told.error is not None:
            lines += [printable(told.error.message), *explanation(told.error)]
        return "\n  ".join(lines)
    text = report_text(told.report, told.use)
    return text if not unmet else f"{text}\n\n  NOT SHOWN TO BE: {', '.join(unmet)}."


def shortfall(told: KeyReport, unmet: Sequence[str], policy: CustodyPolicy) -> CustodyError:
    """Why a key's report is not enough, and what to do about it."""
    assert told.report is not None  # noqa: S101 (of a key that is away nothing is judged)
    report = told.report
    hint = "Use a key that meets them, or demand less: --require, or D1_CUSTODY_POLICY."
    if policy.attested and not report.evidence.attestations:
        hint = (
            f"No statement about it was verified: what {report.backend} says is a claim, and not "
            f"attested. Give the device's statement with --option attestation=FORMAT:FILE. {hint}"
        )
    return CustodyError(
        f"kid {report.kid} does not meet what is demanded ({', '.join(policy.words)}): it is not "
        f"shown to be {', '.join(unmet)}.",
        hint=hint,
    )


def report_text(report: CustodyReport, use: str) -> str:
    """A report."""
    evidence = report.evidence
    head = facts(
        {
            "kid": report.kid,
            "Use": USES.get(use, use),
            "Thumbprint": report.thumbprint,
            "Backend": report.backend,
            "Location": evidence.location,
            **{told: answered(evidence, name) for name, told in NAMES.items()},
            "Collected": moment(report.collected_at),
        }
    )
    return f"{head}\n\n{evidence_text(evidence)}"


def evidence_text(evidence: Evidence) -> str:
    """What the answers rest on, and what is not proven."""
    rows = [(fact.name, str(fact.assurance), fact.source, fact.value) for fact in evidence.facts]
    told = indented(table(("FACT", "ASSURANCE", "SOURCE", "VALUE"), rows))
    limits = [limit for one in evidence.attestations or () for limit in one.verified.limits]
    if not limits:
        return told
    not_proven = "\n".join(["NOT PROVEN", *map(printable, limits)])
    return f"{told}\n\n{indented(not_proven)}"


def by_whom(evidence: Evidence, name: str, backend: str) -> str:
    """Who vouches for an answer, in a few words; empty where nobody knows."""
    if getattr(evidence, name) is None:
        return ""
    by = evidence.attested_by(name)
    if by is None:
        return f"claimed by {backend}"
    return f"attested by {by.verified.device}, anchor {by.verified.anchor[:16]}…"


def answered(evidence: Evidence, name: str) -> str:
    """An answer, and whether it is claimed or attested."""
    answer: bool | None = getattr(evidence, name)
    if answer is None:
        return said(None)
    return f"{said(answer)} ({'claimed' if evidence.attested_by(name) is None else 'attested'})"

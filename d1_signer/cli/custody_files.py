# SPDX-License-Identifier: Apache-2.0
"""`d1-signer custody verify` and `custody diff`: from files alone.

No key, no setting, no variable of the environment, no network.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from d1_signer.cli._custody_text import NAMES, USES, by_whom, evidence_text
from d1_signer.cli._output import Output, facts, printable, said, table, with_output_options
from d1_signer.cli._paths import FILE
from d1_signer.errors import ConfigurationError, CustodyError
from d1_signer.secret import read_public_file, shown_path, unreadable

if TYPE_CHECKING:
    from d1_signer.custody.verifying import Checked, CheckedKey

_anchors = click.option(
    "--anchors",
    metavar="FILE",
    type=FILE,
    help="Keys that statements may rest on, beside the published ones.",
)


@click.command("verify")
@click.argument("file", metavar="BUNDLE", type=FILE)
@click.option("--challenge", metavar="TEXT", help="What it must have been made for.")
@click.option("--thumbprint", metavar="T", help="RFC 7638 thumbprint of a key that must be in it.")
@_anchors
@with_output_options
def verify(
    file: str,
    *,
    challenge: str | None,
    thumbprint: str | None,
    anchors: str | None,
    output: Output,
) -> int:
    """Verify a bundle that custody --bundle has written.

    Prints of each answer whether it is attested, and by which device, or claimed, or unknown. Reads
    no file but those that are named here. The exit status is 1 where anything does not hold.
    """
    from d1_signer.custody.report import utc
    from d1_signer.custody.statements import read_anchor_file
    from d1_signer.custody.verifying import check_bundle

    checked = check_bundle(
        _content(file),
        anchors=read_anchor_file(anchors),
        challenge=challenge,
        thumbprint=thumbprint,
    )
    findings = checked.all_findings
    document = {
        "holds": not findings,
        "findings": list(findings),
        "challenge": checked.challenge,
        "time": utc(checked.made_at),
        "made_by": asdict(checked.made_by),
        "keys": [_document(key) for key in checked.keys],
    }
    output.result(document, _text(checked, challenge))
    return int(bool(findings))


@click.command("diff")
@click.argument("old", metavar="OLD", type=FILE)
@click.argument("new", metavar="NEW", type=FILE)
@_anchors
@with_output_options
def diff(old: str, new: str, *, anchors: str | None, output: Output) -> int:
    """Print what has changed from one bundle to another.

    Both are verified first. The exit status is 1 where anything has changed.
    """
    from d1_signer.custody.difference import changes
    from d1_signer.custody.statements import read_anchor_file
    from d1_signer.custody.verifying import check_bundle

    trusted = read_anchor_file(anchors)
    both = []
    for file in (old, new):
        checked = check_bundle(_content(file), anchors=trusted)
        # A key that was away is a difference and not a reason to tell none.
        of_keys = (finding for key in checked.keys if key.report for finding in key.findings)
        wrong = (*checked.findings, *of_keys)
        if wrong:
            raise CustodyError(
                f"{shown_path(file)} does not hold: {' '.join(wrong)}",
                hint="Run d1-signer custody verify on it.",
            )
        both.append(checked)
    found = changes(*both)
    document = {"changes": [asdict(change) for change in found]}
    rows = [(c.key, c.what, c.before, c.after) for c in found]
    text = table(("KEY", "WHAT", "BEFORE", "AFTER"), rows) if rows else "Nothing has changed."
    output.result(document, text)
    return int(bool(found))


def _content(path: str) -> bytes:
    try:
        return read_public_file(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{shown_path(path)} cannot be read: {unreadable(error)}."
        ) from None


def _document(key: CheckedKey) -> dict[str, object]:
    from d1_signer.custody.evidence import ANSWERS

    if key.report is None:
        return {"use": key.use, "location": key.location, "findings": list(key.findings)}
    evidence = key.report.evidence
    answers = {
        name: {"answer": getattr(evidence, name), "by": by_whom(evidence, name, key.report.backend)}
        for name in ANSWERS
    }
    return {
        "use": key.use,
        "findings": list(key.findings),
        "answers": answers,
        "statements_carry_challenge": list(key.fresh),
        "report": key.report.to_dict(),
    }


def _text(checked: Checked, challenge: str | None) -> str:
    from d1_signer.custody.report import utc

    findings = checked.all_findings
    head = facts(
        {
            "Verdict": "DOES NOT HOLD" if findings else "holds",
            "Challenge": _challenge(checked, challenge),
            "Made, as it says": f"{utc(checked.made_at)} on {checked.made_by.host} by "
            f"{checked.made_by.user} (d1_signer {checked.made_by.d1_signer}, "
            f"Python {checked.made_by.python})",
        }
    )
    parts = [head, *(f"  WRONG: {printable(finding)}" for finding in findings)]
    parts += [_key_text(key) for key in checked.keys if key.report is not None]
    return "\n\n".join(parts)


def _challenge(checked: Checked, challenge: str | None) -> str:
    if checked.challenge is None:
        return "none: it may be older than it says"
    asked = "" if challenge is not None else " (give --challenge to hold it against yours)"
    return f"{checked.challenge}{asked}"


def _key_text(key: CheckedKey) -> str:
    from d1_signer.custody.report import utc

    report = key.report
    assert report is not None  # noqa: S101 (the caller looks)
    evidence = report.evidence
    rows = [
        (told, said(getattr(evidence, name)), by_whom(evidence, name, report.backend) or "nobody")
        for name, told in NAMES.items()
    ]
    head = {
        "kid": report.kid,
        "Use": USES.get(key.use, key.use),
        "Thumbprint": report.thumbprint,
        "Backend": report.plug_in or report.backend,
        "Location": evidence.location,
        "Looked at": utc(report.collected_at),
    }
    lines = [
        facts(head),
        table(("ANSWER", "", "BY WHOM"), rows),
    ]
    for one, carries in zip(evidence.attestations or (), key.fresh, strict=True):
        told = "carries the challenge itself" if carries else "does not carry the challenge"
        lines.append(f"The {one.statement.format} statement {told}.")
    return "\n\n".join([*lines, evidence_text(evidence)])

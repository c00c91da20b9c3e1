# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit`: verifying a trail, proving one record, sealing what processes left.

Further commands have modules of their own, `_audit_….py`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d1_signer.cli._audit_collect import collect
from d1_signer.cli._audit_reconcile import reconcile
from d1_signer.cli._audit_show import show
from d1_signer.cli._audit_stamp import stamp
from d1_signer.cli._config import with_config
from d1_signer.cli._help import Listing
from d1_signer.cli._output import (
    Command,
    OptionsOnly,
    Output,
    printable,
    setting,
    table,
    to_stdout,
    with_output_options,
)
from d1_signer.cli._output_file import OutputFile, with_output_file
from d1_signer.cli._paths import FILE, FOLDER, KEY_URI
from d1_signer.cli._trail import TrailSettings
from d1_signer.cli._trail_files import instances_of, notes_of, unreadable, verifier_keys
from d1_signer.errors import AuditError, ConfigurationError

if TYPE_CHECKING:
    from d1_signer.audit import verifying


def _folder(command: Command) -> Command:
    name, text = "D1_AUDIT_TRAIL", "Folder of the audit trail."
    return with_config(setting("--audit-trail", name, text, metavar="FOLDER", type=FOLDER)(command))


@click.group(cls=Listing)
def audit() -> None:
    """The audit trail: who signed what, when, and whether the list is whole.

    What verifies and shows reads its arguments alone: no settings, no network.
    """


audit.add_command(show)
audit.add_command(collect)
audit.add_command(stamp)
audit.add_command(reconcile)


@audit.command()
@click.argument("folder", nargs=-1, required=True, type=click.Path())
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="VKEY|file:PATH",
    help="The verifier key that the trail's operator told, or a file with one on each line; "
    "repeat it for several.",
)
@click.option(
    "--since",
    multiple=True,
    metavar="CHECKPOINT",
    type=FILE,
    help="File of checkpoints, or a collection, that was kept elsewhere: finds a trail that was "
    "taken back.",
)
@with_output_options
@click.pass_context
def verify(
    context: click.Context,
    *,
    folder: tuple[str, ...],
    keys: tuple[str, ...],
    since: tuple[str, ...],
    output: Output,
) -> None:
    """Verify audit trails.

    FOLDER is a trail's folder, which is searched for instances, or one instance. Nothing else is
    read than what is named here. The exit status is 0 where all is whole, 1 where something is
    found, 2 where it cannot be verified at all.
    """
    from d1_signer.audit import verifying
    from d1_signer.audit.collecting import checkpoints_of

    known = verifier_keys(keys)
    files = [notes_of(file) for file in since]
    instances = [instance for name in folder for instance in instances_of(name)]
    try:
        kept = [note for notes in files for note in checkpoints_of(notes, known)]
        with output.progress("Verifying", _size_of(instances)) as taken:
            reports = verifying.verify(instances, known, kept, taken)
    except AuditError as error:
        raise ConfigurationError(
            f"A checkpoint of --since cannot be used: {error.message}"
        ) from None
    except OSError as error:
        raise unreadable(error) from None
    findings = [finding for report in reports for finding in report.findings]
    whole = bool(reports) and not findings
    document = {
        "whole": whole,
        "unsealed": sum(report.records - report.sealed for report in reports),
        "instances": [
            {
                "instance": report.name,
                "records": report.records,
                "sealed": report.sealed,
                "checkpoints": report.checkpoints,
                "origins": report.origins,
                "unfinished": report.unfinished,
                "notes": report.notes,
                "findings": [
                    {"record": finding.record, "text": finding.text} for finding in report.findings
                ],
            }
            for report in reports
        ],
    }
    output.result(document, _told(reports, whole=whole))
    if not whole:
        context.exit(1)


def _size_of(instances: Sequence[Path]) -> int:
    """How many bytes of records there are."""
    from d1_signer.audit.folder import segments

    return sum(file.stat().st_size for instance in instances for _, file in segments(instance))


def _told(reports: Sequence[verifying.InstanceReport], *, whole: bool) -> str:
    lines: list[str] = []
    for report in reports:
        lines.append(printable(f"Instance {report.name}"))
        lines.append(
            f"  {report.records} records, {report.sealed} of them sealed by {report.checkpoints} "
            f"accepted checkpoints{_of(report.origins)}; {report.unfinished} begun without an end"
        )
        lines += (f"  note     {printable(note)}" for note in report.notes)
        for finding in report.findings:
            where = "" if finding.record is None else f"Record {finding.record}: "
            lines.append(f"  FINDING  {where}{printable(finding.text)}")
    found = sum(len(report.findings) for report in reports)
    if not reports:
        lines.append("FINDING  There is no instance of an audit trail in these folders.")
    unsealed = sum(report.records - report.sealed for report in reports)
    if not whole:
        count = f"{found} findings" if found > 1 else "1 finding"
        what_to_do = "Leave the folder as it is, keep a copy, and compare with the checkpoints that"
        lines += ["", f"Not whole: {count}. {what_to_do} were collected (--since)."]
    elif unsealed:
        who = "anybody who can write the folder"
        lines += ["", f"Nothing was found in what is sealed. {unsealed} records may be of {who}."]
    else:
        lines += ["", "Whole: no findings."]
    return "\n".join(lines)


def _of(origins: Sequence[str]) -> str:
    return f" of {printable(', '.join(origins))}" if origins else ""


@audit.command()
@click.argument("number", type=click.IntRange(min=0))
@click.argument("folder", required=False, type=click.Path())
@_folder
@with_output_file
@with_output_options
def proof(
    *,
    number: int,
    folder: str | None,
    audit_trail: str | None,
    output_file: OutputFile | None,
    output: Output,
) -> None:
    """Prove that the record NUMBER is in the trail, without showing another one.

    FOLDER is an instance, or a trail with a single one. The proof is a C2SP tlog-proof; its extra
    data is the record.
    """
    from d1_signer.audit.proving import prove

    settings = TrailSettings(folder=folder or audit_trail, origin=None, key=None)
    instances = instances_of(str(settings.required_folder()))
    if len(instances) != 1:
        names = ", ".join(printable(str(instance)) for instance in instances[:20])
        raise ConfigurationError(
            f"The audit trail has {len(instances)} instances, each with records of its own.",
            hint=f"Name one as FOLDER: {names or 'there is none'}.",
        )
    try:
        found, record = prove(instances[0], number)
    except OSError as error:
        raise unreadable(error) from None
    encoded = found.encode()
    if output_file is not None:
        output_file.write(encoded, f"the proof of record {number}", output)
    if output.json:
        document: dict[str, object] = {
            "instance": instances[0].name,
            "number": number,
            "record": record.decode(),
            "proof": encoded.decode(),
            "path": [base64.b64encode(node).decode() for node in found.path],
        }
        output.result(document, "")
    elif output_file is None:
        to_stdout(encoded)


@audit.command(cls=OptionsOnly)
@_folder
@setting(
    "--audit-origin",
    "D1_AUDIT_ORIGIN",
    "Whose audit trail it is. [default: this host's name]",
    metavar="NAME",
)
@setting(
    "--audit-key",
    "D1_AUDIT_KEY",
    "Key URI of the key that seals the audit trail.",
    metavar="URI",
    type=KEY_URI,
)
@with_output_options
def seal(
    *,
    audit_trail: str | None,
    audit_origin: str | None,
    audit_key: str | None,
    output: Output,
) -> None:
    """Seal what processes that are gone have left unsealed.

    It prints the verifier key that an auditor needs as well.
    """
    from d1_signer.audit.note import VerifierKey
    from d1_signer.audit.sealing import seal_idle

    settings = TrailSettings(folder=audit_trail, origin=audit_origin, key=audit_key)
    trail = settings.required_folder()
    signer = settings.signer()
    if signer is None:
        raise ConfigurationError(
            "No key is given that seals the audit trail.", hint="Set D1_AUDIT_KEY to its key URI."
        )
    key = VerifierKey(settings.name(), signer.public_key)
    try:
        sealed = seal_idle(trail, signer, key)
    except OSError as error:
        raise unreadable(error) from None
    rows = [
        (name, "written by a process, which seals it" if count is None else f"{count} sealed")
        for name, count in sealed.items()
    ]
    document = {"verifier_key": str(key), "sealed": sealed}
    told = f"{table(('INSTANCE', 'RECORDS'), rows)}\n\nVerifier key  {key}"
    output.result(document, told, verbatim=True)

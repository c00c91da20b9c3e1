# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit show`: records for people, for programs, or as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._output import Output, printable, to_stdout, with_output_options
from d1_signer.cli._output_file import OutputFile
from d1_signer.cli._trail_files import instances_of, moment_of, unreadable

if TYPE_CHECKING:
    from d1_signer.audit.showing import Shown

_UNVERIFIED = "Nothing of this was verified; d1-signer audit verify does that."
_AT_ONCE = 500  # lines that are written together
_FIRST = ("action", "backend", "kid", "key", "purpose", "outcome")
_NOT_SHOWN = {*_FIRST, "event", "number", "time", "references", "begin", "instance"}


@click.command()
@click.argument("folder", nargs=-1, required=True, type=click.Path())
@click.option("--kid", metavar="KID", help="Of this key alone.")
@click.option("--jti", metavar="JTI", help="Of the assertion with this jti alone.")
@click.option("--purpose", metavar="TEXT", help="Of signatures for this alone.")
@click.option("--from", "earliest", metavar="TIME", callback=moment_of, help="From then on (UTC).")
@click.option("--until", "latest", metavar="TIME", callback=moment_of, help="Before then (UTC).")
@click.option(
    "--html",
    "html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a page with a timeline to a file that is not there yet.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of --html.")
@with_output_options
def show(
    *,
    folder: tuple[str, ...],
    kid: str | None,
    jti: str | None,
    purpose: str | None,
    earliest: str | None,
    latest: str | None,
    html: Path | None,
    force: bool,
    output: Output,
) -> None:
    """Show records: all, or those that fit every filter.

    FOLDER is a trail's folder, which is searched for instances, or one instance. The end of a use
    is shown where its beginning is. With --json each record is one line of JSON.
    """
    from d1_signer.audit.showing import Filter, records
    from d1_signer.cli._audit_page import MOST_RECORDS, page

    if force and html is None:
        raise click.UsageError("--force needs --html FILE.")
    file = None if html is None else OutputFile(path=html, overwrite=force)
    if file is not None:
        file.require_free()
    wanted = Filter(
        kid=kid, jti=jti, purpose=purpose, earliest=earliest or "", latest=latest or None
    )
    instances = [instance for name in folder for instance in instances_of(name)]
    try:
        found = _readable(records(instances, wanted), output)
        if file is not None:
            shown = list(islice(found, MOST_RECORDS + 1))
            file.write(page(shown).encode(), f"{min(len(shown), MOST_RECORDS)} records", output)
        else:
            tell = to_stdout if output.json else output.line
            lines = starmap(_json if output.json else _line, found)
            while together := list(islice(lines, _AT_ONCE)):
                tell("\n".join(together))
    except OSError as error:
        raise unreadable(error) from None
    output.note(_UNVERIFIED if output.json or file is not None else f"\n{_UNVERIFIED}")


def _readable(found: Iterator[Shown], output: Output) -> Iterator[tuple[str, dict[str, Any]]]:
    unreadable_lines = 0
    for instance, members in found:
        if members is None:
            unreadable_lines += 1
        else:
            yield instance, members
    if unreadable_lines:
        output.note(f"{unreadable_lines} lines are no records and are not shown.")


def _json(instance: str, members: dict[str, Any]) -> str:
    return json.dumps({"instance": instance, "record": members})


def _line(instance: str, members: dict[str, Any]) -> str:
    from d1_signer.audit.showing import references

    words = [members.get("time"), f"{instance}#{members.get('number')}", members.get("event")]
    if "begin" in members:
        words.append(f"of {members.get('instance', instance)}#{members['begin']}")
    named = [(name, members[name]) for name in _FIRST if name in members]
    named += [(name, value) for name, value in references(members)]
    named += [(name, value) for name, value in members.items() if name not in _NOT_SHOWN]
    words += [f"{name}={value}" for name, value in named]
    return "  ".join(printable(str(word)) for word in words)

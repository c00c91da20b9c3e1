# SPDX-License-Identifier: Apache-2.0
"""`d1-signer check`: from the key to an access token, step by step."""

from __future__ import annotations

import click

from d1_signer.cli._checklist import (
    ACCESS_TOKEN,
    CERTIFICATE,
    ENDPOINT,
    STORE,
    Checklist,
    Status,
    Step,
)
from d1_signer.cli._connection import Connection, with_connection
from d1_signer.cli._opening import PKCS11_STEPS
from d1_signer.cli._output import OptionsOnly, Output, printable, with_output_options
from d1_signer.cli._settings import Issuer, Keys, with_issuer, with_keys

_STEPS = (
    *("audit-record", "audit-folder", "audit-seal"),
    *PKCS11_STEPS,
    *("signature", "custody", CERTIFICATE, ENDPOINT, ACCESS_TOKEN, STORE),
)


@click.command(cls=OptionsOnly)
@with_keys
@with_issuer
@with_connection
@click.option(
    "--warn-days",
    type=click.IntRange(min=0),
    metavar="N",
    help="Fail where the client certificate is valid for fewer days than that.",
)
@click.option(
    "--require",
    "required",
    type=click.Choice(_STEPS),
    multiple=True,
    metavar="STEP",
    help="Fail where this step does not pass, also where it is skipped or unclear; repeat it for "
    f"several. Steps: {', '.join(_STEPS)}.",
)
@with_output_options
@click.pass_context
def check(
    context: click.Context,
    keys: Keys,
    issuer: Issuer,
    connection: Connection,
    *,
    warn_days: int | None,
    required: tuple[str, ...],
    output: Output,
) -> None:
    """Check keys, TLS and D1 step by step.

    It says which steps failed and what to do. With a key alone, the key is checked; with
    any setting of D1, the client certificate, the endpoint and a token for each key as well, and
    settings that are missing then fail. The exit status is 0 only if no step failed.
    """
    from d1_signer.cli._checking import take_steps

    keys.require()
    checklist = Checklist(output, frozenset(required))
    take_steps(checklist, keys, issuer, connection, warn_days)
    failures = checklist.failures
    stopped = failures[0] if failures else None
    document = {
        "ok": stopped is None,
        "stopped_at": stopped and stopped.to_dict(),
        "steps": [step.to_dict() for step in checklist.steps],
    }
    output.result(document, f"\n{_conclusion(checklist)}")
    if stopped:
        context.exit(1)


def _is_token(step: Step) -> bool:
    return step.name == ACCESS_TOKEN and step.status is Status.OK


def _conclusion(checklist: Checklist) -> str:
    if checklist.failures:
        return _failed(checklist)
    found = [
        f"{word}: {', '.join(names)}"
        for word, status in (("unclear", Status.UNCLEAR), ("not checked", Status.SKIPPED))
        if (names := [step.name for step in checklist.steps if step.status is status])
    ]
    return f"Passed; {'; '.join(found)}." if found else "All steps passed."


def _failed(checklist: Checklist) -> str:
    names: dict[str, list[str]] = {}
    for step in checklist.failures:
        names.setdefault(step.about, []).append(step.name)
    failed = "; ".join(f"{', '.join(of)} ({printable(about)})" for about, of in names.items())
    works = [printable(step.about) for step in checklist.steps if _is_token(step)]
    return f"Failed: {failed}." + (f" A token was given: {', '.join(works)}." if works else "")

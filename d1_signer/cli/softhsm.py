# SPDX-License-Identifier: Apache-2.0
"""`d1-signer softhsm`: a throw-away token of SoftHSM, for a command or until it is removed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from d1_signer.cli._command import WithCommand, exports, stdout_descriptor
from d1_signer.cli._output import Output, with_output_options
from d1_signer.sandbox.commands import PASSED_ON, signals_held, unless_ignored
from d1_signer.sandbox.softhsm import LABEL, OBJECT, SoftHsmToken, make_token, throw_away_token


@click.command(cls=WithCommand)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Make it in this folder, which is new or empty, and leave it there; without COMMAND its "
    "exports for the shell are printed.",
)
@click.option("--label", default=LABEL, show_default=True, help="Label of the token.")
@click.option(
    "--object",
    "name",
    default=OBJECT,
    show_default=True,
    help="Label of the key in D1_SIGNER_KEY; generate-key makes it.",
)
@with_output_options
@click.pass_context
def softhsm(
    context: click.Context,
    *,
    folder: Path | None,
    label: str,
    name: str,
    command: tuple[str, ...],
    output: Output,
) -> None:
    """Run a command with a throw-away HSM (SoftHSM).

    It makes an empty token, runs COMMAND with SOFTHSM2_CONF, SOFTHSM2_MODULE and D1_SIGNER_KEY in
    its environment, removes the token, and ends with the command's exit status. Signals are passed
    on. A token of SoftHSM protects nothing: it is for trying and for tests.
    """
    if folder is None and not command:
        raise click.UsageError(
            "Give a command (-- COMMAND), or --folder DIR for a token that stays."
        )
    if not command:
        with _token(folder, label) as token:
            variables = token.variables(name)
        output.result({"variables": dict(variables)}, exports(variables), verbatim=True)
        return
    with signals_held(*unless_ignored(*PASSED_ON)) as held, _token(folder, label) as token:
        environment = {**os.environ, **token.variables(name)}
        status = held.run(command, environment, stdout=stdout_descriptor())
    context.exit(status)


def _token(folder: Path | None, label: str) -> AbstractContextManager[SoftHsmToken]:
    return throw_away_token(label) if folder is None else nullcontext(make_token(folder, label))

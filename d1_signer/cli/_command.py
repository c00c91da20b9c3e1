# SPDX-License-Identifier: Apache-2.0
"""Commands of ours that run a command of the user's: `d1-signer NAME [OPTIONS] -- COMMAND`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

import click
from click.shell_completion import CompletionItem

from d1_signer.cli._output import OptionsOnly

_DASHES = "--"
_STDOUT = 1


class WithCommand(OptionsOnly):
    """Options, and behind ``--`` a command, as the parameter ``command``; empty without ``--``."""

    options_only = "Write -- before COMMAND; else this takes options only."

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, see `click.Command`."""
        command: list[str] = []
        if _DASHES in args:
            ctx.meta[_DASHES] = True
            at = args.index(_DASHES)
            args, command = args[:at], args[at + 1 :]
            if not command and not ctx.resilient_parsing:
                ctx.fail("No COMMAND is given behind --.")
        found = super().parse_args(ctx, args)
        ctx.params["command"] = tuple(command)
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of an option, or of what stands behind ``--``, see `click.Command`."""
        if ctx.meta.get(_DASHES):
            return [CompletionItem(incomplete, type="file")]
        return super().shell_complete(ctx, incomplete)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What stands in the usage line, see `click.Command`."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


def exports(variables: Mapping[str, str]) -> str:
    """Variables as a shell reads them."""
    import shlex

    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def stdout_descriptor() -> int:
    """What a command writes its output to: ours, see `d1_signer.cli._stdout`."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no file, or closed
        return sys.stdout.fileno()
    return _STDOUT

# SPDX-License-Identifier: Apache-2.0
"""Help on a terminal: as wide as that is, and without a word that is broken at its hyphens."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from d1_signer.cli._output import require_stdout
from d1_signer.cli._tty import columns_of, is_terminal

_WIDEST = 100
_PIPED = 80
_MARGIN = 2
_MOST = 3  # what part of a line the names of options and commands have at most
_WHOLE = 1000  # characters: more than a sentence has
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"
_BLANK = "\N{NO-BREAK SPACE}"
_VARIABLE = f"env{_BLANK}var:{_BLANK}"


class _Formatter(click.HelpFormatter):
    """Keeps names of faults, steps and options whole, to be copied."""

    def write_text(self, text: str) -> None:
        """Write a paragraph, see `click.HelpFormatter`."""
        super().write_text(text.replace("-", _UNBROKEN))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write a list of definitions, see `click.HelpFormatter`."""
        whole = [
            (name, said.replace("-", _UNBROKEN).replace("env var: ", _VARIABLE))
            for name, said in rows
        ]
        super().write_dl(whole, min(col_max, self.width // _MOST), col_spacing)

    def getvalue(self) -> str:
        """All that was written, see `click.HelpFormatter`."""
        return super().getvalue().replace(_UNBROKEN, "-").replace(_BLANK, " ")


class HelpContext(click.Context):
    """A command's run, whose help fits a terminal."""

    def get_help(self) -> str:
        """The help, which click prints to standard output, see `click.Context`.

        Raises:
            StdoutError: That is closed.
        """
        require_stdout()
        return super().get_help()

    def make_formatter(self) -> click.HelpFormatter:
        """What lays out the help, see `click.Context`."""
        columns = columns_of(sys.stdout) if is_terminal(sys.stdout) else _PIPED
        return _Formatter(width=min(columns, _WIDEST) - _MARGIN)


class Listing(click.Group):
    """A group whose help tells all of what each command does, in lines."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Their list, see `click.Group`."""
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(_WHOLE)) for name, command in commands]
            )


def with_our_help(command: click.Command) -> click.Command:
    """Let a command, and those below it, show their help so."""
    command.context_class = HelpContext
    if isinstance(command, click.Group):
        for below in command.commands.values():
            with_our_help(below)
    return command

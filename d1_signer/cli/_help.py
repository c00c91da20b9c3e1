# SPDX-License-Identifier: Apache-2.0
"""Help on a terminal: as wide as that is, and without a word that is broken at its hyphens."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from d1_signer.cli._tty import columns_of, is_terminal

_WIDEST = 100
_MARGIN = 2
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"


class _Formatter(click.HelpFormatter):
    """Keeps names of faults, steps and options whole, to be copied."""

    def write_text(self, text: str) -> None:
        """Write a paragraph, see `click.HelpFormatter`."""
        super().write_text(text.replace("-", _UNBROKEN))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write a list of definitions, see `click.HelpFormatter`."""
        whole = [(name, said.replace("-", _UNBROKEN)) for name, said in rows]
        super().write_dl(whole, col_max, col_spacing)

    def getvalue(self) -> str:
        """All that was written, see `click.HelpFormatter`."""
        return super().getvalue().replace(_UNBROKEN, "-")


class HelpContext(click.Context):
    """A command's run, whose help fits a terminal."""

    def make_formatter(self) -> click.HelpFormatter:
        """What lays out the help, see `click.Context`."""
        if not is_terminal(sys.stdout):
            return super().make_formatter()
        return _Formatter(width=min(columns_of(sys.stdout), _WIDEST) - _MARGIN)


def with_our_help(command: click.Command) -> click.Command:
    """Let a command, and those below it, show their help so."""
    command.context_class = HelpContext
    if isinstance(command, click.Group):
        for below in command.commands.values():
            with_our_help(below)
    return command

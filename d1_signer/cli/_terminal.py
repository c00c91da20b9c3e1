# SPDX-License-Identifier: Apache-2.0
"""How text looks on a terminal: colours, and lines that fit its width.

A text is laid out by what all texts of the commands have in common: columns have two blanks or more
between them, the last column is the one that may be long, and the first word of a line is ours. So
a pipe gets the text as it is, and a terminal the same words.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from d1_signer.cli._tty import columns_of

# By the first word of a line: the style of that word;
_OF_WORDS = {
    "ok": "green",
    "ok:": "green",
    "unclear": "yellow",
    "Warning:": "yellow",
    "failed": "bold red",
    "Error:": "bold red",
    "FINDING": "bold red",
    "WRONG:": "bold red",
    "skipped": "dim",
}
# by how a line begins, one blank for many: the style of that line.
_OF_LINES = {
    "All steps passed.": "green",
    "Passed; ": "green",
    "Whole: ": "green",
    "Verdict holds": "green",
    "Every process has the settings of the file.": "green",
    "Failed: ": "bold red",
    "Not all can be read: ": "bold red",
    "Not as the file: ": "bold red",
    "Not whole: ": "bold red",
    "Verdict DOES NOT HOLD": "bold red",
    "NOT SHOWN TO BE: ": "bold red",
    "(code: ": "dim",
}
_SOON = 0.5  # seconds
_PART = 1 << 18  # bytes that are worth to be shown
_STEP = 4  # further in, where a column has no room
_NARROW = 4  # what part of a line the last column may have at least
_CELL = re.compile(r"\S+(?: \S+)*")
_COMMA = re.compile(r"(?<=,) ")
_NUMBER = re.compile(r"\d+\. ")


class Screen:
    """A terminal that is written to line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._columns = columns_of(stream)
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
        self._console = Console(
            file=stream,
            color_system=None if plain else "auto",
            force_terminal=True,
            width=self._columns,
            highlight=False,
            soft_wrap=True,  # lines are broken here
        )
        self._in_group = False

    def show(self, text: str, *, heading: bool = False, aside: bool = False) -> None:
        """Write lines, laid out; what is indented is a group, and groups have a line between them.

        Args:
            text: One line or several.
            heading: Whether they are headings.
            aside: Whether they are beside what a person looks for, as a log is.
        """
        for line in text.split("\n"):
            indented = line.startswith(" ")
            if self._in_group and line and not indented:
                self._console.print()
            self._in_group = indented
            word = _first_word(line)
            bold = heading or line.isupper()  # the head of a table is in capitals
            style = "bold" if bold else "dim" if aside else _style_of(line)
            for number, piece in enumerate(laid_out(line, self._columns)):
                shown = Text(piece, style=style)
                if number == 0 and not style and word in _OF_WORDS:
                    at = piece.index(word)
                    shown.stylize(_OF_WORDS[word], at, at + len(word))
                self._console.print(shown)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar that is gone in the end, unless that comes soon; see `Output.progress`."""
        # Here, since it takes time, and few commands need it.
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        task = bar.add_task(what, total=total)
        soon = time.monotonic() + _SOON
        done = shown = 0

        def advance(more: int) -> None:
            nonlocal done, shown
            done += more
            if done - shown >= _PART and time.monotonic() > soon:
                shown = done
                bar.start()  # which does nothing the next time
                bar.update(task, completed=done)

        try:
            yield advance
        finally:
            bar.stop()


def _style_of(line: str) -> str:
    told = " ".join(line.split())
    return next((style for start, style in _OF_LINES.items() if told.startswith(start)), "")


def laid_out(line: str, columns: int) -> list[str]:
    """The line as lines of at most so many columns, the further ones further in.

    No word is broken. One that is longer than a line begins at the left edge, alone: the terminal
    breaks it, and knows that it is one when it is copied.
    """
    if cell_len(line) <= columns:
        return [line]
    line = line.rstrip()
    cells = [(cell_len(line[: match.start()]), match[0]) for match in _CELL.finditer(line)]
    start, last = cells[-1]
    room = columns - start
    if len(cells) > 1 and not (
        room >= columns // _NARROW and max(map(cell_len, last.split())) <= room
    ):
        return _in_tiers(cells, columns)
    lead = line.removesuffix(last)
    word = _first_word(line)
    if len(cells) > 1:
        hang = start
    elif numbered := _NUMBER.match(line):
        hang = numbered.end()
    else:
        hang = start + (len(word) + 1 if word in _OF_WORDS and word.endswith(":") else 2)
    return _filled(last, lead, hang, columns)


def _pieces(text: str, room: int) -> list[str]:
    """What is not broken: words, and of the details of an error each name with its value."""
    if not text.startswith("(code: "):
        return text.split()
    pairs = _COMMA.split(text)
    return [word for pair in pairs for word in ([pair] if cell_len(pair) <= room else pair.split())]


def _in_tiers(cells: list[tuple[int, str]], columns: int) -> list[str]:
    """The columns that do not fit below the first ones, where they stand below each other too."""
    indent, first = cells[0]
    further = min(indent + _STEP, columns // 3)
    if len(cells) > 2 and first in _OF_WORDS:  # noqa: PLR2004 (status, name, text)
        further = cells[1][0]
    lines: list[str] = []
    moved = 0  # to the left, in this tier
    ends = [start - 2 for start, _ in cells[1:]]  # of the columns, whatever this line has in them
    ends.append(cells[-1][0] + cell_len(cells[-1][1]))
    for (start, cell), end in zip(cells, ends, strict=True):
        if end - moved <= columns and lines:
            lines[-1] += " " * (start - moved - cell_len(lines[-1])) + cell
        else:
            at = further if lines else indent
            moved = start - at
            lines += _filled(cell, " " * at, further, columns)
    return lines


def _filled(text: str, lead: str, hang: int, columns: int) -> list[str]:
    """Words in lines; `lead` stands before the first of them, blanks before the others."""
    lines = [lead]
    empty = True
    for word in _pieces(text, columns - hang):
        width = cell_len(word)
        if cell_len(lines[-1]) + (not empty) + width <= columns:
            lines[-1] += word if empty else f" {word}"
        else:
            moved = " " * max(0, min(hang, columns - width))
            if empty and not lead.strip():
                lines[-1] = moved + word
            else:
                lines.append(moved + word)
        empty = False
    return lines


def _first_word(line: str) -> str:
    """The word, empty where there is none."""
    return next(iter(line.split()), "")

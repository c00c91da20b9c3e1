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

from rich.cells import cell_len, chop_cells
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
    "Stopped at ": "bold red",
    "Not whole: ": "bold red",
    "Verdict DOES NOT HOLD": "bold red",
    "NOT SHOWN TO BE: ": "bold red",
    "(code: ": "dim",
}
_SOON = 0.5  # seconds
_PART = 1 << 18  # bytes that are worth to be shown
_STEP = 4  # further in, where a column has no room
# Where a word that is longer than a line is broken: a key URI, a URL, a path.
_PARTS = re.compile(r"[^;?&,/|=]*[;?&,/|=]+|[^;?&,/|=]+")


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

    def show(self, text: str, *, heading: bool = False) -> None:
        """Write lines, laid out; what is indented is a group, and groups have a line between them.

        Args:
            text: One line or several.
            heading: Whether they are headings.
        """
        for line in text.split("\n"):
            indented = line.startswith(" ")
            if self._in_group and line and not indented:
                self._console.print()
            self._in_group = indented
            word = _first_word(line)
            bold = heading or line.isupper()  # the head of a table is in capitals
            style = "bold" if bold else _style_of(line)
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

    No word is broken that fits in a line.
    """
    if cell_len(line) <= columns:
        return [line]
    lead, value, hang = _split(line.rstrip())
    room = columns - hang
    widest = max(map(cell_len, value.split()), default=0)
    if room >= columns // 4 and widest <= room:
        first, *others = _wrapped(value, room)
        return [lead + first, *(" " * hang + other for other in others)]
    indent = len(line) - len(line.lstrip(" "))
    further = min(indent + _STEP, columns // 3)
    head = laid_out(lead.rstrip(), columns) if lead.strip() else []
    room = columns - further
    return [*head, *(" " * further + other for other in _wrapped(value, room))]


def _split(line: str) -> tuple[str, str, int]:
    """What stands before the last column, that column, and where its further lines begin."""
    indent = len(line) - len(line.lstrip(" "))
    gap = line.rfind("  ")
    if gap > indent:
        return line[: gap + 2], line[gap + 2 :], cell_len(line[: gap + 2])
    word = _first_word(line)
    if word in _OF_WORDS and word.endswith(":"):
        hang = indent + len(word) + 1
        return line[:hang], line[hang:], hang
    return line[:indent], line[indent:], indent + 2


def _first_word(line: str) -> str:
    """The word, empty where there is none."""
    return next(iter(line.split()), "")


def _wrapped(text: str, room: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= room:
            lines[-1] += f" {word}"
        elif cell_len(word) <= room:
            lines.append(word)
        else:
            lines += _in_parts(word, room)
    return lines


def _in_parts(word: str, room: int) -> list[str]:
    """A word that is longer than a line, as lines."""
    lines = [""]
    for part in _PARTS.findall(word):
        for piece in chop_cells(part, room):
            if cell_len(lines[-1] + piece) <= room:
                lines[-1] += piece
            else:
                lines.append(piece)
    return lines

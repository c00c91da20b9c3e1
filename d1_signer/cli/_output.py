# SPDX-License-Identifier: Apache-2.0
"""What commands print: text for people or one JSON object for machines, and how failures look."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from d1_signer.cli._tty import is_terminal
from d1_signer.cli._waiting import telling_of_waits
from d1_signer.errors import D1SignerError

if TYPE_CHECKING:
    from d1_signer.cli._terminal import Screen

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
FactValue = bool | int | float | str | None

_LEVELS = (logging.ERROR, logging.INFO, logging.DEBUG)
_log = logging.getLogger("d1_signer")


class OptionsOnly(click.Command):
    """A command without arguments; what it finds is not repeated: it may be part of a secret.

    Attributes:
        options_only: What is told of an argument.
    """

    options_only = "This takes options only. Quote a value that has blanks in it."
    _help_option: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """The same object each time, so that click 8.1.7 knows where it stands in the line."""
        if self._help_option is None:
            self._help_option = super().get_help_option(ctx)
        return self._help_option

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, see `click.Command`."""
        ctx.allow_extra_args = True
        found = super().parse_args(ctx, args)
        if found:
            ctx.fail(self.options_only)
        return found


class StdoutError(Exception):
    """Standard output cannot be written, so that there is nothing more to say there."""


def to_stdout(content: str | bytes) -> None:
    """Print a text as a line, or bytes as they are.

    Raises:
        StdoutError: It cannot be written.
    """
    require_stdout()
    try:
        click.echo(content, nl=isinstance(content, str))
    except OSError as error:
        raise _told(error) from None


def require_stdout() -> None:
    """Refuse a standard output that was closed at the start, which click takes for success.

    Raises:
        StdoutError: It is such a one.
    """
    if sys.stdout is None:
        raise _told(OSError(errno.EBADF, os.strerror(errno.EBADF)))


def flush_stdout() -> None:
    """Write what is held back for standard output, which may be why writing failed before.

    Raises:
        StdoutError: It cannot be written.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise _told(error) from None


def _told(error: OSError) -> StdoutError:
    reader_left = isinstance(error, BrokenPipeError)
    return StdoutError("" if reader_left else error.strerror)


@dataclass(slots=True)
class Output:
    """How this run prints; one object for the run, filled by `with_output_options`.

    Attributes:
        json: One JSON object on standard output instead of text.
        verbosity: 0: errors only; 1: what happens, 2: in detail, on standard error.
    """

    json: bool = False
    verbosity: int = 0
    _screens: dict[int, Screen] = field(default_factory=dict, repr=False)

    def result(self, document: Mapping[str, object], text: str, *, verbatim: bool = False) -> None:
        """Print a command's result.

        Args:
            document: As one line of JSON where that is wanted.
            text: Else; laid out where it goes to a terminal.
            verbatim: Whether the text is to be copied, and so stays as it is.
        """
        if self.json:
            to_stdout(json.dumps(document))
        else:
            self.line(text, verbatim=verbatim)

    def line(self, text: str, *, heading: bool = False, verbatim: bool = False) -> None:
        """Print lines of text to standard output; see `result`."""
        screen = None if verbatim else self._screen(sys.stdout)
        if screen is None:
            to_stdout(text)
            return
        try:
            screen.show(text, heading=heading)
        except OSError as error:
            raise _told(error) from None

    def note(self, text: str, *, verbatim: bool = False, aside: bool = False) -> None:
        """Tell a person something beside the result; never on standard output.

        Args:
            text: Lines.
            verbatim: As for `result`.
            aside: Whether it is less than the other notes, as most of a log is.
        """
        with contextlib.suppress(OSError):  # it is closed or full: nothing is left to tell it to
            screen = None if verbatim else self._screen(sys.stderr)
            if screen is None:
                click.echo(text, err=True)
            else:
                screen.show(text, aside=aside)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Tell a person how much of a long work is done; on standard error, and not in a pipe.

        Args:
            what: What is done.
            total: How many bytes there are.

        Yields:
            What is told of the bytes of each part that is done.
        """
        screen = self._screen(sys.stderr)
        if screen is None:
            yield lambda _bytes: None
        else:
            with screen.progress(what, total) as advance:
                yield advance

    def waiting(self, what: str, seconds: float) -> None:
        """Tell a person what is waited for."""
        self.note(f"Waiting for {printable(what)}: {seconds:.0f} s so far.")

    def failure(self, error: D1SignerError) -> None:
        """Print why the command failed: JSON on standard output, or text on standard error."""
        if self.json:
            to_stdout(json.dumps(error.to_dict()))
            return
        self.note(f"Error: {printable(error.message)}")
        for line in explanation(error):
            self.note(f"  {line}")

    def _screen(self, stream: TextIO | None) -> Screen | None:
        """The stream as a terminal, if it is one."""
        if stream is None or not is_terminal(stream):
            return None
        number = stream.fileno()
        if number not in self._screens:
            from d1_signer.cli._terminal import Screen  # it takes time, and a pipe needs none of it

            self._screens[number] = Screen(stream)
        return self._screens[number]


def explanation(error: D1SignerError) -> list[str]:
    """What to do about an error, and what support asks for, as lines of text."""
    lines = [printable(error.hint)] if error.hint else []
    if error.retryable:
        lines.append("Trying again later may help.")
    attempt = error.details.get("attempt")
    if isinstance(attempt, int) and attempt > 1:
        lines.append(f"{attempt} attempts were made; this is what the last one met.")
    facts = {"code": error.code, **error.details}
    return [*lines, "(" + ", ".join(f"{k}: {printable(str(v))}" for k, v in facts.items()) + ")"]


def printable(text: str) -> str:
    """The text with control characters escaped: a device or a server may have chosen it."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def said(value: FactValue) -> str:
    """A value for people."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))


def facts(pairs: Mapping[str, FactValue]) -> str:
    """Names and values, one pair a line, the values below each other."""
    width = max(map(len, pairs))
    return "\n".join(f"{name:<{width}}  {said(value)}" for name, value in pairs.items())


def table(head: Sequence[str], rows: Sequence[Sequence[FactValue]]) -> str:
    """Rows below a head, in columns."""
    cells = [list(head), *([said(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def indented(text: str) -> str:
    """The text two blanks further in."""
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines())


def moment(seconds: float) -> str:
    """Seconds since the epoch as a UTC time, and how far away that is."""
    away = round(seconds - time.time())
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    if away == 0:
        return f"{text} (now)"
    return f"{text} (in {away} s)" if away >= 0 else f"{text} ({-away} s ago)"


def setting(flag: str, variable: str, help_text: str, **options: Any) -> Decorator:
    """An option that is read from an environment variable as well, which its help names."""
    return click.option(flag, envvar=variable, show_envvar=True, help=help_text, **options)


def with_output_options(command: Command) -> Command:
    """Give a command ``--json`` and ``-v``, and the run's `Output` as its ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option(
        "-v",
        "--verbose",
        count=True,
        help="Tell on standard error what happens (-vv: in detail); never a secret.",
    )
    @functools.wraps(command)
    def wrapper(*args: Any, as_json: bool, verbose: int, **options: Any) -> Any:
        output: Output = click.get_current_context().find_object(Output) or Output()
        output.json = output.json or as_json
        output.verbosity = max(output.verbosity, verbose)
        # Our own loggers only: those of an SDK may tell what ours keep to themselves.
        _log.setLevel(_LEVELS[min(output.verbosity, len(_LEVELS) - 1)])
        with contextlib.ExitStack() as stack:
            # Elsewhere than on a terminal only for who asks: a log that nobody wants is none.
            if output.verbosity or (sys.stderr is not None and sys.stderr.isatty()):
                stack.enter_context(telling_of_waits(output.waiting))
            return command(*args, output=output, **options)

    return wrapper

# SPDX-License-Identifier: Apache-2.0
"""The group of commands, and how each of them ends."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem, add_completion_class

import d1_signer
from d1_signer.cli._completion import Bash
from d1_signer.cli._help import HelpContext, with_our_help
from d1_signer.cli._output import (
    Output,
    StdoutError,
    flush_stdout,
    printable,
    to_stdout,
    with_output_options,
)
from d1_signer.cli._stdout import give_up_stdout
from d1_signer.errors import ConfigurationError, D1SignerError, InvalidInputError
from d1_signer.secret import is_full

FAILED = 1
MISUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_log = logging.getLogger("d1_signer")
add_completion_class(Bash)


# In the order in which they are listed: module, name there, what it does.
_COMMANDS = {
    "generate-key": ("keys", "generate_key", "Make a new P-256 signing key."),
    "public-key": ("keys", "public_key", "Print the public key to register at D1."),
    "csr": ("keys", "csr", "Print a certificate signing request (PKCS#10), signed by the key."),
    "custody": ("custody", "custody", "Print where each private key lives."),
    "check": ("check", "check", "Check keys, TLS and D1 step by step."),
    "token": ("tokens", "token", "Get an access token from D1."),
    "status": ("status", "status", "Ask the fleet's store how the fleet is."),
    "assertion": ("tokens", "assertion", "Sign an assertion and print what it says."),
    "audit": (
        "audit",
        "audit",
        "The audit trail: who signed what, when, and whether the list is whole.",
    ),
    "demo": ("demo", "demo", "Go the whole way on this machine: a key, a token, a call."),
    "sandbox": ("sandbox", "sandbox", "Run a sandbox of D1 on 127.0.0.1."),
    "softhsm": ("softhsm", "softhsm", "Run a command with a throw-away HSM (SoftHSM)."),
}


class UsageError(ConfigurationError):
    """The command line itself is wrong; what click finds, in the form of our errors."""

    code = "usage"


class _Late(MutableMapping[str, click.Command]):
    """The commands by name; the module of one is imported when that one is asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            module, attribute, _ = _COMMANDS[name]
            found = getattr(importlib.import_module(f"d1_signer.cli.{module}"), attribute)
            assert isinstance(found, click.Command)  # noqa: S101 (tells the type checker)
            self._loaded[name] = with_our_help(found)
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Commands(click.Group):
    """The group, which tells about its commands without importing them."""

    context_class: type[click.Context] = HelpContext

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Their names, see `click.Group`."""
        return [*_COMMANDS]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Their list in the help, see `click.Group`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, does) for name, (_, _, does) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of a command's name or of an option, see `click.Group`."""
        return [
            CompletionItem(name, help=does)
            for name, (_, _, does) in _COMMANDS.items()
            if name.startswith(incomplete)
        ] + click.Command.shell_complete(self, ctx, incomplete)


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001
    """Show it, as a callback of click."""
    if value and not context.resilient_parsing:
        to_stdout(f"d1-signer {d1_signer.__version__}")
        context.exit()


@click.group(
    cls=_Commands,
    commands=_Late(),
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    no_args_is_help=False,  # click before 8.2 would end with status 0
    invoke_without_command=True,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@with_output_options
@click.pass_context
def cli(context: click.Context, *, output: Output) -> None:
    """Access tokens for the Thales D1 API, signed by a key in its HSM or KMS.

    Settings are flags or environment variables. Secrets are neither: a PIN or a passphrase comes
    from a file (file:PATH), from an environment variable (env:NAME) or from a prompt (prompt).
    """
    if context.invoked_subcommand is None:
        if not output.json:
            told = context.command.get_help(context)  # not to standard output
            output.note(f"{told}\n\nStart with: d1-signer demo\n", verbatim=True)
        raise click.ClickException("Missing command.")


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Args:
        arguments: What stands behind the program's name.

    Returns:
        The exit status; see `d1_signer.cli.main`.
    """
    # Looked for here as well, for a line that cannot be parsed.
    output = Output(json="--json" in arguments)
    with _logging_as_notes(output), _warnings_as_notes(output):
        try:
            return _run(arguments, output)
        except StdoutError as error:
            give_up_stdout()
            if reason := str(error):  # a reader that goes away has seen what it wanted
                output.note(f"Error: Standard output cannot be written: {reason}.")
            return FAILED


def _run(arguments: Sequence[str], output: Output) -> int:
    try:
        status = cli.main(arguments, prog_name="d1-signer", standalone_mode=False, obj=output)
    except click.ClickException as error:
        if output.json:
            output.failure(UsageError(error.format_message()))
        else:
            told = io.StringIO()
            error.show(told)
            output.note(told.getvalue().rstrip("\n"))
        return MISUSED
    except click.Abort:
        return INTERRUPTED
    except D1SignerError as error:
        output.failure(error)
        return MISUSED if isinstance(error, ConfigurationError | InvalidInputError) else FAILED
    except StdoutError:
        raise
    except Exception as error:  # noqa: BLE001 (nobody gets a raw traceback)
        if isinstance(error, OSError):
            flush_stdout()  # click writes its own texts there, without us
        if isinstance(error, OSError) and is_full(error):
            _report_full_disk(error, output)
        else:
            _report_defect(error, output)
        return FAILED
    return status if isinstance(status, int) else 0


def _report_full_disk(error: OSError, output: Output) -> None:
    output.failure(
        D1SignerError(
            f"A file cannot be written: {error.strerror}.",
            hint="Make room, most likely where temporary files are (TMPDIR).",
            retryable=True,
        )
    )


def _report_defect(error: Exception, output: Output) -> None:
    # Its text is left out, and so are the values of variables: either may be a secret.
    output.failure(
        D1SignerError(
            f"Unexpected {type(error).__name__}; this is a defect of d1-signer.",
            hint="" if output.verbosity > 1 else "Run it with -vv to see where.",
        )
    )
    if output.verbosity > 1:
        output.note("".join(traceback.format_tb(error.__traceback__)), verbatim=True)


# The command tells itself why there is no token.
_OF_RENEWALS = "d1_signer.token"


class _Notes(logging.Handler):
    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, see `logging.Handler`."""
        if record.name == _OF_RENEWALS and not self._output.verbosity:
            return
        try:
            self._output.note(self.format(record), aside=record.levelno < logging.WARNING)
        except Exception:  # noqa: BLE001 (whoever logs is not stopped by it)
            self.handleError(record)


@contextlib.contextmanager
def _logging_as_notes(output: Output) -> Iterator[None]:
    handler = _Notes(output)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    level = _log.level
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


@contextlib.contextmanager
def _warnings_as_notes(output: Output) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        output.note(f"Warning: {printable(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield

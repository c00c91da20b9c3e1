# SPDX-License-Identifier: Apache-2.0
"""The group of commands, and how each of them ends."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from d1_signer.cli._output import Output, StdoutError, with_output_options
from d1_signer.cli._stdout import give_up_stdout
from d1_signer.cli.check import check
from d1_signer.cli.custody import custody
from d1_signer.cli.keys import csr, generate_key, public_key
from d1_signer.cli.sandbox import sandbox
from d1_signer.cli.tokens import assertion, token
from d1_signer.errors import ConfigurationError, D1SignerError, InvalidInputError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_log = logging.getLogger("d1_signer")


class UsageError(ConfigurationError):
    """The command line itself is wrong; what click finds, in the form of our errors."""

    code = "usage"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,  # click before 8.2 would end with status 0
)
@click.version_option(package_name="d1-signer", message="%(prog)s %(version)s")
@with_output_options
def cli(output: Output) -> None:
    """Access tokens for the Thales D1 API, signed by a key in its HSM or KMS.

    Settings are flags or environment variables. Secrets are neither: a PIN or a passphrase comes
    from a file (file:PATH), from an environment variable (env:NAME) or from a prompt (prompt).
    """


for _command in (token, assertion, public_key, csr, generate_key, check, custody, sandbox):
    cli.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Args:
        arguments: What stands behind the program's name.

    Returns:
        The exit status; see `d1_signer.cli.main`.
    """
    # Looked for here as well, for a line that cannot be parsed.
    output = Output(json="--json" in arguments)
    with _logging_to_stderr(), _warnings_as_notes(output):
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
            error.show()
        return MISUSED
    except click.Abort:
        return INTERRUPTED
    except D1SignerError as error:
        output.failure(error)
        return MISUSED if isinstance(error, ConfigurationError | InvalidInputError) else FAILED
    except StdoutError:
        raise
    except Exception as error:  # noqa: BLE001 (nobody gets a raw traceback)
        _report_defect(error, output)
        return FAILED
    return status if isinstance(status, int) else 0


def _report_defect(error: Exception, output: Output) -> None:
    # Its text is left out, and so are the values of variables: either may be a secret.
    output.failure(
        D1SignerError(
            f"Unexpected {type(error).__name__}; this is a defect of d1-signer.",
            hint="" if output.verbosity > 1 else "Run it with -vv to see where.",
        )
    )
    if output.verbosity > 1:
        output.note("".join(traceback.format_tb(error.__traceback__)))


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
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
        output.note(f"Warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield

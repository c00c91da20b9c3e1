# SPDX-License-Identifier: Apache-2.0
"""The `d1-signer` command.

`main` imports the rest late, so that a missing click is told like every other missing extra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d1_signer.cli._stdout import give_up_stderr, keep_stdout
from d1_signer.errors import MissingExtraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind the program's name; None: this process's own.

    Returns:
        The exit status: 0 success, 1 failure, 2 wrong usage or settings, 130 interrupted.
    """
    if arguments is None:  # else the process is somebody else's, and so is its standard output
        keep_stdout()
    try:
        from d1_signer.cli._app import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.stderr.write(f"Error: {MissingExtraError.of('click', 'cli')}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if arguments is not None:
        return run(arguments)
    status = run(sys.argv[1:])
    give_up_stderr()
    return status

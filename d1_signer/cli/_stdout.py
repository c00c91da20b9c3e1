# SPDX-License-Identifier: Apache-2.0
"""Standard output for the command alone.

Libraries of vendors print to it: they write to file descriptor 1, or to C's ``stdout`` above it. In
the middle of a JSON object or of a key in DER that spoils it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys

_OUT, _ERROR = 1, 2
_FIRST_FREE = 3  # where standard error is closed, its number must not become the copy's


def keep_stdout() -> None:
    """Write our own output to a copy, and let descriptor 1 lead to standard error.

    It stays so until the process has ended: C writes what it holds back at its very end. Where
    ``sys.stdout`` was replaced, it is somebody else's process after all, and nothing is done.
    """
    if sys.stdout is not sys.__stdout__:
        return
    if sys.stdout is not None:  # None: it was closed at the start, and ours goes nowhere
        copy = fcntl.fcntl(sys.stdout.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
        sys.stdout.flush()
        sys.stdout = open(  # noqa: SIM115 (for the rest of the process)
            copy,
            "w",
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            closefd=False,
        )
    with contextlib.suppress(OSError):
        os.dup2(_ERROR, _OUT)
        return
    # Standard error is closed. Descriptor 1 must not be: the next file that the library opens, a
    # token's perhaps, would get its number and its output.
    _lead_nowhere(_OUT)


def give_up_stdout() -> None:
    """Drop what could not be written, which Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no file
        _lead_nowhere(sys.stdout.fileno())


def give_up_stderr() -> None:
    """Drop what standard error does not take.

    Python would try again at its end, and the status would be 120 and not the command's.
    """
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no file
            _lead_nowhere(sys.stderr.fileno())


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    if nowhere == descriptor:  # it was free
        return
    os.dup2(nowhere, descriptor)
    os.close(nowhere)

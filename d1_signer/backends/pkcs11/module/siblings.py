# SPDX-License-Identifier: Apache-2.0
"""Children of one process that begin at once take turns.

SoftHSM's token is not to be seen in one process while another one logs in: eight children that
initialise the module and log in at the same moment keep each other out for longer than a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

_PAUSE = 0.002
_file: int | None = None


def prepare() -> None:
    """Before a fork: have a file that all children know. Its lock belongs to a process."""
    global _file  # noqa: PLW0603 (of the process and its children)
    if _file is None:
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or no more files
            _file = os.memfd_create("d1-signer-siblings")


@contextlib.contextmanager
def turn(limit: float) -> Iterator[None]:
    """Wait for a turn, until a moment on ``time.monotonic()``; then go on without one."""
    taken = _take()
    while not taken and time.monotonic() < limit:
        time.sleep(_PAUSE)
        taken = _take()
    try:
        yield
    finally:
        if taken and _file is not None:
            fcntl.lockf(_file, fcntl.LOCK_UN)


def _take() -> bool:
    if _file is None:
        return True
    try:
        fcntl.lockf(_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

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
# The descriptor, and the device and inode that it stood for when it was made. Code that closes all
# descriptors, as a daemon does, lets the number be given to another file, of which we lock nothing.
_file: tuple[int, tuple[int, int]] | None = None


def prepare() -> None:
    """Before a fork: have a file that all children know. Its lock belongs to a process."""
    global _file  # noqa: PLW0603 (of the process and its children)
    if _ours() is None:
        _file = None
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or no more files
            descriptor = os.memfd_create("d1-signer-siblings")
            _file = descriptor, _identity(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _ours() -> int | None:
    """The descriptor; None where it is no longer our file's."""
    if _file is None:
        return None
    descriptor, made = _file
    try:
        return descriptor if _identity(descriptor) == made else None
    except OSError:
        return None


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
        if taken and (descriptor := _ours()) is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)


def _take() -> bool:
    descriptor = _ours()
    if descriptor is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""The threads that used a module which has an OpenSSL library context of its own.

Such a module (opencryptoki from 3.19 on) frees its context in ``C_Finalize``. OpenSSL keeps what
belongs to a thread until the thread ends, and looks it up in the context then: every other thread
that has used the module crashes as it ends, the main thread as the process does (openssl#16778).
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

_MAKES_A_CONTEXT = b"OSSL_LIB_CTX_new"
_TASKS = Path("/proc/self/task")


class Callers:
    """Threads, by the numbers that the system gives them."""

    def __init__(self) -> None:
        self._threads: set[int] = set()

    def add(self) -> None:
        """The current thread uses the module."""
        self._threads.add(threading.get_native_id())

    def others(self) -> bool:
        """Whether another thread than this one has used it and is alive.

        The system's own list of threads: Python counts one as ended before it has run what
        libraries do at its end.
        """
        try:
            alive = {int(task.name) for task in _TASKS.iterdir()}
        except OSError:  # not Linux, or no /proc
            alive = {thread.native_id or 0 for thread in threading.enumerate()}
        self._threads &= alive
        return not self._threads <= {threading.get_native_id()}


def callers_of(function: int) -> Callers | None:
    """What counts the callers of a module that one of its functions names; None for most modules.

    A file that makes a library context has the name of OpenSSL's function in it, as an import or
    as a text for ``dlsym``.
    """
    place = (ctypes.c_void_p * 4)()  # Dl_info, whose first field is the file's name
    try:
        if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), place):
            return None
        content = Path(os.fsdecode(ctypes.string_at(place[0] or 0))).read_bytes()
    except (OSError, ValueError, AttributeError):
        return None
    return Callers() if _MAKES_A_CONTEXT in content else None

# SPDX-License-Identifier: Apache-2.0
"""What is left open when the process ends: our own sessions are closed, and nothing else is done.

A device keeps the sessions of a process that ended until it times them out, and a YubiHSM has 16.
They are closed in a thread that the process waits a second for, and not while a call is under way.
``C_Finalize`` is not called: it crashes some modules at exit, and freezes with a call that hangs.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import sys
import time
import weakref
from typing import Any, Protocol

from d1_signer.backends.pkcs11.session.handoff import Handoff
from d1_signer.errors import SignerTimeout, SignerUnavailable
from d1_signer.signing import forks

_PATIENCE = 1.0


class Leaver(Protocol):
    """Who has sessions."""

    @property
    def has_sessions(self) -> bool:
        """Whether there is anything to close."""

    def leave(self, limit: float) -> None:
        """Close them, unless a call is under way until then, a moment on ``time.monotonic()``."""


# Its threads never end (see handoff.py).
kept_threads = Handoff("d1-signer-kept")
_open: weakref.WeakSet[Leaver] = weakref.WeakSet()


def expected(leaver: Leaver) -> None:
    """From now on there may be sessions to close."""
    if not _open:
        _tell_multiprocessing()
    _open.add(leaver)
    with contextlib.suppress(SignerUnavailable):
        kept_threads.prepare()  # Python 3.12 starts no thread at exit


def _tell_multiprocessing() -> None:
    """Its children end without what `atexit` knows."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and multiprocessing.parent_process() is not None:
        util.Finalize(None, leave, exitpriority=0)


def leave() -> None:
    """Close all sessions; it takes a second at most."""
    forks.notice()
    leavers = [leaver for leaver in list(_open) if leaver.has_sessions]
    if not leavers:
        return
    limit = time.monotonic() + _PATIENCE

    def work() -> None:
        for leaver in leavers:
            leaver.leave(limit)

    with contextlib.suppress(SignerTimeout, SignerUnavailable):
        kept_threads.run(work, limit)


def _after_fork() -> None:
    kept_threads.after_fork()
    _open.clear()


forks.in_child(_after_fork)
atexit.register(leave)

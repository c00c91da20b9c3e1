# SPDX-License-Identifier: Apache-2.0
"""Telling a person what a command waits for, when it takes long."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from d1_signer.secret import being_asked
from d1_signer.signing.steps import Step

_PATIENCE = 2.0
_LOOK = 0.2


@contextlib.contextmanager
def telling_of_waits(tell: Callable[[str, float], None]) -> Iterator[None]:
    """Tell what the block waits for, after two seconds, four, eight and so on.

    Args:
        tell: Given what it is, and the seconds so far.
    """
    over = threading.Event()
    teller = threading.Thread(
        target=_tell, args=(tell, over), name="d1-signer-waiting", daemon=True
    )
    # A signal that a command waits for must not come to this thread, which does nothing about it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        teller.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(tell: Callable[[str, float], None], over: threading.Event) -> None:
    told: Step | None = None
    patience = _PATIENCE
    while not over.wait(_LOOK):
        step = Step.innermost()
        if step is None or being_asked.is_set():
            continue
        if step is not told:
            told, patience = step, _PATIENCE
        waited = time.monotonic() - step.began
        if waited >= patience:
            tell(step.what, waited)
            patience = 2 * waited

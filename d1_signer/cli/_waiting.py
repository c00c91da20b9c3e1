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
_AGAIN = 10.0  # what begins again within that is another attempt of the same, and one wait


@contextlib.contextmanager
def telling_of_waits(tell: Callable[[str, float], None]) -> Iterator[None]:
    """Tell what the block waits for, after two seconds, four, eight and so on, over all attempts.

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
    what, began, seen, patience = "", 0.0, 0.0, _PATIENCE
    while not over.wait(_LOOK):
        step, now = Step.innermost(), time.monotonic()
        if step is None or being_asked.is_set():
            continue
        if step.what != what or now - seen > _AGAIN:
            if now - step.began < _PATIENCE:
                continue
            what, began, patience = step.what, step.began, _PATIENCE
        seen = now
        if now - began >= patience:
            tell(what, now - began)
            patience = 2 * (now - began)

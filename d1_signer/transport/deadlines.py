# SPDX-License-Identifier: Apache-2.0
"""Blocking work that is left behind when its time is over."""

from __future__ import annotations

import contextvars
import errno
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from d1_signer.errors import SignerTimeout, SignerUnavailable

T = TypeVar("T")


def run_until(deadline: float, work: Callable[[], T]) -> T:
    """Do blocking work in a thread of its own and wait for it until a moment.

    Names are resolved, and SDKs look for credentials, under no time limit; so only leaving the call
    to another thread bounds it. After the deadline, its result is dropped.

    Args:
        deadline: Moment on ``time.monotonic()``.
        work: What to do, in the caller's context; its exceptions are raised here.

    Raises:
        TimeoutError: The deadline passed first.
        OSError: No thread can be started (``EAGAIN``).
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again by the waiting thread)
            errors.append(error)
        finally:
            done.set()

    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    context = contextvars.copy_context()
    try:
        threading.Thread(target=context.run, args=[run], name="d1-signer-call", daemon=True).start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread can be started, the limit is reached") from None
    if not done.wait(remaining):
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def within(deadline: float, work: Callable[[], T]) -> T:
    """`run_until` for what signs.

    Raises:
        SignerTimeout: The deadline passed first.
        SignerUnavailable: No thread can be started.
    """
    try:
        return run_until(deadline, work)
    except TimeoutError:
        raise no_time_left() from None
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        raise SignerUnavailable(
            "No thread can be started for a call with a deadline.",
            hint="The process has reached its limit of threads.",
        ) from None


def no_time_left(what: str = "The service") -> SignerTimeout:
    """The error for a deadline that has passed.

    Args:
        what: Who gave no answer.
    """
    return SignerTimeout(
        f"{what} gave no answer within the deadline.",
        hint="Check that it can be reached, or allow more time.",
    )

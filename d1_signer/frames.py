# SPDX-License-Identifier: Apache-2.0
"""What the frames of an exception show, and where it came from.

A crash reporter sends the local variables of each frame that an exception has passed through. Among
those of a call are its arguments: a key URI with a PIN in it, a URL with a password, or a secret
that was given where its source belongs.
"""

from __future__ import annotations

import functools
import signal
import traceback
from collections.abc import Callable
from types import CodeType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def without_locals(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have what the function raises show where it was raised, and no variable of what is below.

    For what takes settings from a user's code; it costs a signature too much.
    """

    @functools.wraps(function)
    def called(*args: _P.args, **options: _P.kwargs) -> _T:
        try:
            return function(*args, **options)
        except BaseException as error:
            del args, options
            clear(error)
            raise

    return called


def clear(error: BaseException) -> None:
    """Empty the frames that an exception and its chain have left; the lines stay."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += (one.__cause__, one.__context__)
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions


def of_signal_handler(error: BaseException) -> bool:
    """Whether a signal handler of Python's raised it, amid whatever ran then.

    Celery's soft time limit, gunicorn's ``worker_abort`` and Ctrl-C come so: they say nothing of
    the code that they interrupt.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _ in frames)


def _code(handler: object) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if not hasattr(handler, "__code__") and callable(handler):
        handler = getattr(type(handler).__call__, "__func__", type(handler).__call__)
    return getattr(handler, "__code__", None)

# SPDX-License-Identifier: Apache-2.0
"""What the frames of an exception show, and where it came from.

A crash reporter sends the local variables of each frame that an exception has passed through. Among
those of a call are its arguments: a key URI with a PIN in it, a URL with a password, or a secret
that was given where its source belongs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import CodeType, FrameType, TracebackType
from typing import ParamSpec, TypeVar

_GOES_ON = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_P = ParamSpec("_P")
_T = TypeVar("_T")


def without_locals(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have what the function raises show where it was raised, and no variable of what is below.

    For what takes settings from a user's code; it costs a signature too much.
    """

    @functools.wraps(function)
    def called(*args: _P.args, **options: _P.kwargs) -> _T:
        outer = sys.exception()
        try:
            return function(*args, **options)
        except BaseException as error:
            clear(error, outer=outer)
            _empty_replacing(inspect.currentframe())
            raise

    return called


def _empty_replacing(frame: FrameType | None) -> None:
    """Have ``dataclasses.replace``, which still runs, show no value that it was to put in.

    Args:
        frame: Of what it has called.
    """
    frame = frame and frame.f_back
    while frame is not None and frame.f_globals.get("__name__") in {"copy", "dataclasses"}:
        changes = frame.f_locals.get("changes")
        if isinstance(changes, dict):
            changes.clear()
        frame = frame.f_back


def causes(error: BaseException, *, outer: BaseException | None = None) -> Iterator[BaseException]:
    """The error, and what it was raised from or holds, innermost last; each once.

    Args:
        error: Where to begin.
        outer: Where to end: what was being handled before, and has nothing to do with it.
    """
    seen = {id(outer)}
    todo: list[object] = [error]
    while todo:
        link = todo.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [link.__cause__, link.__context__, *link.args]
        with contextlib.suppress(Exception):  # an attribute of somebody's may do anything
            todo.append(getattr(link, "reason", None))
        with contextlib.suppress(Exception):
            # botocore keeps it as an argument of its message.
            todo.append(getattr(link, "kwargs", {})["error"])
        if isinstance(link, BaseExceptionGroup):
            todo += link.exceptions


def clear(error: BaseException, *, outer: BaseException | None) -> None:
    """Empty the frames that an error and what it came from have left; the lines stay.

    What an error was raised in spite of (``from None``) goes: its text may be what was given.

    Frames that still run cannot be emptied and are left out: of this call, and of a thread that
    the error was brought from; those of generators and coroutines too, which may go on. ``raise``
    alone, which is to follow, does not add the one that it stands in.

    Args:
        error: Any, before it is raised again.
        outer: ``sys.exception()`` from before the call, whose traceback is the caller's.
    """
    for link in list(causes(error, outer=outer)):
        if link.__suppress_context__ and link.__cause__ is None:
            link.__context__ = None  # raised "from None": it may repeat what was given
        emptied = [entry for entry in _entries(link.__traceback__) if _emptied(entry.tb_frame)]
        for entry, following in zip(emptied, [*emptied[1:], None], strict=False):
            entry.tb_next = following
        link.__traceback__ = emptied[0] if emptied else None


def _entries(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _emptied(frame: FrameType) -> bool:
    if _has_arguments_of_handler(frame):
        return True  # by which it is known; what it interrupted is emptied
    if frame.f_code.co_flags & _GOES_ON:
        return False  # it may be waiting, and would be closed
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True


def of_signal_handler(error: BaseException) -> bool:
    """Whether a signal handler of Python's raised it, amid whatever ran then.

    Celery's soft time limit, gunicorn's ``worker_abort`` and Ctrl-C come so: they say nothing of
    the code that they interrupt. A handler is one that is set, or that has been given the frame
    that it interrupted: it may have set another one before it raised.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code in handlers or _has_arguments_of_handler(frame) for frame in frames)


def _has_arguments_of_handler(frame: FrameType) -> bool:
    """Whether it was called with a signal's number and the frame that it interrupted."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount]
    given = [frame.f_locals.get(name) for name in names]
    if code.co_flags & inspect.CO_VARARGS:
        given += frame.f_locals.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    return frame.f_back is not None and any(
        interrupted is frame.f_back and isinstance(number, int) and number in signal.valid_signals()
        for number, interrupted in pairwise(given)
    )


def _code(handler: object) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if not hasattr(handler, "__code__") and callable(handler):
        handler = getattr(type(handler).__call__, "__func__", type(handler).__call__)
    return getattr(handler, "__code__", None)

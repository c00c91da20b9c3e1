# SPDX-License-Identifier: Apache-2.0
"""Reloading at a signal, for as long as the fetcher is there and open.

A handler runs between two lines of the main thread, which may hold any lock: so it does nothing but
wake a thread up. Each number has one handler of ours, however many fetchers follow it.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import weakref
from contextlib import suppress
from types import FrameType
from typing import Literal, Protocol

from d1_signer.errors import D1SignerError, FetcherClosedError, InvalidInputError, TokenError
from d1_signer.logfmt import told
from d1_signer.signing import forks
from d1_signer.token.status import FetcherStatus

_Asked = queue.SimpleQueue[Literal["reload", "end"]]

_log = logging.getLogger("d1_signer.settings")


class _Fetcher(Protocol):
    def reload(self) -> None: ...

    def status(self) -> FetcherStatus: ...


class _Waker:
    """A thread that reloads when it is woken up, in this process and in each child of it."""

    def __init__(self, fetcher: _Fetcher, wakers: list[_Waker]) -> None:
        # Whoever follows a signal is not kept by it.
        self._fetcher = weakref.ref(fetcher, lambda _: self.end())
        self._wakers = wakers
        self._asked: _Asked = queue.SimpleQueue()  # made to be called from handlers

    def begin(self) -> None:
        """Start the thread."""
        name = "d1-signer-reload"
        try:
            threading.Thread(None, self._serve, name, (self._asked,), daemon=True).start()
        except RuntimeError:
            raise TokenError("No thread can be started for it.", retryable=True) from None
        if self not in self._wakers:
            self._wakers.append(self)

    def after_fork(self) -> None:
        """In a forked child: the parent's thread is not here, and may have held the queue."""
        self._asked = queue.SimpleQueue()
        with suppress(TokenError):  # the limit of threads; whatever else a child forgets goes on
            self.begin()

    def wake(self) -> None:
        """Have it reload; never waits."""
        self._asked.put("reload")

    def is_for(self, fetcher: _Fetcher) -> bool:
        """Whether it reloads this one."""
        return self._fetcher() is fetcher

    def end(self) -> None:
        """Be woken up no more, and end the thread."""
        with suppress(ValueError):  # it has been ended
            self._wakers.remove(self)
        self._asked.put("end")

    def _serve(self, asked: _Asked) -> None:
        while asked.get() != "end":
            while not asked.empty():  # of several signals at once the last is enough
                if asked.get() == "end":
                    return
            self._reload()

    def _reload(self) -> None:
        fetcher = self._fetcher()
        if fetcher is None:
            return
        try:
            fetcher.reload()
        except FetcherClosedError:  # it was asked to follow only then
            self.end()
        except D1SignerError as error:
            settings = fetcher.status().settings
            # What the status tells of the file stands in the log, once.
            if settings is None or settings.message != error.message:
                _failed(error.code, error)
        except Exception as error:  # noqa: BLE001 (the next signal is to find this thread)
            _failed(TokenError.code, type(error).__name__)


def _failed(code: str, message: object) -> None:
    _log.warning("settings.reload_failed %s", told({"code": code, "message": message}))


class _Handler:
    """What is called at one signal: it wakes up, and calls what handled the signal before."""

    def __init__(self, number: int) -> None:
        self.wakers: list[_Waker] = []
        self._before = signal.getsignal(number)

    def __call__(self, received: int, frame: FrameType | None) -> None:
        for waker in tuple(self.wakers):
            waker.wake()
        before = self._before
        if callable(before) and before is not signal.default_int_handler:
            before(received, frame)


_handlers: list[_Handler] = []


def reload_on(number: int, fetcher: _Fetcher) -> None:
    """Have a fetcher reload at a signal, besides what a handler that is there does at it."""
    try:
        handler = signal.getsignal(number)
        if not isinstance(handler, _Handler):
            handler = _Handler(number)
        signal.signal(number, handler)  # ours as well: it refuses what cannot be followed
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"The signal cannot be followed: {error}.",
            hint="Call it in the main thread, for a signal such as signal.SIGHUP.",
        ) from None
    if handler not in _handlers:
        _handlers.append(handler)
    if not any(waker.is_for(fetcher) for waker in handler.wakers):
        _Waker(fetcher, handler.wakers).begin()


def let_go(fetcher: _Fetcher) -> None:
    """Have a fetcher follow no signal any more."""
    for handler in _handlers:
        for waker in tuple(handler.wakers):
            if waker.is_for(fetcher):
                waker.end()


def _after_fork_in_child() -> None:
    for handler in _handlers:
        for waker in tuple(handler.wakers):
            waker.after_fork()


forks.in_child(_after_fork_in_child)

# SPDX-License-Identifier: Apache-2.0
"""What backends over a network share: a client for each process, and a bound on each call."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from d1_signer.errors import ConfigurationError, SignerTimeout, SignerUnavailable
from d1_signer.hosts import is_loopback

T = TypeVar("T")


class PerProcess(Generic[T]):
    """An object that each process makes for itself, when it first needs it.

    What a child inherits over a fork is neither used nor cleaned up there: its connections belong
    to the parent, and its threads do not exist.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Keep ``make``, which is called once in each process, by one thread at a time."""
        self._make = make
        # One lock for each: a caller's function may use another signer of ours, and one service
        # that hangs must not hold up the others.
        self._lock = threading.RLock()
        self._made: tuple[int, T] | None = None
        self._inherited: list[T] = []
        _all.add(self)

    def get(self) -> T:
        """The object of this process."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        with self._lock:
            made = self._made
            if made is not None and made[0] == os.getpid():
                return made[1]
            value = self._make()
            if made is not None:
                self._inherited.append(made[1])
            self._made = (os.getpid(), value)
            return value

    def made_here(self) -> T | None:
        """The object of this process, or None where it was not made yet."""
        made = self._made
        return made[1] if made is not None and made[0] == os.getpid() else None


_all: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


def _new_locks() -> None:
    # The parent's may have been held at the moment of the fork.
    for one in list(_all):
        one._lock = threading.RLock()  # noqa: SLF001 (this module's own class)


os.register_at_fork(after_in_child=_new_locks)


def only_in_this_process(value: T, what: str) -> Callable[[], T]:
    """Give ``value`` in this process; in a forked child, refuse to use what it inherited."""
    owner = os.getpid()

    def get() -> T:
        if os.getpid() != owner:
            raise ConfigurationError(
                f"The {what} was given as an object, and this process was forked after that.",
                hint="Give a function that makes it: it is called once in each process.",
            )
        return value

    return get


_LONGEST_WAIT_TO_FORK = 15.0  # seconds


class ForkGate:
    """Lets no process be forked while a thread is where a library does not survive it.

    Between such calls a fork is safe. gRPC: its own fork handlers give up while another thread
    calls, and then one child in ten waits for ever on a channel that it made itself. OpenSSL: one
    child in two thousand waited for ever on a lock that a handshake of its parent had held.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._reset,
        )

    def _reset(self) -> None:
        # A forked child has none of the threads that were in calls or about to fork.
        self._changed = threading.Condition()
        self._calls = 0
        self._forks = 0

    @contextlib.contextmanager
    def call(self, until: float) -> Iterator[None]:
        """A call which a fork waits for; begun after the forks that are under way.

        Args:
            until: Moment on ``time.monotonic()`` by which the call is to be over.

        Raises:
            SignerTimeout: It is not begun by then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._forks, until - time.monotonic()):
                raise no_time_left()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                if self._forks and not self._calls:
                    self._changed.notify_all()

    def _before_fork(self) -> None:
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: not self._calls, _LONGEST_WAIT_TO_FORK)

    def _after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


fork_gate = ForkGate()


def within(deadline: float, work: Callable[[], T]) -> T:
    """Do blocking work in a thread of its own and wait for it until the deadline.

    Names are resolved, and SDKs look for credentials, under no time limit; so only leaving the call
    to another thread bounds it. After the deadline, its result is dropped.

    Args:
        deadline: Moment on ``time.monotonic()``.
        work: What to do; its exceptions are raised here.

    Raises:
        SignerTimeout: The deadline passed first.
        SignerUnavailable: No thread can be started.
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
        raise no_time_left()
    try:
        threading.Thread(target=run, name="d1-signer-call", daemon=True).start()
    except RuntimeError:
        raise SignerUnavailable(
            "No thread can be started for a call with a deadline.",
            hint="The process has reached its limit of threads.",
        ) from None
    if not done.wait(remaining):
        raise no_time_left()
    if errors:
        raise errors[0]
    return results[0]


def no_time_left() -> SignerTimeout:
    """The error for a deadline that has passed."""
    return SignerTimeout(
        "The service gave no answer within the deadline.",
        hint="Check that it can be reached, or allow more time.",
    )


def check_endpoint(url: str, what: str) -> None:
    """Refuse an endpoint that is not https; plain http is for loopback addresses only.

    Raises:
        ConfigurationError: Another scheme, no host, user information, or http to another machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"The {what} is not a URL.") from None
    if parts.scheme not in {"https", "http"} or not host or "@" in parts.netloc:
        raise ConfigurationError(
            f"The {what} is not a URL of the form https://HOST[:PORT].",
            hint="Credentials never stand in it.",
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"The {what} is plain http to {host}.",
            hint="Use https; plain http is taken for a loopback address only.",
        )


def check_proxy(url: str) -> None:
    """Refuse a proxy that is not ``http://HOST:PORT``.

    Raises:
        ConfigurationError: Another form. A proxy that is itself reached by TLS would need a trust
            of its own, and credentials never stand in a URL.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        good = False
    if not good or "@" in url:
        raise ConfigurationError(
            "The proxy cannot be used.", hint="Write http://HOST:PORT, without credentials."
        )

# SPDX-License-Identifier: Apache-2.0
"""The sessions that sign: a fixed number of places, each opened when first needed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.session.session import Session
from d1_signer.errors import D1SignerError, SignerClosedError, SignerTimeout

_LONGEST_WAIT = 0.1
_SECONDS_OF_REST = 30.0  # others of the token may have given sessions back by then


class Worker:
    """One place in the pool: a session without a PIN and the key found through it.

    Attributes:
        busy: Whether somebody uses it.
        generation: The module's generation that the session belongs to; -1: there is none.
        instance: The module's instance in which a call is under way; None: there is none.
        rests_until: Moment on ``time.monotonic()``; before, the token has no session for it.
    """

    __slots__ = ("_session", "_sign", "busy", "generation", "instance", "rests_until")

    def __init__(self) -> None:
        self.busy = False
        self.generation = -1
        self.instance: int | None = None
        self.rests_until = 0.0
        self._session: Session | None = None
        self._sign: Callable[[bytes], bytes] = _unopened

    def use(
        self,
        session: Session,
        sign: Callable[[bytes], bytes],
        generation: int,
    ) -> None:
        """Take a session and what signs in it.

        Args:
            session: Closed by `drop`.
            sign: Made by `Cryptoki.signer`.
            generation: The module's.
        """
        self._session, self._sign, self.generation = session, sign, generation

    @property
    def session(self) -> Session:
        """Its session.

        Raises:
            SessionClosed: There is none.
        """
        if self._session is None:
            raise sdk.SessionClosed
        return self._session

    def sign(self, digest: bytes) -> bytes:
        """Sign with `CKM_ECDSA`: 64 bytes, r||s."""
        try:
            return self._sign(digest)
        except D1SignerError:  # the login for this signature, whose operation is still active
            self.drop(self.generation)
            raise

    def drop(self, generation: int) -> None:
        """Close the session, unless it died with an older generation of the module."""
        session, alive = self._session, self.generation == generation
        self._session, self._sign = None, _unopened
        self.generation = -1
        if session is not None and alive:
            with contextlib.suppress(sdk.PKCS11Error):  # never hides why it is dropped
                session.close()


class Pool:
    """A bounded number of workers, each used by one thread at a time; the first free one is taken.

    As at the gate (see there), an exception of a signal's handler must not keep a worker out: it is
    put back by ``worker.busy = False``, as the first thing that a ``finally`` does.
    """

    def __init__(self, size: int, patience: float) -> None:
        """Make the places.

        Args:
            size: How many.
            patience: Seconds to wait for a free one.
        """
        self._size = size
        self._patience = patience
        self.renew()

    def renew(self) -> None:
        """Begin with fresh places, whatever became of the others; for a child of a fork."""
        self._all = [Worker() for _ in range(self._size)]
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False

    def take(self, taken: list[Worker], deadline: float | None, instance: int) -> Worker:
        """Take a worker out; ``worker.busy = False`` puts it back, then `given_back` is told.

        Args:
            taken: Gets the worker, in case this call does not get as far as to return it.
            deadline: Moment on ``time.monotonic()``; None: the pool's patience alone.
            instance: The module's. A worker in a call of an older one does not come back: it is
                set aside, and another one takes its place.

        Raises:
            SignerTimeout: None was free in time.
            SignerClosedError: The pool is closed.
        """
        limit = None
        with self._lock:
            while not self._closed:
                for worker in self._all:
                    if not worker.busy and (not worker.rests_until or self._rested(worker)):
                        worker.busy = True  # nothing comes between this and the next step
                        taken.append(worker)
                        return worker
                if not self._set_aside(instance):
                    limit = limit or self._limit(deadline)
                    self._wait(limit)
        raise closed()

    def _rested(self, worker: Worker) -> bool:
        """Whether to try again to open a session: after a while, or if there is none to wait for.

        The lock is held.
        """
        if time.monotonic() < worker.rests_until and any(other.busy for other in self._all):
            return False
        worker.rests_until = 0.0
        return True

    def rest(self, worker: Worker) -> bool:
        """The token has no session for this worker: it rests, if there are others to wait for.

        So the pool learns how many sessions the token gives, and tries for more now and then.

        Returns:
            Whether there are: workers that have a session, or may be getting one.
        """
        with self._lock:
            worker.rests_until = time.monotonic() + _SECONDS_OF_REST
            return any(
                other is not worker and (other.busy or other.generation >= 0) for other in self._all
            )

    @property
    def workers(self) -> list[Worker]:
        """All of them, whoever uses them."""
        with self._lock:
            return list(self._all)

    def _limit(self, deadline: float | None) -> float:
        limit = time.monotonic() + self._patience
        return limit if deadline is None else min(limit, deadline)

    def _wait(self, limit: float) -> None:
        left = limit - time.monotonic()
        if left <= 0:
            raise SignerTimeout(
                f"None of the {self._size} PKCS#11 sessions was free in time.",
                hint="Check that the HSM answers; else raise max_sessions or session_timeout.",
                details={"busy_sessions": self._size},
            )
        # Not all of it: the notice may have been lost to an exception of a signal's handler.
        self._changed.wait(min(left, _LONGEST_WAIT))

    def _set_aside(self, instance: int) -> bool:
        found = False
        for place, worker in enumerate(self._all):
            if worker.instance is not None and worker.instance < instance:
                self._all[place] = Worker()
                found = True
        return found

    def given_back(self, worker: Worker) -> list[Worker]:
        """Tell the waiting; returns workers that nobody uses any more, for the caller to drop."""
        with self._lock:
            self._changed.notify()
            unused = [] if worker in self._all else [worker]  # it was set aside
            if self._closed:
                unused += self._unused()
            return unused

    def close(self) -> list[Worker]:
        """Close the pool; returns the workers that were free, for the caller to drop."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            return self._unused()

    def _unused(self) -> list[Worker]:
        """What is free, for one caller only."""
        unused = [worker for worker in self._all if not worker.busy]
        for worker in unused:
            worker.busy = True
        return unused

    @property
    def busy(self) -> int:
        """How many are in use, stuck ones included."""
        return sum(worker.busy for worker in self._all)


def closed() -> SignerClosedError:
    """The error for what is used after it was closed."""
    return SignerClosedError("The PKCS#11 signer is closed.", hint="Open it anew.")


def _unopened(_digest: bytes) -> bytes:
    raise sdk.SessionClosed

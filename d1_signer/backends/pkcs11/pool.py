# SPDX-License-Identifier: Apache-2.0
"""The sessions that sign: a fixed number of places, each opened when first needed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pkcs11
from pkcs11 import exceptions as sdk

from d1_signer.errors import D1SignerError, SignerClosedError, SignerTimeout


class Worker:
    """One place in the pool: a session without a PIN and the key found through it.

    Attributes:
        generation: The module's generation that the session belongs to; -1: there is none.
        instance: The module's instance in which a call is under way; None: there is none.
    """

    __slots__ = ("_session", "_sign", "generation", "instance")

    def __init__(self) -> None:
        self.generation = -1
        self.instance: int | None = None
        self._session: pkcs11.Session | None = None
        self._sign: Callable[[bytes], bytes] = _unopened

    def use(
        self,
        session: pkcs11.Session,
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
    """A bounded number of workers, each used by one thread at a time; the last used goes first."""

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
        self._free = list(self._all)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False

    def take(self, deadline: float | None, instance: int) -> Worker:
        """Take a worker out; `give` puts it back.

        Args:
            deadline: Moment on ``time.monotonic()``; None: the pool's patience alone.
            instance: The module's. A worker in a call of an older one does not come back: it is
                set aside, and another one takes its place.

        Raises:
            SignerTimeout: None was free in time.
            SignerClosedError: The pool is closed.
        """
        with self._lock:
            if not self._free and not self._closed:
                self._set_aside(instance)
            if not self._free and not self._closed:
                self._wait(deadline)
            if self._closed:
                raise closed()
            return self._free.pop()

    def _wait(self, deadline: float | None) -> None:
        limit = time.monotonic() + self._patience
        if deadline is not None:
            limit = min(limit, deadline)
        while not self._free and not self._closed:
            if not self._changed.wait(max(0.0, limit - time.monotonic())):
                raise SignerTimeout(
                    f"None of the {self._size} PKCS#11 sessions was free in time.",
                    hint="Check that the HSM answers; else raise max_sessions or session_timeout.",
                    details={"busy_sessions": self._size},
                )

    def _set_aside(self, instance: int) -> None:
        for place, worker in enumerate(self._all):
            if worker.instance is not None and worker.instance < instance:
                self._all[place] = Worker()
                self._free.append(self._all[place])

    def give(self, worker: Worker) -> bool:
        """Put a worker back; False where it has no place any more, and the caller drops it."""
        with self._lock:
            if self._closed or worker not in self._all:
                return False
            self._free.append(worker)
            self._changed.notify()
            return True

    def close(self) -> list[Worker]:
        """Close the pool; returns the workers that were free, for the caller to drop."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
            self._changed.notify_all()
            return free

    @property
    def busy(self) -> int:
        """How many are in use, stuck ones included."""
        return self._size - len(self._free)


def closed() -> SignerClosedError:
    """The error for what is used after it was closed."""
    return SignerClosedError("The PKCS#11 signer is closed.", hint="Open it anew.")


def _unopened(_digest: bytes) -> bytes:
    raise sdk.SessionClosed

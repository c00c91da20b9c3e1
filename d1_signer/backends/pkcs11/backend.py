# SPDX-License-Identifier: Apache-2.0
"""A key in a PKCS#11 token, with the module loaded into this process."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11 import keys
from d1_signer.backends.pkcs11.access import Access
from d1_signer.backends.pkcs11.failures import translated
from d1_signer.backends.pkcs11.keys import FoundKey
from d1_signer.backends.pkcs11.module import owners, siblings
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.session import at_exit
from d1_signer.backends.pkcs11.session.at_exit import kept_threads
from d1_signer.backends.pkcs11.session.forms import is_stripped, odd_form
from d1_signer.backends.pkcs11.session.handoff import Handoff
from d1_signer.backends.pkcs11.session.ladder import Ladder, SessionsAreShort
from d1_signer.backends.pkcs11.session.pin import Pin
from d1_signer.backends.pkcs11.session.pool import Pool, Worker
from d1_signer.backends.pkcs11.session.recovery import Circuit
from d1_signer.backends.pkcs11.settings import Settings
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import (
    D1SignerError,
    InvalidSignatureError,
    KeyMismatchError,
    KeyNotFoundError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import SIGNATURE_LENGTH, PublicKey
from d1_signer.signing import forks
from d1_signer.signing.backend import SignatureEncoding

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds for cleaning up, which nobody waits for
_SECONDS_TO_BEGIN = 1.0  # in a forked child, beside its siblings
_PAUSE_OF_CHILD = 0.01


class Pkcs11Backend:
    """A key in a PKCS#11 token; safe in threads and after fork."""

    name = "pkcs11"
    encoding = SignatureEncoding.RAW

    def __init__(self, settings: Settings, pin: Pin) -> None:
        """Open the key.

        Raises:
            D1SignerError: It cannot be opened; ``details["step"]`` names the step that failed.
        """
        forks.notice()
        self._settings = settings
        self._pin = pin
        self._life = threading.Lock()
        self._closed = False
        self._opening = False  # while it is, what was taken is given back by the opening itself
        self._module: Module
        self._access: Access
        self._handoff = Handoff()
        self._pool = Pool(settings.max_sessions, settings.session_timeout)
        self._circuit = Circuit(settings.uri.token_location())
        self._ladder = Ladder(self._pool, self._circuit, self._attempt, self._drop)
        self._new_in_child = False
        _all.add(self)
        deadline = self._deadline(None)
        try:
            # In a thread that never ends, in case the module turns out to want that.
            self._open_step(
                "module", lambda: kept_threads.run(lambda: self._begin(deadline), deadline)
            )
            asked = time.monotonic()
            # In the caller's own thread, and its time is not the module's: it may ask a person.
            pin.read()
            if deadline is not None:
                deadline += time.monotonic() - asked
            self._open_step("token", lambda: self._bounded(deadline, self._open))
        except BaseException:
            self.close()
            raise

    # -- the Backend protocol -----------------------------------------------------------------

    def public_key(self) -> PublicKey:
        """The public key, pinned at opening."""
        public = self._access.public
        assert public is not None  # noqa: S101 (found by _open)
        return public

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes; the answer is r||s, 64 bytes."""
        forks.notice()
        deadline = self._deadline(deadline)
        try:
            if deadline is None and not self._module.thread_bound:
                return self._sign(digest, None)
            return self._bounded(deadline, lambda: self._sign(digest, deadline))
        except D1SignerError as error:
            error.details.setdefault("token", self._settings.uri.token_location())
            raise

    def custody(self) -> Evidence:
        """Ask the token what it claims about the key."""
        return self.custody_within(None)

    def custody_within(self, deadline: float | None) -> Evidence:
        """As `custody`; see `d1_signer.signing.backend.Reopening`."""
        forks.notice()
        deadline = self._deadline(deadline)
        return self._bounded(deadline, lambda: self._served(self._access.evidence, deadline))

    @property
    def openings(self) -> int:
        """How often the key was found; see `d1_signer.signing.backend.Reopening`."""
        return self._access.openings

    def pool_use(self) -> tuple[int, int]:
        """Sessions in use, and how many there may be; see `d1_signer.signing.backend.Pooled`."""
        return self._pool.busy, self._settings.max_sessions

    def close(self) -> None:
        """Close all sessions and give the module back; calling it again does nothing.

        It returns after a second at most; if the module hangs, the rest is done when it answers.
        """
        forks.notice()
        with self._life:
            if self._closed:
                return
            self._closed = True
            opening = self._opening
        self._handoff.close()
        free = self._pool.close()
        if opening:
            return
        try:
            kept_threads.run(lambda: self._let_go(free), time.monotonic() + _PATIENCE)
        except SignerTimeout:
            _log.warning("pkcs11.close_hangs token=%s", self._settings.uri.token_location())
        except SignerUnavailable:  # no thread can be started
            self._let_go(free)

    def _let_go(self, free: list[Worker]) -> None:
        try:
            self._close_sessions(free)
        finally:
            self._module.release()

    def _close_sessions(self, workers: list[Worker]) -> None:
        with contextlib.suppress(D1SignerError):
            self._module.run(self._access.close, None, workers, revive=False)

    # -- the end of the process -----------------------------------------------------------------

    @property
    def has_sessions(self) -> bool:
        """Whether there may be any; see `at_exit`."""
        return not self._closed and (
            self._access.holds_login or any(w.generation >= 0 for w in self._pool.workers)
        )

    def leave(self, limit: float) -> None:
        """Close all sessions, unless a call is under way until the limit."""
        self._module.leave(lambda: self._access.close(self._pool.workers), limit)

    # -- signing ------------------------------------------------------------------------------

    def _deadline(self, deadline: float | None) -> float | None:
        if deadline is None and self._settings.timeout is not None:
            return time.monotonic() + self._settings.timeout
        return deadline

    def _bounded(self, deadline: float | None, work: Callable[[], T]) -> T:
        """Do it here, or with a deadline in a thread that is left behind when the call hangs.

        A module that is `Module.thread_bound` is called in other threads in any case.

        A session whose call was left behind stays out of the pool until the call returns, so that
        at most ``max_sessions`` calls can hang.
        """
        if self._module.thread_bound:
            threads = kept_threads
        elif deadline is None:
            return work()
        else:
            threads = self._handoff
        try:
            return threads.run(work, deadline)
        except SignerTimeout as error:
            error.details.setdefault("busy_sessions", self._pool.busy)
            raise

    def _sign(self, digest: bytes, deadline: float | None) -> bytes:
        signature = self._served(lambda worker: worker.sign(digest), deadline)
        if len(signature) < SIGNATURE_LENGTH and is_stripped(signature):
            # One in 128 begins with a zero, which this module leaves out: the next one does not.
            signature = self._served(lambda worker: worker.sign(digest), deadline)
        if len(signature) != SIGNATURE_LENGTH:
            raise odd_form(signature)
        return signature

    def _served(self, work: Callable[[Worker], T], deadline: float | None) -> T:
        """Give work a worker whose session is open; recover and repeat it where that helps."""
        if self._new_in_child:
            return self._begun_in_child(work, deadline)
        # It ends: each such answer sets one more worker to rest; the wait for others is bounded.
        while True:
            try:
                return self._served_once(work, deadline)
            except SessionsAreShort:
                continue

    def _begun_in_child(self, work: Callable[[Worker], T], deadline: float | None) -> T:
        """The first work in the child of a fork, in turn with its siblings, tried for a while.

        SoftHSM, while other processes log in, has no token now and then.
        """
        with siblings.turn(_within_a_second(deadline)):
            limit = _within_a_second(deadline)
            while True:
                try:
                    result = self._served_once(work, deadline)
                except SessionsAreShort:
                    continue
                except (SignerUnavailable, KeyNotFoundError) as error:
                    step = error.details.get("step")
                    if time.monotonic() >= limit or step not in {"module", "token"}:
                        self._new_in_child = False
                        raise
                else:
                    self._new_in_child = False
                    return result
                time.sleep(_PAUSE_OF_CHILD)

    def _served_once(self, work: Callable[[Worker], T], deadline: float | None) -> T:
        self._circuit.check()
        taken: list[Worker] = []
        try:
            worker = self._pool.take(taken, deadline, self._module.instance)
            failure = self._ladder.lost
            if failure is None or self._ladder.lost_in != self._module.generation:
                try:
                    result = self._attempt(worker, work, deadline)
                except sdk.PKCS11Error as error:
                    result = self._ladder.climb(self._module, worker, work, deadline, error)
            else:
                result = self._ladder.climb(self._module, worker, work, deadline, failure)
            self._circuit.closed_by_success()
            return result
        finally:
            for worker in taken:
                worker.busy = False
                for unused in self._pool.given_back(worker):
                    self._drop(unused)

    def _attempt(self, worker: Worker, work: Callable[[Worker], T], deadline: float | None) -> T:
        if worker.generation != self._module.generation:
            self._pin.read()  # outside the module: it may run the caller's code
        return self._module.run(self._in_module, deadline, worker, work)

    def _in_module(self, worker: Worker, work: Callable[[Worker], T]) -> T:
        module = self._module
        worker.instance = module.instance
        try:
            if worker.generation != module.generation:
                self._access.open(worker)
                at_exit.expected(self)
            return work(worker)
        finally:
            worker.instance = None

    def _drop(self, worker: Worker) -> None:
        def drop() -> None:
            worker.drop(self._module.generation)
            if self._closed:
                self._access.close([])  # a login that a late recovery made

        with contextlib.suppress(D1SignerError):
            self._module.run(drop, time.monotonic() + _PATIENCE, revive=False)

    # -- opening ------------------------------------------------------------------------------

    def _open_step(self, name: str, work: Callable[[], None]) -> None:
        self._opening = True
        try:
            work()
        except SignerTimeout as error:
            error.details.setdefault("step", name)
            raise

    def _begin(self, deadline: float | None) -> None:
        settings = self._settings
        self._module = owners.acquire(
            settings.module_path,
            locking=settings.locking,
            reserved=settings.init_reserved,
            deadline=deadline,
        )
        self._access = Access(self._module, settings, self._pin)
        self._step_ended()

    def _step_ended(self) -> None:
        """Give all back if nobody waits for a step of the opening any more."""
        with self._life:
            self._opening, late = False, self._closed
        if late:
            self._let_go([])

    def _open(self) -> None:
        """Take every step once, so that a wrong setting shows at opening."""
        try:
            self._prove(self._opened())
        except sdk.PKCS11Error as failure:
            raise translated(failure, step="key") from None
        finally:
            self._step_ended()

    def _prove(self, found: FoundKey) -> None:
        digest = keys.digest_to_prove()
        signature = self._sign(digest, None)
        for public in found.publics:
            with contextlib.suppress(InvalidSignatureError):
                public.verify_digest(signature, digest)
                self._access.public = public
                self._access.proven = True
                return
        raise KeyMismatchError(
            "The private key does not fit its public key: "
            f"{self._settings.uri.location(found.id)}.",
            hint="Store the right public key or certificate under the private key's id.",
            details={"step": "signature"},
        )

    def _opened(self) -> FoundKey:
        limit = time.monotonic() + (_SECONDS_TO_BEGIN if forks.is_child() else 0.0)
        while True:
            try:
                self._module.run(self._access.token, None)
                break
            except (KeyNotFoundError, sdk.GeneralError):
                # A SoftHSM module that starts while another process logs in may miss its tokens.
                if not self._module.kept:
                    self._module.reinitialize(self._module.generation, None)
            if time.monotonic() >= limit:
                break
            time.sleep(_PAUSE_OF_CHILD)
        try:
            return self._module.run(self._access.find, None)
        except sdk.UserAlreadyLoggedIn:  # and no key is to be seen
            if not self._module.kept:
                self._module.reinitialize(self._module.generation, None)
        return self._module.run(self._access.find, None)

    # -- forks --------------------------------------------------------------------------------

    def renew_in_child(self) -> None:
        """Forget everything inherited; the first signature opens it anew."""
        self._handoff.after_fork()
        self._life = threading.Lock()
        if hasattr(self, "_access"):
            self._access.forget()
        self._new_in_child = True
        self._circuit.renew()
        if not self._closed:
            self._pool.renew()

    def __repr__(self) -> str:
        return f"<Pkcs11Backend {self._settings.uri.location()}>"


def _within_a_second(deadline: float | None) -> float:
    limit = time.monotonic() + _SECONDS_TO_BEGIN
    return limit if deadline is None else min(limit, deadline)


_all: weakref.WeakSet[Pkcs11Backend] = weakref.WeakSet()


def _renew_all() -> None:
    for backend in list(_all):
        backend.renew_in_child()


forks.in_child(_renew_all)

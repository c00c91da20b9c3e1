# SPDX-License-Identifier: Apache-2.0
"""A key in a PKCS#11 token, with the module loaded into this process."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11 import claims, keys
from d1_signer.backends.pkcs11.failures import Recovery, recovery_for, told, translated
from d1_signer.backends.pkcs11.keys import FoundKey
from d1_signer.backends.pkcs11.module import forks
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.module.token import Token
from d1_signer.backends.pkcs11.session.forms import is_stripped, odd_form
from d1_signer.backends.pkcs11.session.handoff import Handoff
from d1_signer.backends.pkcs11.session.login import CKU_USER, Login
from d1_signer.backends.pkcs11.session.pin import Pin
from d1_signer.backends.pkcs11.session.pool import Pool, Worker
from d1_signer.backends.pkcs11.session.recovery import Circuit
from d1_signer.backends.pkcs11.session.session import Session, session_on
from d1_signer.backends.pkcs11.tokens import find_token
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
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
from d1_signer.signing.backend import SignatureEncoding

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds for cleaning up, which nobody waits for


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a backend is opened with; see `d1_signer.backends.pkcs11.open_backend`."""

    uri: Pkcs11Uri
    module_path: str
    max_sessions: int = 4
    session_timeout: float = 10.0
    timeout: float | None = None
    user_type: int = CKU_USER
    locking: str = "auto"
    pin_pad: bool = False
    public_key: PublicKey | None = None
    init_reserved: str | None = None


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
        self._token: Token | None = None
        self._token_generation = -1
        self._login: Login | None = None
        self._pinned: PublicKey | None = settings.public_key
        self._proven = False
        self._handoff = Handoff()
        self._pool = Pool(settings.max_sessions, settings.session_timeout)
        # A generation in which a repeated call failed: the next one begins with a new one.
        self._lost: tuple[int, sdk.PKCS11Error] | None = None
        self._circuit = Circuit(settings.uri.token_location())
        _all.add(self)
        deadline = self._deadline(None)
        try:
            self._open_step("module", lambda: self._begin(deadline), deadline)
            asked = time.monotonic()
            # In the caller's own thread, and its time is not the module's: it may ask a person.
            pin.read()
            if deadline is not None:
                deadline += time.monotonic() - asked
            self._open_step("token", self._open, deadline)
        except BaseException:
            self.close()
            raise

    # -- the Backend protocol -----------------------------------------------------------------

    def public_key(self) -> PublicKey:
        """The public key, pinned at opening."""
        assert self._pinned is not None  # noqa: S101 (set by _open)
        return self._pinned

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes; the answer is r||s, 64 bytes."""
        forks.notice()
        deadline = self._deadline(deadline)
        if deadline is None:
            return self._sign(digest, None)
        return self._bounded(deadline, lambda: self._sign(digest, deadline))

    def custody(self) -> Evidence:
        """Ask the token what it claims about the key."""
        forks.notice()
        deadline = self._deadline(None)
        return self._bounded(deadline, lambda: self._served(self._ask, deadline))

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
            _closing.run(lambda: self._let_go(free), time.monotonic() + _PATIENCE)
        except SignerTimeout:
            _log.warning("pkcs11.close_hangs token=%s", self._settings.uri.token_location())
        except SignerUnavailable:  # no thread can be started
            self._let_go(free)

    def _let_go(self, free: list[Worker]) -> None:
        try:
            with contextlib.suppress(D1SignerError):
                self._module.run(self._close_sessions, None, free, revive=False)
        finally:
            self._module.release()

    def _close_sessions(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.drop(self._module.generation)
        with self._life:
            login, self._login = self._login, None
        if login is not None and self._token_generation == self._module.generation:
            login.release()

    # -- signing ------------------------------------------------------------------------------

    def _deadline(self, deadline: float | None) -> float | None:
        if deadline is None and self._settings.timeout is not None:
            return time.monotonic() + self._settings.timeout
        return deadline

    def _bounded(self, deadline: float | None, work: Callable[[], T]) -> T:
        """Do it here, or with a deadline in a thread that is left behind when the call hangs.

        A session whose call was left behind stays out of the pool until the call returns, so that
        at most ``max_sessions`` calls can hang.
        """
        if deadline is None:
            return work()
        try:
            return self._handoff.run(work, deadline)
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
        """Give work a worker whose session is open; recover and repeat it once where that helps."""
        self._circuit.check()
        taken: list[Worker] = []
        try:
            worker = self._pool.take(taken, deadline, self._module.instance)
            lost = self._lost
            if lost is not None and lost[0] == self._module.generation:
                result = self._recovered(worker, work, deadline, lost[1])
            else:
                try:
                    result = self._attempt(worker, work, deadline)
                except sdk.PKCS11Error as failure:
                    result = self._recovered(worker, work, deadline, failure)
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
                self._open_worker(worker)
            return work(worker)
        finally:
            worker.instance = None

    def _recovered(
        self,
        worker: Worker,
        work: Callable[[Worker], T],
        deadline: float | None,
        failure: sdk.PKCS11Error,
    ) -> T:
        """Make anew what a failure asks for, as little as suffices, and repeat the work once.

        The first level renews the session, and on the way the login and the key; the second one
        the module's initialisation. What fails while it is being made anew takes the next level; a
        failure of the repeated work itself does not.
        """
        level = recovery_for(failure)
        if level is Recovery.NONE:
            self._drop(worker)  # an operation may still be active in it
            raise translated(failure, step="signature") from None
        seen = self._module.generation if worker.generation < 0 else worker.generation
        step = "signature"
        for current in range(level, Recovery.MODULE + 1):
            _log.debug("pkcs11.recovering level=%d after=%s", current, told(failure))
            step = "token"
            try:
                if current == Recovery.MODULE:
                    self._reinitialize(seen, deadline)
                else:
                    self._drop(worker)
                self._attempt(worker, lambda _: None, deadline)
                step = "signature"
                return self._attempt(worker, work, deadline)
            except sdk.PKCS11Error as again:
                failure = again
                if step == "signature" or recovery_for(again) is Recovery.NONE:
                    break
        self._drop(worker)
        raise self._away(failure, step)

    def _reinitialize(self, seen: int, deadline: float | None) -> None:
        try:
            self._module.reinitialize(seen, deadline)
        except SignerUnavailable as error:
            self._circuit.opened_by(error)
            raise

    def _away(self, failure: sdk.PKCS11Error, step: str) -> D1SignerError:
        if recovery_for(failure) is Recovery.MODULE:
            self._lost = (self._module.generation, failure.with_traceback(None))
        error = translated(failure, step=step)
        if isinstance(error, SignerUnavailable):
            self._circuit.opened_by(error)
        return error

    def _drop(self, worker: Worker) -> None:
        def drop() -> None:
            worker.drop(self._module.generation)
            if self._closed:
                self._close_sessions([])  # a login that a late recovery made

        with contextlib.suppress(D1SignerError):
            self._module.run(drop, time.monotonic() + _PATIENCE, revive=False)

    # -- opening ------------------------------------------------------------------------------

    def _open_step(self, name: str, work: Callable[[], None], deadline: float | None) -> None:
        self._opening = True
        try:
            self._bounded(deadline, work)
        except SignerTimeout as error:
            error.details.setdefault("step", name)
            raise

    def _begin(self, deadline: float | None) -> None:
        settings = self._settings
        self._module = Module.acquire(
            settings.module_path,
            locking=settings.locking,
            reserved=settings.init_reserved,
            deadline=deadline,
        )
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
                self._pinned = public
                self._proven = True
                return
        raise KeyMismatchError(
            "The private key does not fit its public key: "
            f"{self._settings.uri.location(found.id)}.",
            hint="Store the right public key or certificate under the private key's id.",
            details={"step": "signature"},
        )

    def _opened(self) -> FoundKey:
        try:
            self._module.run(self._current_token, None)
        except (KeyNotFoundError, sdk.GeneralError):
            # A SoftHSM module that starts while another process logs in may miss its tokens.
            self._module.reinitialize(self._module.generation, None)
        return self._module.run(self._look, None)

    def _look(self) -> FoundKey:
        token = self._current_token()
        self._ensure_login(token)
        with session_on(token) as session:
            return self._key(session)

    def _key(self, session: Session) -> FoundKey:
        try:
            return keys.find_key(session, self._settings.uri, self._pinned)
        except KeyNotFoundError:
            if self._login is not None and self._login.disputed is not None:
                raise self._login.disputed from None
            raise

    def _open_worker(self, worker: Worker) -> None:
        """Open a session and find the key through it; inside the module."""
        generation = self._module.generation
        worker.drop(generation)
        token = self._current_token()
        self._ensure_login(token)
        session = Session(token)
        try:
            found = self._key(session)
        except BaseException:
            with contextlib.suppress(sdk.PKCS11Error):
                session.close()
            raise
        log_in = self._login_for_each(session) if found.always_authenticate else None
        sign = self._module.cryptoki.signer(session.handle, found.private, log_in)
        worker.use(session, sign, generation)

    def _login_for_each(self, session: Session) -> Callable[[], None] | None:
        if self._login is None or (self._pin.kept is None and not self._settings.pin_pad):
            return None
        return self._login.for_each(session, self._pin, pin_pad=self._settings.pin_pad)

    def _current_token(self) -> Token:
        """The token, looked up once in each generation: slot numbers move."""
        generation = self._module.generation
        if self._token is None or self._token_generation != generation:
            self._token = self._find_token()
            self._login = None
            self._token_generation = generation
        return self._token

    def _find_token(self) -> Token:
        try:
            return find_token(self._module.cryptoki, self._settings.uri)
        except KeyNotFoundError:
            if not self._proven:
                raise
        raise sdk.TokenNotPresent  # it was there: it is away, and may come back

    def _ensure_login(self, token: Token) -> None:
        login = self._login
        if login is None:
            login = Login.shared(self._module, token, self._settings.user_type)
            try:
                login.ensure(self._pin.kept, pin_pad=self._settings.pin_pad, known=False)
            except BaseException:
                login.release()
                raise
            self._login = login
        else:
            login.ensure(self._pin.kept, pin_pad=self._settings.pin_pad, known=True)

    def _ask(self, _: Worker) -> Evidence:
        token = self._current_token()
        with session_on(token) as session:
            return claims.evidence(self._module, session, self._key(session), self._settings.uri)

    # -- forks --------------------------------------------------------------------------------

    def renew_in_child(self) -> None:
        """Forget everything inherited; the first signature opens it anew."""
        self._handoff.after_fork()
        self._life = threading.Lock()
        self._token = None
        self._login = None
        self._circuit.renew()
        if not self._closed:
            self._pool.renew()

    def __repr__(self) -> str:
        return f"<Pkcs11Backend {self._settings.uri.location()}>"


_all: weakref.WeakSet[Pkcs11Backend] = weakref.WeakSet()


# Its thread is kept for all that are closed; see handoff.py.
_closing = Handoff()


def _renew_all() -> None:
    _closing.after_fork()
    for backend in list(_all):
        backend.renew_in_child()


forks.in_child(_renew_all)

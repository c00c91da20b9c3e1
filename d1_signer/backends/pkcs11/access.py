# SPDX-License-Identifier: Apache-2.0
"""The way to a key: its token, the login, sessions through which it is found.

All of it belongs to one generation of the module and is made anew in the next one. Everything here
is called inside the module (`Module.run`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11 import claims, keys
from d1_signer.backends.pkcs11.keys import FoundKey
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.module.token import Token
from d1_signer.backends.pkcs11.returns import Ckr, error_of
from d1_signer.backends.pkcs11.session.login import Login
from d1_signer.backends.pkcs11.session.pin import Pin
from d1_signer.backends.pkcs11.session.pool import Worker
from d1_signer.backends.pkcs11.session.session import Session, session_on
from d1_signer.backends.pkcs11.settings import Settings
from d1_signer.backends.pkcs11.tokens import find_token
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import KeyNotFoundError
from d1_signer.es256 import PublicKey
from d1_signer.signing.steps import Step


class Access:
    """One backend's way to its key.

    Attributes:
        public: The public key, given or pinned by the first signature.
        proven: Whether the key has signed: a token that is not there now was there before.
        openings: How often the key was found for a session that signs.
    """

    def __init__(self, module: Module, settings: Settings, pin: Pin) -> None:
        self._module = module
        self._settings = settings
        self._pin = pin
        self.public: PublicKey | None = settings.public_key
        self.proven = False
        self.openings = 0
        self._count = itertools.count(1)
        self._generation = -1
        self.forget()

    def forget(self) -> None:
        """In the child of a fork: the parent's token and login are not this process's."""
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._login: Login | None = None

    def token(self) -> Token:
        """The token, looked up once in each generation: slot numbers move."""
        generation = self._module.generation
        if self._token is None or self._generation != generation:
            self._token = self._find_token()
            self._login = None
            self._generation = generation
        return self._token

    def _find_token(self) -> Token:
        try:
            return find_token(self._module.cryptoki, self._settings.uri)
        except KeyNotFoundError:
            if not self.proven:
                raise
        raise sdk.TokenNotPresent  # it was there: it is away, and may come back

    @property
    def holds_login(self) -> bool:
        """Whether there is a session that holds the login."""
        return self._login is not None

    def _ensure_login(self, token: Token) -> None:
        login = self._login
        if login is None:
            login = Login.shared(self._module, token, self._settings.user_type)
            try:
                with Step(f"the login at token {token.label!r}, slot {token.slot_id}"):
                    login.ensure(self._pin.kept, pin_pad=self._settings.pin_pad, known=False)
            except BaseException:
                login.release()
                raise
            self._login = login
        else:
            login.ensure(self._pin.kept, pin_pad=self._settings.pin_pad, known=True)

    def find(self) -> FoundKey:
        """Log in and find the key, in a session for that alone."""
        token = self.token()
        self._ensure_login(token)
        with session_on(token) as session:
            return self._found(session)

    def _found(self, session: Session) -> FoundKey:
        try:
            return keys.find_key(session, self._settings.uri, self.public)
        except KeyNotFoundError:
            if self._login is not None and self._login.disputed:
                raise error_of(Ckr.USER_ALREADY_LOGGED_IN, "C_Login") from None
            raise

    def open(self, worker: Worker) -> None:
        """Open a session for a worker and find the key through it."""
        generation = self._module.generation
        worker.drop(generation)
        token = self.token()
        self._ensure_login(token)
        session = Session(token)
        try:
            found = self._found(session)
        except BaseException:
            with contextlib.suppress(sdk.PKCS11Error):
                session.close()
            raise
        log_in = self._login_for_each(session) if found.always_authenticate else None
        sign = self._module.cryptoki.signer(session.handle, found.private, log_in)
        self.openings = next(self._count)  # two threads at once: another number all the same
        worker.use(session, sign, generation)

    def _login_for_each(self, session: Session) -> Callable[[], None] | None:
        if self._login is None or (self._pin.kept is None and not self._settings.pin_pad):
            return None
        return self._login.for_each(session, self._pin, pin_pad=self._settings.pin_pad)

    def evidence(self, worker: Worker) -> Evidence:
        """What the token claims about the key, asked in the worker's session."""
        session = worker.session
        return claims.evidence(self._module, session, self._found(session), self._settings.uri)

    def close(self, workers: list[Worker]) -> None:
        """Close the workers' sessions, and the login's where nobody else uses it."""
        for worker in workers:
            worker.drop(self._module.generation)
        with self._lock:
            login, self._login = self._login, None
        if login is not None and self._generation == self._module.generation:
            login.release()

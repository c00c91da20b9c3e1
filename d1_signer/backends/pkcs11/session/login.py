# SPDX-License-Identifier: Apache-2.0
"""Logging in: once for each token and user type, never again with a PIN that was refused.

The login belongs to the token, not to a session: it ends when the application's last session is
closed. So one session, which nobody signs with, holds it, shared by all signers on the token and
closed last; `C_Logout` is never called, since other code in the process may rely on the login.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import threading
from collections.abc import Callable

from pkcs11 import TokenFlag, exceptions as sdk

from d1_signer.backends.pkcs11.failures import (
    Recovery,
    answer_of,
    recovery_for,
    told,
    translated,
)
from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki, shown
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.module.token import Token
from d1_signer.backends.pkcs11.returns import Ckr, code_of, error_of
from d1_signer.backends.pkcs11.session.pin import Pin, refused
from d1_signer.backends.pkcs11.session.session import Session
from d1_signer.errors import LoginError
from d1_signer.secret import Secret
from d1_signer.signing import forks

_log = logging.getLogger(__name__)

CKU_USER = 1
_CKU_CONTEXT_SPECIFIC = 2

_REFUSALS = {
    Ckr.PIN_INCORRECT,
    Ckr.PIN_INVALID,
    Ckr.PIN_LEN_RANGE,
    Ckr.PIN_LOCKED,
    Ckr.PIN_EXPIRED,
    Ckr.PIN_TOO_WEAK,
    Ckr.NEW_PIN_MODE,
    Ckr.NEXT_OTP,
}
# Answers that say why the PIN was not looked at. After any other one it may have been counted as a
# wrong try, whatever the answer's name says.
_SESSION_LOST = {Ckr.SESSION_HANDLE_INVALID, Ckr.SESSION_CLOSED}
_DEVICE_LOST = {
    Ckr.CRYPTOKI_NOT_INITIALIZED,
    Ckr.DEVICE_ERROR,
    Ckr.DEVICE_REMOVED,
    Ckr.SLOT_ID_INVALID,
    Ckr.TOKEN_NOT_PRESENT,
    Ckr.TOKEN_NOT_RECOGNIZED,
}
_NOT_NOW = {
    Ckr.CANCEL,
    Ckr.FUNCTION_CANCELED,
    Ckr.FUNCTION_NOT_SUPPORTED,
    Ckr.SESSION_READ_ONLY_EXISTS,
    Ckr.SESSION_READ_WRITE_SO_EXISTS,
    Ckr.USER_ALREADY_LOGGED_IN,
    Ckr.USER_ANOTHER_ALREADY_LOGGED_IN,
    Ckr.USER_PIN_NOT_INITIALIZED,
    Ckr.USER_TOO_MANY_TYPES,
    Ckr.USER_TYPE_INVALID,
}
# What a token answers that has no login, and does not ask for one (no CKF_LOGIN_REQUIRED).
_NO_LOGIN = {Ckr.FUNCTION_NOT_SUPPORTED, Ckr.USER_PIN_NOT_INITIALIZED, Ckr.USER_TYPE_INVALID}
# By the first of these, the token has counted a wrong PIN since the last right one (section 3.2).
_COUNTED = TokenFlag.USER_PIN_COUNT_LOW | TokenFlag.USER_PIN_FINAL_TRY | TokenFlag.USER_PIN_LOCKED


# The generation of its module in which a device was lost at the login with a PIN, and the answer.
# It is tried again after the module was initialised anew, and not before.
_lost: dict[tuple[str, bytes], tuple[int, int]] = {}

# In the child of a fork, PINs that the parent's logins took: each is sent once more after an answer
# that says nothing. Siblings that begin at once get such answers of SoftHSM to the right PIN.
_taken_by_parent: set[bytes] = set()
_SAYS_NOTHING = {Ckr.FUNCTION_FAILED, Ckr.GENERAL_ERROR}


def _after_fork() -> None:
    _taken_by_parent.update(refused.begun_in_child())


forks.in_child(_after_fork)

# Around the sending of a PIN; left by an exception where the token did not take it. For a process
# of ours that may end in between, so that another one knows.
witness: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


class Login:
    """The login of one user type on one token, in one generation of its module."""

    def __init__(self, module: Module, token: Token, user_type: int) -> None:
        self._module = module
        self._token = token
        self._user_type = user_type
        self._lock = threading.Lock()
        self._holder: Session | None = None
        self._digest: bytes | None = None
        self._users = 0
        # The token said that the user is logged in, where its session says that nobody is.
        self.disputed = False

    @classmethod
    def shared(cls, module: Module, token: Token, user_type: int) -> Login:
        """The login that all signers on the token share; `release` gives it back."""
        key = (token.slot_id, user_type)
        fresh = cls(module, token, user_type)
        login: Login = module.logins.setdefault(key, fresh)
        login.share()
        return login

    def share(self) -> None:
        """Count one more user."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Give it back; the last user's leaving closes the session, and so ends the login."""
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            holder, self._holder = self._holder, None
            key = (self._token.slot_id, self._user_type)
            if self._module.logins.get(key) is self:
                del self._module.logins[key]
        if holder is not None:
            with contextlib.suppress(sdk.PKCS11Error):
                holder.close()

    def ensure(self, pin: Secret | None, *, pin_pad: bool, known: bool) -> None:
        """See to it that the token has its user logged in.

        Args:
            pin: The PIN; None where there is none.
            pin_pad: The token asks for the PIN by itself (protected authentication path).
            known: The caller passed here before, in this generation.

        Raises:
            LoginError: Refused, or not tried: the PIN was refused before, differs from the one in
                use, or the token flags that a further refusal would lock it.
            pkcs11.PKCS11Error: The token does not work.
        """
        with self._lock:
            if not self._still_in():
                self._log_in(pin, pin_pad=pin_pad)
            elif not known and self._digest is not None and not self._same(pin):
                raise _login_error(
                    "The token is logged in with another PIN.",
                    "Give all signers on one token the same PIN.",
                )
            elif not known:
                self._accept(pin)

    def _still_in(self) -> bool:
        """Whether the holder lives and its token is logged in; drops a dead one."""
        if self._holder is None:
            self._holder = Session(self._token)
        try:
            return self._module.cryptoki.logged_in(self._holder.handle)
        except (sdk.SessionHandleInvalid, sdk.SessionClosed):
            self._holder = None
            self._holder = Session(self._token)
            return self._module.cryptoki.logged_in(self._holder.handle)
        except sdk.FunctionNotSupported:
            return self._digest is not None  # then our own login is all that is known

    def _says_nobody(self, session: int) -> bool:
        try:
            return not self._module.cryptoki.logged_in(session)
        except sdk.FunctionNotSupported:
            return False

    def _accept(self, pin: Secret | None) -> None:
        """The token is logged in already, by us or by other code in this process."""
        if self._digest is None and pin is not None:
            _log.warning("pkcs11.logged_in_by_others: the PIN was not checked by the token")
            self._digest = refused.digest(self._name, pin)

    def _log_in(self, pin: Secret | None, *, pin_pad: bool) -> None:
        flags = self._token.flags_now()
        required = bool(flags & TokenFlag.LOGIN_REQUIRED)
        if pin is None and not pin_pad:
            if required:
                raise translated(sdk.UserNotLoggedIn(), step="login")
            return
        if pin_pad and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise _login_error(
                "The token has no protected authentication path.",
                "Leave protected_authentication_path out and name a pin_source.",
            )
        assert self._holder is not None  # noqa: S101 (_still_in saw to it)
        number = self._holder.handle
        try:
            self._send(self._module.cryptoki, number, self._user_type, pin, required=required)
        except sdk.UserAlreadyLoggedIn:
            # Between our question and our try; or the token's word against its session's.
            if self._digest is None and self._says_nobody(number):
                self.disputed = True
            self._accept(pin)
        else:
            self._digest = None if pin is None else refused.digest(self._name, pin)

    def for_each(self, session: Session, pin: Pin, *, pin_pad: bool) -> Callable[[], None]:
        """What logs in for one signature (``CKA_ALWAYS_AUTHENTICATE``), as carefully as `ensure`.

        It is called between ``C_SignInit`` and ``C_Sign``, and raises what `ensure` does.
        """
        cryptoki, number = self._module.cryptoki, session.handle

        def log_in() -> None:
            # The lock: of several threads with a PIN that is wrong by now, one is refused.
            with self._lock:
                self._send(cryptoki, number, _CKU_CONTEXT_SPECIFIC, None if pin_pad else pin.kept)

        return log_in

    def _send(
        self,
        cryptoki: Cryptoki,
        session: int,
        user_type: int,
        pin: Secret | None,
        *,
        required: bool = True,
    ) -> None:
        """Send the PIN, unless it failed before or might lock the token; remember if it fails."""
        digest = None if pin is None else refused.digest(self._name, pin)
        _check_may_try(self._token.flags_now(), known_bad=digest is not None and digest in refused)
        generation = self._module.generation
        if digest is not None:
            lost_in, loss = _lost.get((self._module.path, digest), (None, None))
            if loss is not None and lost_in == generation:
                raise error_of(loss, "C_Login")
        witnessed = contextlib.nullcontext if digest is None else witness
        while True:
            try:
                with witnessed():
                    cryptoki.login(session, user_type, pin)
            except sdk.PKCS11Error as failure:
                if not required and code_of(failure) in _NO_LOGIN:
                    return
                context = user_type == _CKU_CONTEXT_SPECIFIC
                if digest is not None and not context and self._doubtful(failure, digest):
                    continue
                raise self._judged(failure.with_traceback(None), digest, generation) from None
            if digest is not None:
                refused.took(digest)
                _lost.pop((self._module.path, digest), None)
            return

    def _doubtful(self, failure: sdk.PKCS11Error, digest: bytes) -> bool:
        """Whether a PIN that the token took before may be sent once more after a refusal.

        Devices that were plugged in again refuse the right PIN once (ADR 21). The token must say
        that it has not counted the refusal, and a second one is final.
        """
        if code_of(failure) != Ckr.PIN_INCORRECT or not refused.doubt(digest):
            return False
        uncounted = self._uncounted()
        _log.warning(
            "pkcs11.pin_refused_after_it_worked token=%r counted=%s, towards its lock: the PIN was "
            "probably changed; correct it at its source",
            self._token.label,
            not uncounted,
        )
        return uncounted

    def _unclear_in_child(self, code: int | None, digest: bytes) -> bool:
        """Whether a PIN that the parent's login took may be sent once more, by the next attempt."""
        if code not in _SAYS_NOTHING or digest not in _taken_by_parent:
            return False
        _taken_by_parent.discard(digest)
        return self._uncounted()

    def _uncounted(self) -> bool:
        """Whether the token says that it has counted no wrong PIN since the last right one."""
        try:
            return not self._token.flags_now() & _COUNTED
        except sdk.PKCS11Error:
            return False

    def _judged(self, failure: sdk.PKCS11Error, digest: bytes | None, generation: int) -> Exception:
        """What to raise for a login that failed; with a PIN, only a clear loss is recovered from.

        Recovery logs in again, up to twice for each signature: with a wrong PIN, at a token that
        refuses it by a return value of its own, that would lock the token.
        """
        code = code_of(failure)
        if code == Ckr.USER_ALREADY_LOGGED_IN:
            return failure
        if digest is not None and code is not None and code in _DEVICE_LOST:
            _lost[self._module.path, digest] = generation, code
        elif (
            digest is not None
            and code not in _SESSION_LOST | _NOT_NOW
            and not self._unclear_in_child(code, digest)
        ):
            refused.add(digest)
            if code not in _REFUSALS:
                return LoginError(
                    f"The login failed ({told(failure)}); the PIN is not sent again.",
                    hint="It may have counted as a wrong try. Check the token and the PIN with the "
                    "vendor's tool, then correct the PIN or restart the process.",
                    details={"step": "login", "call": "C_Login", "pkcs11": answer_of(failure)},
                )
        if recovery_for(failure) is not Recovery.NONE:
            return failure
        return translated(failure, step="login")

    def _same(self, pin: Secret | None) -> bool:
        if pin is None or self._digest is None:
            return False
        return hmac.compare_digest(refused.digest(self._name, pin), self._digest)

    @property
    def _name(self) -> str:
        token, user_type = self._token, str(self._user_type)
        parts = (token.manufacturer, token.model, token.serial, token.label, user_type)
        return shown("\0".join(parts))


def _check_may_try(flags: int, *, known_bad: bool) -> None:
    if known_bad:
        raise _login_error(
            "A login with this PIN failed before; it is not tried again.",
            "Correct the PIN at its source, which is read again before the next login. Do not "
            "restart before: each start costs a try, and the token locks after a few.",
        )
    if flags & TokenFlag.USER_PIN_LOCKED:
        raise translated(sdk.PinLocked(), step="login")
    if flags & TokenFlag.USER_PIN_COUNT_LOW:
        # Not a reason to stop: anybody's mistyped PIN would then stop every restart.
        _log.warning(
            "pkcs11.pin_count_low: the token has counted a wrong PIN since the last right one"
        )
    if flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise _login_error(
            "One more wrong PIN would lock the token, so none is tried.",
            "Log in once with the vendor's tool and the right PIN; that resets the counter.",
        )


def _login_error(text: str, hint: str) -> LoginError:
    return LoginError(text, hint=hint, details={"step": "login"})

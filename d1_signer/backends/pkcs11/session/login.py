# SPDX-License-Identifier: Apache-2.0
"""Logging in: once for each token and user type, never again with a PIN that was refused.

The login belongs to the token, not to a session: it ends when the application's last session is
closed. So one session, which nobody signs with, holds it, shared by all signers on the token and
closed last; `C_Logout` is never called, since other code in the process may rely on the login.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import threading
from collections.abc import Callable

import pkcs11
from pkcs11 import TokenFlag, exceptions as sdk

from d1_signer.backends.pkcs11.failures import (
    Recovery,
    not_initialized,
    recovery_for,
    told,
    translated,
)
from d1_signer.backends.pkcs11.module import forks
from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki, handle
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.errors import LoginError, SecretSourceError
from d1_signer.secret import Secret, SecretSource, read_secret

_log = logging.getLogger(__name__)

CKU_USER = 1
_CKU_CONTEXT_SPECIFIC = 2

_REFUSALS = (sdk.PinIncorrect, sdk.PinInvalid, sdk.PinLenRange, sdk.PinLocked, sdk.PinExpired)
# Answers that say why the PIN was not looked at. After any other one it may have been counted as a
# wrong try, whatever the answer's name says.
_SESSION_LOST = (sdk.SessionHandleInvalid, sdk.SessionClosed)
_DEVICE_LOST = (
    sdk.DeviceError,
    sdk.DeviceRemoved,
    sdk.SlotIDInvalid,
    sdk.TokenNotPresent,
    sdk.TokenNotRecognised,
)
_NOT_NOW = (
    sdk.AnotherUserAlreadyLoggedIn,
    sdk.FunctionCancelled,
    sdk.UserAlreadyLoggedIn,
    sdk.UserPinNotInitialized,
    sdk.UserTooManyTypes,
)


class Refused:
    """The PINs that are not tried again, as salted digests; kept for the life of the process."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._digests: set[bytes] = set()

    def digest(self, token: str, pin: Secret) -> bytes:
        """Salted digest of a PIN for a token."""
        text = f"{token}\0{pin.reveal()}".encode()
        return hmac.digest(self._salt, text, hashlib.sha256)

    def add(self, digest: bytes) -> None:
        """Remember a refusal."""
        self._digests.add(digest)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def export(self) -> dict[str, object]:
        """For a process of ours that goes on trying."""
        return {"salt": self._salt.hex(), "digests": sorted(d.hex() for d in self._digests)}

    def take(self, exported: dict[str, object]) -> None:
        """Take over what another process of ours exported."""
        self._salt = bytes.fromhex(str(exported["salt"]))
        self.merge(exported)

    def merge(self, exported: dict[str, object]) -> None:
        """Add refusals that were made under the same salt."""
        digests = exported["digests"]
        assert isinstance(digests, list)  # noqa: S101 (our own export)
        self._digests.update(bytes.fromhex(digest) for digest in digests)


refused = Refused()
# The generation of its module in which a device was lost at the login with a PIN, and how. It is
# tried again after the module was initialised anew, and not before.
_lost: dict[tuple[str, bytes], tuple[int, sdk.PKCS11Error]] = {}

# PINs that a token took. In the child of a fork, how often each is sent again after an answer that
# says nothing: siblings that begin at once get such answers of SoftHSM, and the PIN was right.
_taken: set[bytes] = set()
_resends: dict[bytes, int] = {}
_SAYS_NOTHING = (sdk.FunctionFailed, sdk.GeneralError)
_RESENDS_IN_CHILD = 2


def _after_fork() -> None:
    _resends.update(dict.fromkeys(_taken, _RESENDS_IN_CHILD))


forks.in_child(_after_fork)

# Around the sending of a PIN; left by an exception where the token did not take it. For a process
# of ours that may end in between, so that another one knows.
witness: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


class Pin:
    """A PIN and where it comes from.

    It is kept after the first reading, for keys that want it with every signature and for logins
    after a recovery; those read the source again first, in case the PIN was changed meanwhile.
    """

    def __init__(self, source: SecretSource | None, value: Secret | None) -> None:
        """Take a source, or the PIN itself, or neither."""
        self._source = source
        self._value = value

    def read(self) -> Secret | None:
        """The PIN; None where there is none. Runs the caller's code: hold no lock meanwhile.

        Raises:
            SecretSourceError: The source cannot be read, and could not be before.
        """
        if self._source is None or (self._source == "prompt" and self._value is not None):
            return self._value
        try:
            self._value = read_secret(self._source, what="PIN")
        except SecretSourceError as error:
            if self._value is None:
                error.details["step"] = "login"
                raise
            _log.warning("pkcs11.pin_source_unreadable; the PIN read earlier is used")
        return self._value

    @property
    def kept(self) -> Secret | None:
        """What was read last."""
        return self._value


class Login:
    """The login of one user type on one token, in one generation of its module."""

    def __init__(self, module: Module, token: pkcs11.Token, user_type: int) -> None:
        self._module = module
        self._token = token
        self._user_type = user_type
        self._lock = threading.Lock()
        self._holder: pkcs11.Session | None = None
        self._digest: bytes | None = None
        self._users = 0

    @classmethod
    def shared(cls, module: Module, token: pkcs11.Token, user_type: int) -> Login:
        """The login that all signers on the token share; `release` gives it back."""
        key = (token.slot.slot_id, user_type)
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
            key = (self._token.slot.slot_id, self._user_type)
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
            self._holder = self._token.open()
        try:
            return self._module.cryptoki.logged_in(handle(self._holder))
        except (sdk.SessionHandleInvalid, sdk.SessionClosed):
            self._holder = None
            self._holder = self._token.open()
            return self._module.cryptoki.logged_in(handle(self._holder))

    def _accept(self, pin: Secret | None) -> None:
        """The token is logged in already, by us or by other code in this process."""
        if self._digest is None and pin is not None:
            _log.warning("pkcs11.logged_in_by_others: the PIN was not checked by the token")
            self._digest = refused.digest(self._name, pin)

    def _log_in(self, pin: Secret | None, *, pin_pad: bool) -> None:
        flags = self._token.slot.get_token().flags
        if pin is None and not pin_pad:
            if flags & TokenFlag.LOGIN_REQUIRED:
                raise translated(sdk.UserNotLoggedIn(), step="login")
            return
        if pin_pad and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise _login_error(
                "The token has no protected authentication path.",
                "Leave protected_authentication_path out and name a pin_source.",
            )
        assert self._holder is not None  # noqa: S101 (_still_in saw to it)
        try:
            self._send(self._module.cryptoki, handle(self._holder), self._user_type, pin)
        except sdk.UserAlreadyLoggedIn:  # between our question and our try
            self._accept(pin)
        else:
            self._digest = None if pin is None else refused.digest(self._name, pin)

    def for_each(self, session: pkcs11.Session, pin: Pin, *, pin_pad: bool) -> Callable[[], None]:
        """What logs in for one signature (``CKA_ALWAYS_AUTHENTICATE``), as carefully as `ensure`.

        It is called between ``C_SignInit`` and ``C_Sign``, and raises what `ensure` does.
        """
        cryptoki, number = self._module.cryptoki, handle(session)

        def log_in() -> None:
            # The lock: of several threads with a PIN that is wrong by now, one is refused.
            with self._lock:
                self._send(cryptoki, number, _CKU_CONTEXT_SPECIFIC, None if pin_pad else pin.kept)

        return log_in

    def _send(self, cryptoki: Cryptoki, session: int, user_type: int, pin: Secret | None) -> None:
        """Send the PIN, unless it failed before or might lock the token; remember if it fails."""
        digest = None if pin is None else refused.digest(self._name, pin)
        flags = self._token.slot.get_token().flags
        _check_may_try(flags, known_bad=digest is not None and digest in refused)
        generation = self._module.generation
        if digest is not None:
            lost_in, loss = _lost.get((self._module.path, digest), (None, None))
            if loss is not None and lost_in == generation:
                raise loss
        witnessed = contextlib.nullcontext if digest is None else witness
        try:
            with witnessed():
                cryptoki.login(session, user_type, None if pin is None else pin.reveal())
        except sdk.PKCS11Error as failure:
            raise self._judged(failure.with_traceback(None), digest, generation) from None
        if digest is not None:
            _taken.add(digest)

    def _judged(self, failure: sdk.PKCS11Error, digest: bytes | None, generation: int) -> Exception:
        """What to raise for a login that failed; with a PIN, only a clear loss is recovered from.

        Recovery logs in again, up to twice for each signature: with a wrong PIN, at a token that
        refuses it by a return value of its own, that would lock the token.
        """
        if isinstance(failure, sdk.UserAlreadyLoggedIn):
            return failure
        lost = isinstance(failure, _DEVICE_LOST) or not_initialized(failure)
        if digest is not None and lost:
            _lost[self._module.path, digest] = generation, failure
        elif digest is not None and isinstance(failure, _SAYS_NOTHING) and _resends.get(digest):
            _resends[digest] -= 1
        elif digest is not None and not isinstance(failure, (*_SESSION_LOST, *_NOT_NOW)):
            refused.add(digest)
            if not isinstance(failure, _REFUSALS):
                return LoginError(
                    f"The login failed ({told(failure)}); the PIN is not sent again.",
                    hint="It may have counted as a wrong try. Check the token and the PIN with the "
                    "vendor's tool, then correct the PIN or restart the process.",
                    details={"step": "login", "pkcs11": told(failure)},
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
        token = self._token
        serial = token.serial.decode("utf-8", "replace")
        parts = (token.manufacturer_id, token.model, serial, token.label, str(self._user_type))
        return "\0".join(parts)


def _check_may_try(flags: TokenFlag, *, known_bad: bool) -> None:
    if known_bad:
        raise _login_error(
            "A login with this PIN failed before; it is not tried again.",
            "Correct the PIN; the same value is refused until the process is restarted.",
        )
    if flags & TokenFlag.USER_PIN_LOCKED:
        raise translated(sdk.PinLocked(), step="login")
    if flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise _login_error(
            "One more wrong PIN would lock the token, so none is tried.",
            "Log in once with the vendor's tool and the right PIN; that resets the counter.",
        )


def _login_error(text: str, hint: str) -> LoginError:
    return LoginError(text, hint=hint, details={"step": "login"})

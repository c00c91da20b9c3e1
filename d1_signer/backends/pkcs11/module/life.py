# SPDX-License-Identifier: Apache-2.0
"""The one owner of a PKCS#11 module's life in this process.

All signers on a module share its initialisation. Every call into it is made in `Module.run`;
whoever initialises it anew, and a fork, first wait until nobody is in a call. What is taken here is
given back as `gate` says, whatever a signal's handler raises; a lock by a release that may fail.
Handles of sessions and objects restart at each initialisation, so whatever holds one also holds the
`Module.generation` that it belongs to, and drops it once that has changed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar, TypeVarTuple

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.failures import told
from d1_signer.backends.pkcs11.module import cryptoki, forks, tpm
from d1_signer.backends.pkcs11.module.gate import Gate, remaining
from d1_signer.backends.pkcs11.returns import error_of
from d1_signer.errors import (
    ConfigurationError,
    SignerClosedError,
    SignerTimeout,
    SignerUnavailable,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_log = logging.getLogger(__name__)

_SECONDS_TO_DRAIN = 2.0  # before initialising anew
_SECONDS_TO_FORK = 5.0  # before a fork; a longer call leaves the child without this module


class Locking(StrEnum):
    """What keeps the module's calls from running into each other."""

    OS = "os"  # the module itself, with the operating system's locks (CKF_OS_LOCKING_OK)
    LOCK = "lock"  # one lock of ours around every call


class Module:
    """A loaded and initialised PKCS#11 module; get one with `acquire`, give it back by `release`.

    Attributes:
        path: The module's file.
        generation: Counts the initialisations, over forks too.
        locking: How calls are kept apart.
        instance: Counts the instances of a module that gives out more than one; see `_abandon`.
        logins: The `login.Login` of each slot and user type, in this generation.
    """

    def __init__(self, path: str, reserved: str | None) -> None:
        self.path = path
        self.generation = 0
        self.locking = Locking.OS
        self._one_at_a_time = False  # whether `locking` is LOCK, for the way that must be quick
        self.logins: dict[tuple[int, int], Any] = {}
        self.reserved = reserved
        self._users = 0
        self._ours = False  # initialised by us, not by other code in this process
        self._stale = True
        self._wanted = "auto"
        self._drained = False  # when a fork had shut the gate, nobody was in a call any more
        self._poisoned = False  # forked from a process whose call hung: its locks are held for ever
        self._new_locks()
        self.instance = 0
        self._abandoned: list[Any] = []  # kept loaded: calls into them are still under way
        self._tpm = tpm.Connection()
        try:
            self.binding, self.cryptoki = cryptoki.loaded(path)
        except sdk.PKCS11Error as error:
            raise ConfigurationError(
                f"The PKCS#11 module cannot be loaded: {path}: {told(error)}.",
                hint="Check the path, the file's architecture, and the libraries that it needs.",
                details={"step": "module"},
            ) from None

    def _new_locks(self) -> None:
        self._life = threading.RLock()
        self._gate = Gate()
        self._hanging: frozenset[object] = frozenset()
        self._turn = threading.RLock()

    # -- calls --------------------------------------------------------------------------------

    def run(
        self, work: Callable[[*Ts], T], deadline: float | None, *args: *Ts, revive: bool = True
    ) -> T:
        """Make calls that belong together.

        Their errors arrive without the frames they came through. Those hold the binding's objects,
        whose ``repr`` calls the module, where a crash reporter that shows local variables would
        call it whenever it likes; and the PIN, where a key wants it with each signature.

        Args:
            work: What makes the calls.
            deadline: Moment on ``time.monotonic()`` until which to wait for others; None: no limit.
            *args: For ``work``.
            revive: Initialise a module that is not; else it is left so, and every handle has died.

        Raises:
            SignerTimeout: The module was being initialised anew until the deadline.
            SignerUnavailable: The module cannot be used in this process.
        """
        call = object()
        try:
            self._enter(call, deadline, revive=revive)
            return work(*args)
        except Exception as error:  # noqa: BLE001 (raised on, whatever it is)
            raise error.with_traceback(None) from None
        finally:
            try:
                self._gate.inside.discard(call)
            finally:
                if self._one_at_a_time:
                    try:  # noqa: SIM105 (whose first line could be cut off)
                        self._turn.release()
                    except RuntimeError:
                        pass  # it was not this call's turn yet

    def _enter(self, call: object, deadline: float | None, *, revive: bool) -> None:
        while True:
            if self._stale and revive:
                self._require_users()
                self._initialize_again(self.generation, deadline)
            self._gate.enter(call, deadline)
            if not (self._stale and revive):
                break
            # While this thread waited at the gate, the last user gave the module back.
            self._gate.inside.discard(call)
        if self._one_at_a_time:
            self._wait_for_the_turn(deadline)

    def _require_users(self) -> None:
        if not self._users:
            raise SignerClosedError("The PKCS#11 module was given back.")

    def _wait_for_the_turn(self, deadline: float | None) -> None:
        left = remaining(deadline)
        if not self._turn.acquire(timeout=-1 if left is None else left):
            raise SignerTimeout(
                "The PKCS#11 module was in another call until the deadline.",
                hint="Allow more time; this module works for one thread at a time.",
            )

    # -- life ---------------------------------------------------------------------------------

    def reinitialize(self, seen: int, deadline: float | None) -> None:
        """Finalise the module and initialise it, unless that was done since ``seen``.

        Args:
            seen: The generation in which the caller's call failed.
            deadline: Moment on ``time.monotonic()``; None: a limit of our own.

        Raises:
            SignerUnavailable: Somebody is in a call that does not return: finalising the module
                then would freeze the process.
            pkcs11.PKCS11Error: The module does not let itself be initialised.
        """
        if self.generation == seen:
            self._require_users()
            self._initialize_again(seen, deadline)

    def _initialize_again(self, seen: int, deadline: float | None) -> None:
        limit = time.monotonic() + _SECONDS_TO_DRAIN
        if deadline is not None:
            limit = min(limit, deadline)
        try:
            if not self._life.acquire(timeout=max(0.0, limit - time.monotonic())):
                raise _busy()
            if self.generation == seen:
                self._renew(limit)
        finally:
            try:  # noqa: SIM105 (as in run)
                self._life.release()
            except RuntimeError:
                pass  # another's

    def _renew(self, limit: float) -> None:
        """With `_life` held: initialise the module, after finalising it where that is ours."""
        me = object()
        try:
            if self._hangs() or not self._gate.shut(me, limit):
                raise _busy()
            if not self._gate.drained(limit) and not self._abandon():
                self._hanging = frozenset(self._gate.inside)
                raise _busy()
            self._restart()
        finally:
            if me in self._gate.shut_by:
                self._gate.shut_by.remove(me)

    def _hangs(self) -> bool:
        """Whether a call is still under way that kept an earlier recovery from its work.

        To wait for it again would hold up everybody whose calls do return.
        """
        return not self._hanging.isdisjoint(self._gate.inside)

    def _abandon(self) -> bool:
        """With the gate shut: leave calls that do not return behind, with their instance.

        p11-kit's client gives out a list, and a connection, of its own for each request; other
        modules have a single one, and then nothing can be done.

        Returns:
            Whether there is another one now.
        """
        if self._one_at_a_time:
            return False  # the call that does not return holds the lock
        binding, functions = cryptoki.loaded(self.path)
        if functions.address == self.cryptoki.address:
            return False
        _log.warning("pkcs11.instance_left_behind module=%s: a call is outstanding", self.path)
        self._abandoned.append((self.binding, self.cryptoki))
        self.binding, self.cryptoki = binding, functions
        self._gate.inside.clear()
        self._ours = False
        self.instance += 1
        return True

    def _restart(self) -> None:
        """With the gate shut."""
        if self._poisoned:
            raise SignerUnavailable(
                "This process was forked while a PKCS#11 call hung: the module is unusable in it.",
                hint='Fork again when the HSM answers, or use isolation="process".',
            )
        self._tpm.check_not_inherited()
        self._end()
        try:
            self._initialize()
        finally:
            self._tpm.noted()
        self._stale = False

    def _end(self) -> None:
        """With the gate shut: end what we began; no handle of this generation lives on."""
        self.logins.clear()
        self.generation += 1
        self._stale = True
        if self._ours:
            # A child of a fork may not be taken as initialised (p11-kit): then there is nothing to
            # finalise, which is fine.
            self.cryptoki.finalize()
            self._ours = False

    def _initialize(self) -> None:
        os_locking = self._wanted != Locking.LOCK
        code = self.cryptoki.initialize(os_locking=os_locking, reserved=self.reserved)
        self.locking = Locking.OS if os_locking else Locking.LOCK
        if os_locking and code in {
            cryptoki.CKR_ARGUMENTS_BAD,
            cryptoki.CKR_CANT_LOCK,
            cryptoki.CKR_NEED_TO_CREATE_THREADS,
        }:
            code = self.cryptoki.initialize(os_locking=False, reserved=self.reserved)
            self.locking = Locking.LOCK
        self._ours = code == cryptoki.CKR_OK
        if code == cryptoki.CKR_CRYPTOKI_ALREADY_INITIALIZED:
            # By whom, and with which promises, is unknown; python-pkcs11 promises a single thread.
            self.locking = Locking.LOCK
            _log.warning("pkcs11.initialized_by_others module=%s", self.path)
        elif not self._ours:
            raise error_of(code, "C_Initialize")
        self._one_at_a_time = self.locking is Locking.LOCK
        _log.info(
            "pkcs11.initialized module=%s locking=%s generation=%d",
            self.path,
            self.locking,
            self.generation,
        )

    # -- owners -------------------------------------------------------------------------------

    @classmethod
    def acquire(
        cls, path: str, *, locking: str, reserved: str | None, deadline: float | None = None
    ) -> Module:
        """Load and initialise a module, or share it with the signers that use it already.

        Args:
            path: Its file.
            locking: ``"auto"``, ``"os"`` or ``"lock"``.
            reserved: What the module takes as ``pReserved`` of ``C_Initialize``, if anything.
            deadline: Moment on ``time.monotonic()`` until which to wait for others that initialise
                or finalise it; None: no limit. A call of the module itself has none.

        Raises:
            SignerUnavailable: Others did so until the deadline.
            ConfigurationError: It cannot be loaded or initialised, or has other settings.
        """
        real = os.path.realpath(path)
        with _registry_lock:
            module = _registry.get(real)
            if module is None:
                module = _registry[real] = cls(path, reserved)
        left = remaining(deadline)
        try:
            if not module._life.acquire(timeout=-1 if left is None else left):
                raise _busy()
            module._begin(locking, reserved)
        finally:
            try:  # noqa: SIM105 (as in run)
                module._life.release()
            except RuntimeError:
                pass  # another's
        return module

    def _begin(self, locking: str, reserved: str | None) -> None:
        if self._users and (reserved != self.reserved or locking not in {"auto", self.locking}):
            raise _settings(f"The module is in use with other settings: {self.path}.")
        self.reserved = reserved
        self._wanted = locking
        self._users += 1
        try:
            if self._stale:
                self._renew(time.monotonic() + _SECONDS_TO_DRAIN)
            if locking == Locking.OS and self.locking is Locking.LOCK:
                raise _settings(  # noqa: TRY301 (undone below like any other failure)
                    f"The module does not lock by itself: {self.path}."
                )
        except sdk.PKCS11Error as error:
            self._users -= 1
            raise ConfigurationError(
                f"The PKCS#11 module cannot be initialised ({told(error)}): {self.path}.",
                hint="Check the module's own configuration and its log.",
                details={"step": "module"},
            ) from None
        except BaseException:
            self._given_back()
            raise

    def release(self) -> None:
        """Give the module back; the last one to do so finalises it, if nobody is in a call.

        It may take as long as a call of the module: a caller with a deadline hands it off.
        """
        with self._life:
            self._given_back()

    def _given_back(self) -> None:
        self._users -= 1
        if self._users or self._stale:
            return
        limit = time.monotonic() + _SECONDS_TO_DRAIN
        me = object()
        try:
            if not self._hangs() and self._gate.shut(me, limit) and self._gate.drained(limit):
                self._end()
            else:
                _log.warning("pkcs11.not_finalized module=%s: a call is outstanding", self.path)
        finally:
            if me in self._gate.shut_by:
                self._gate.shut_by.remove(me)

    # -- forks --------------------------------------------------------------------------------

    def _hold_for_fork(self, limit: float) -> None:
        me = threading.get_ident()
        self._drained = self._gate.shut(me, limit) and self._gate.drained(limit)

    def _resume_in_parent(self) -> None:
        me = threading.get_ident()
        if me in self._gate.shut_by:
            self._gate.shut_by.remove(me)
        self._drained = False

    def _begin_in_child(self) -> None:
        # Where Python was not told before the fork, the gate shows as well what went on then.
        used = bool(self._gate.inside or self._gate.shut_by)
        self._poisoned = self._poisoned or (used and not self._drained)
        self._drained = False
        self._new_locks()
        self._stale = True
        self.generation += 1
        self.logins.clear()


_registry: dict[str, Module] = {}
_registry_lock = threading.Lock()


def _before_fork() -> None:
    limit = time.monotonic() + _SECONDS_TO_FORK
    for module in list(_registry.values()):
        module._hold_for_fork(limit)  # noqa: SLF001


def _after_fork_in_parent() -> None:
    for module in list(_registry.values()):
        module._resume_in_parent()  # noqa: SLF001


def _after_fork_in_child() -> None:
    global _registry_lock  # noqa: PLW0603 (the parent's may be held by a thread that is not here)
    _registry_lock = threading.Lock()
    for module in _registry.values():
        module._begin_in_child()  # noqa: SLF001


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
forks.in_child(_after_fork_in_child)


def _busy() -> SignerUnavailable:
    return SignerUnavailable(
        "The PKCS#11 module cannot be initialised anew: a call does not return.",
        hint='Check the HSM\'s connection; isolation="process" gets rid of such calls.',
        details={"step": "module"},
    )


def _settings(text: str) -> ConfigurationError:
    return ConfigurationError(
        text, hint="Use the same settings for all signers on it.", details={"step": "module"}
    )

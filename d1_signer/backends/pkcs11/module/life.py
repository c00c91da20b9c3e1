# SPDX-License-Identifier: Apache-2.0
"""The life of a PKCS#11 module in this process: its calls, its generations, its end.

All signers on a module share its initialisation (`owners` knows who they are). Every call into it
is made in `Module.run`; whoever initialises it anew, and a fork, first wait until nobody is in a
call. What is taken here is given back as `gate` says, whatever a signal's handler raises; a lock by
a release that may fail. Handles of sessions and objects restart at each initialisation, so whatever
holds one also holds the `Module.generation` that it belongs to, and drops it once that has changed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

from pkcs11 import exceptions as sdk

from d1_signer import frames
from d1_signer.backends.pkcs11.failures import told, translated
from d1_signer.backends.pkcs11.module import contexts, cryptoki, lending, tpm
from d1_signer.backends.pkcs11.module.gate import Gate, remaining
from d1_signer.backends.pkcs11.module.initialization import Initialization, Locking
from d1_signer.errors import ConfigurationError, SignerClosedError, SignerUnavailable
from d1_signer.secret import shown_path
from d1_signer.signing.steps import Step

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_log = logging.getLogger(__name__)

_SECONDS_TO_DRAIN = 2.0  # before initialising anew


def _loaded(path: str) -> tuple[Any, cryptoki.Cryptoki] | str:
    """The module; or why it cannot be loaded."""
    try:
        return cryptoki.loaded(path)
    except sdk.PKCS11Error as error:
        shown = shown_path(path)
        return f"{shown}: {told(error)}" if shown == path else shown


class Module:
    """A loaded PKCS#11 module; get one with `owners.acquire`, give it back by `release`.

    Attributes:
        path: The module's file.
        generation: Counts the initialisations, over forks too.
        instance: Counts the instances of a module that gives out more than one; see `_abandon`.
        logins: The `login.Login` of each slot and user type, in this generation.
        thread_bound: Whether only threads that never end may use it; see `contexts`.
    """

    def __init__(self, path: str, reserved: str | None) -> None:
        self.path = path
        self.generation = 0
        self._one_at_a_time = False  # whether `locking` is LOCK, for the way that must be quick
        self.logins: dict[tuple[int, int], Any] = {}
        self._users = 0
        self._stale = True
        self._poisoned = False  # forked from a process whose call hung: its locks are held for ever
        self._new_locks()
        self.instance = 0
        self._abandoned: list[Any] = []  # kept loaded: calls into them are still under way
        self._tpm = tpm.Connection()
        found = _loaded(path)
        if isinstance(found, str):
            # Away from the error, which repeats the path: it may be a secret, put there by mistake.
            raise ConfigurationError(
                f"The PKCS#11 module cannot be loaded: {found}.",
                hint=cryptoki.CHECK_MODULE,
                details={"step": "module"},
            )
        self.binding, self.cryptoki = found
        self.thread_bound = contexts.has_own(self.cryptoki.code)
        self._initialization = Initialization(reserved)

    def _new_locks(self) -> None:
        self._life = threading.RLock()
        self._gate = Gate()
        self._hanging: frozenset[object] = frozenset()

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
        outer = sys.exception()
        try:
            self._enter(call, deadline, revive=revive)
            return work(*args)
        except Exception as error:
            if frames.of_signal_handler(error):
                frames.clear(error, outer=outer)
                raise
            raise error.with_traceback(None) from None
        finally:
            try:
                self._gate.inside.discard(call)
            finally:
                if self._one_at_a_time:
                    try:  # noqa: SIM105 (whose first line could be cut off)
                        self._gate.turn.release()
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
            self._gate.take_turn(deadline)

    def _require_users(self) -> None:
        if not self._users:
            raise SignerClosedError("The PKCS#11 module was given back.")

    # -- life ---------------------------------------------------------------------------------

    def reinitialize(self, seen: int, deadline: float | None) -> None:
        """Finalise the module and initialise it, unless that was done since ``seen``.

        Args:
            seen: The generation in which the caller's call failed.
            deadline: Moment on ``time.monotonic()``; None: a limit of our own.

        Raises:
            SignerUnavailable: Somebody is in a call that does not return: finalising the module
                then would freeze the process.
            SignerUnavailable: It may not be finalised in this process; see `kept`.
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
        self._initialization.ours = False
        self.instance += 1
        return True

    def _restart(self) -> None:
        """With the gate shut: begin a generation, after ending the one before."""
        if self._poisoned:
            raise SignerUnavailable(
                "This process was forked while a PKCS#11 call hung: the module is unusable in it.",
                hint='Fork again when the HSM answers, or use isolation="process".',
            )
        self._tpm.check_not_inherited()
        kept = "" if self._stale else self._initialization.reason_to_keep()
        if not self._stale and not kept:
            self._end()
        try:
            with Step(f"the PKCS#11 module {self.path}"):
                self._initialization.begin(self.cryptoki, kept=kept)
        finally:
            self._tpm.noted()
        if kept:
            self._end_generation()  # other code had finalised it
        self._stale = False
        self._one_at_a_time = self.locking is Locking.LOCK
        if self._initialization.ours:
            lending.offer(self)
        else:
            _log.warning("pkcs11.initialized_by_others module=%s", self.path)
        _log.info(
            "pkcs11.initialized module=%s locking=%s generation=%d",
            self.path,
            self.locking,
            self.generation,
        )

    @property
    def locking(self) -> Locking:
        """How calls are kept apart."""
        return self._initialization.locking

    @property
    def kept(self) -> bool:
        """Whether it is initialised and may not be finalised in this process now."""
        return not self._stale and bool(self._initialization.reason_to_keep())

    def _end(self) -> None:
        """With the gate shut: end what we began; no handle of this generation lives on."""
        self._end_generation()
        self._stale = True
        lending.withdraw(self)
        self._initialization.end(self.cryptoki)

    def _end_generation(self) -> None:
        self.logins.clear()
        self.generation += 1

    def lend(self) -> None:
        """Have the module initialised for other code, until `take_back`; see `lending`.

        Raises:
            pkcs11.PKCS11Error: It makes one call at a time, which other code would not keep to.
        """
        with self._life:  # not beside a recovery, which would not know of it
            if self._stale:
                self._initialize_again(self.generation, None)
            if self._one_at_a_time:
                raise sdk.PKCS11Error(
                    f"d1_signer uses {self.path} with one lock around every call, which other "
                    'code would not take; open the signer with isolation="process".'
                )
            self._initialization.lent = True

    def take_back(self) -> None:
        """Other code says that it has done with the module."""
        with self._life:
            self._initialization.lent = False
            if not self._users:
                self._end_of_use()

    # -- owners -------------------------------------------------------------------------------

    def join(self, locking: str, reserved: str | None, deadline: float | None) -> None:
        """Become one of its users; see `owners.acquire`."""
        left = remaining(deadline)
        try:
            if not self._life.acquire(timeout=-1 if left is None else left):
                raise _busy()
            self._begin(locking, reserved)
        finally:
            try:  # noqa: SIM105 (as in run)
                self._life.release()
            except RuntimeError:
                pass  # another's

    def _begin(self, locking: str, reserved: str | None) -> None:
        in_use = self._users or not self._stale
        settings = self._initialization
        if in_use and (reserved != settings.reserved or locking not in {"auto", self.locking}):
            raise _settings(f"The module is in use with other settings: {self.path}.")
        settings.reserved, settings.wanted = reserved, locking
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
            meant = translated(error, step="module")
            kind = SignerUnavailable if isinstance(meant, SignerUnavailable) else ConfigurationError
            raise kind(
                f"The PKCS#11 module cannot be initialised ({told(error)}): {self.path}.",
                hint="Check the module's own configuration and its log, and whether its HSM works.",
                details=meant.details,
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
        if not self._users and not self._initialization.lent:
            self._end_of_use()

    def _end_of_use(self) -> None:
        if self._stale or self._gate.ended:
            return
        limit = time.monotonic() + _SECONDS_TO_DRAIN
        if self._hangs() or not self._gate.alone(self._end, limit):
            _log.warning("pkcs11.not_finalized module=%s: a call is outstanding", self.path)

    def leave(self, work: Callable[[], None], limit: float) -> None:
        """The process ends: let nobody in any more, and do work unless a call is under way.

        Nobody, since a thread that goes on would open its session again and log in: a process that
        ends in the middle of a login can cost SoftHSM its token.
        """
        self._gate.ended = True
        if self._gate.shut(self, limit) and self._gate.drained(limit) and not self._stale:
            work()

    # -- forks --------------------------------------------------------------------------------

    def hold_for_fork(self, limit: float) -> None:
        """Let nobody in, and wait until nobody is inside."""
        self._gate.hold_for_fork(limit)

    def resume_in_parent(self) -> None:
        """The fork was made."""
        self._gate.resume_in_parent()

    def begin_in_child(self) -> None:
        """Forget the parent's calls and handles; the next call initialises the module."""
        self._poisoned = self._poisoned or self._gate.torn
        self._new_locks()
        self._stale = True
        self._initialization.after_fork()
        self._end_generation()


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

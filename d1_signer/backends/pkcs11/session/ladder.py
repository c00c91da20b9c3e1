# SPDX-License-Identifier: Apache-2.0
"""Recovery of one signature, level after level: a new session, then a new initialisation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.failures import Recovery, answer_of, recovery_for, told, translated
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.session.pool import Pool, Worker
from d1_signer.backends.pkcs11.session.recovery import Circuit, Remedy
from d1_signer.errors import D1SignerError, SignerUnavailable

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SessionsAreShort(Exception):
    """The token has no session for this worker; others have."""


class Attempt(Protocol):
    """Does work with a worker, opening its session where it has none."""

    def __call__(self, worker: Worker, work: Callable[[Worker], T], deadline: float | None) -> T:
        """Raises what the binding raises."""


class Ladder:
    """The levels of recovery of one backend.

    Attributes:
        lost: What failed for good in a generation of the module: the next work needs a new one.
        lost_in: That generation.
    """

    def __init__(
        self, pool: Pool, circuit: Circuit, attempt: Attempt, drop: Callable[[Worker], None]
    ) -> None:
        """Take what does the work, and what closes a worker's session."""
        self._pool = pool
        self._circuit = circuit
        self._attempt = attempt
        self._drop = drop
        self.lost: sdk.PKCS11Error | None = None
        self.lost_in = -1
        # For answers that ask for a new session by their names, and that it may cure nevertheless.
        self._initializing_anew = Remedy()

    def climb(
        self,
        module: Module,
        worker: Worker,
        work: Callable[[Worker], T],
        deadline: float | None,
        failure: sdk.PKCS11Error,
    ) -> T:
        """Make anew what a failure asks for, as little as suffices, and repeat the work.

        The first level renews the session, and on the way the login and the key; the second one
        the module's initialisation. What fails on a level, or after it, takes the next one; there
        are two, so the work is repeated twice at most.

        Raises:
            SessionsAreShort: Another worker is to be taken.
            D1SignerError: Nothing helped.
        """
        self._check_sessions(worker, failure)
        kind = recovery_for(failure)
        if kind is Recovery.NONE:
            self._drop(worker)  # an operation may still be active in it
            raise translated(failure, step="signature") from None
        seen = module.generation if worker.generation < 0 else worker.generation
        step = "signature"
        for level in self._levels(module, kind):
            _log.debug("pkcs11.recovering level=%d after=%s", level, told(failure))
            step = "token"
            try:
                if level is Recovery.MODULE:
                    self._reinitialize(module, seen, deadline, failure)
                if worker.generation == module.generation:
                    self._drop(worker)  # else its session has died with its generation
                self._attempt(worker, lambda _: None, deadline)
                step = "signature"
                result = self._attempt(worker, work, deadline)
            except sdk.PKCS11Error as again:
                failure = again
                self._check_sessions(worker, again)
                if recovery_for(again) is Recovery.NONE:
                    break
            else:
                if level is Recovery.MODULE:
                    self._initializing_anew.taken(helped=True)
                return result
        self._drop(worker)
        raise self._away(module, failure, step)

    def _levels(self, module: Module, kind: Recovery) -> list[Recovery]:
        """The levels to take, the smallest first."""
        if kind is Recovery.SESSION and not self._initializing_anew.due:
            return [Recovery.SESSION]
        if kind is Recovery.SESSION or module.kept:
            return [Recovery.SESSION, Recovery.MODULE]
        return [Recovery.MODULE]

    def _check_sessions(self, worker: Worker, failure: sdk.PKCS11Error) -> None:
        if isinstance(failure, sdk.SessionCount) and self._pool.rest(worker):
            raise SessionsAreShort from None

    def _reinitialize(
        self, module: Module, seen: int, deadline: float | None, failure: sdk.PKCS11Error
    ) -> None:
        try:
            module.reinitialize(seen, deadline)
        except SignerUnavailable as error:
            error.details.setdefault("pkcs11", answer_of(failure))
            self._circuit.opened_by(error)
            raise

    def _away(self, module: Module, failure: sdk.PKCS11Error, step: str) -> D1SignerError:
        kind = recovery_for(failure)
        if kind is Recovery.MODULE:
            self.lost, self.lost_in = failure.with_traceback(None), module.generation
        elif kind is Recovery.SESSION and self._initializing_anew.due:
            self._initializing_anew.taken(helped=False)
        error = translated(failure, step=step)
        if isinstance(error, SignerUnavailable):
            if step == "signature":  # the token and the key are there, and it does not sign
                error.details["needs"] = "process"
            self._circuit.opened_by(error)
        return error

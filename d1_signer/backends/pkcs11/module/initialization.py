# SPDX-License-Identifier: Apache-2.0
"""``C_Initialize`` and ``C_Finalize``: by whom a module was initialised, how, and who may end that.

Handles of sessions and objects restart at each initialisation. What other code holds would stand
for other sessions and other keys after it: so a module is not finalised where other code may hold
handles of it.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki
from d1_signer.backends.pkcs11.returns import Ckr, error_of
from d1_signer.errors import SignerUnavailable

_log = logging.getLogger(__name__)

_CANNOT_LOCK = frozenset(
    {
        Ckr.ARGUMENTS_BAD,
        Ckr.CANT_LOCK,
        Ckr.NEED_TO_CREATE_THREADS,
        Ckr.FUNCTION_NOT_SUPPORTED,
        Ckr.MUTEX_BAD,
        Ckr.MUTEX_NOT_LOCKED,
    }
)


class Locking(StrEnum):
    """What keeps the module's calls from running into each other."""

    OS = "os"  # the module itself, with the operating system's locks (CKF_OS_LOCKING_OK)
    LOCK = "lock"  # one lock of ours around every call


class Initialization:
    """The state of one module in this process.

    Attributes:
        wanted: ``"auto"``, ``"os"`` or ``"lock"``.
        reserved: What the module takes as ``pReserved`` of ``C_Initialize``, if anything.
        locking: How calls are kept apart.
        ours: Whether it was initialised by us, not by other code in this process.
        lent: Whether other code may hold handles of what we initialised; see `lending`.
    """

    def __init__(self, reserved: str | None) -> None:
        """Begin with a module that is not initialised, as far as we know."""
        self.wanted = "auto"
        self.reserved = reserved
        self.locking = Locking.OS
        self.ours = False
        self.lent = False

    def reason_to_keep(self) -> str:
        """Why a module that is initialised may not be finalised now; empty where it may."""
        if self.lent:
            return "other code in this process may hold handles of it"
        if not self.ours:
            return "other code in this process has initialised it"
        return ""

    def begin(self, functions: Cryptoki, *, kept: str) -> None:
        """Initialise the module.

        It is asked to where it may not be finalised as well, since other code may have finalised
        it; and first of all in the child of a fork, where finalising could end what the child
        shares with its parent.

        Args:
            functions: The module's.
            kept: Why it was not finalised before; empty where it was, or was not initialised.

        Raises:
            SignerUnavailable: It is initialised, and kept so.
            pkcs11.PKCS11Error: The module does not let itself be initialised.
        """
        code, locking = self._asked(functions)
        if code == Ckr.CRYPTOKI_ALREADY_INITIALIZED:
            if kept:
                raise _kept(kept)
            if self.ours:  # in the parent of a fork, or it could not be ended
                functions.finalize()
                code, locking = self._asked(functions)
        self.ours = code == Ckr.OK
        if not self.ours and code != Ckr.CRYPTOKI_ALREADY_INITIALIZED:
            raise error_of(code, "C_Initialize")
        # By whom it was initialised otherwise, and with which promises, is unknown; python-pkcs11
        # promises a single thread.
        self.locking = locking if self.ours else Locking.LOCK

    def _asked(self, functions: Cryptoki) -> tuple[int, Locking]:
        os_locking = self.wanted != Locking.LOCK
        code = functions.initialize(os_locking=os_locking, reserved=self.reserved)
        if os_locking and code in _CANNOT_LOCK:
            os_locking = False
            code = functions.initialize(os_locking=False, reserved=self.reserved)
        return code, Locking.OS if os_locking else Locking.LOCK

    def end(self, functions: Cryptoki) -> None:
        """Finalise the module if it is ours."""
        if self.ours:
            functions.finalize()
            self.ours = False

    def after_fork(self) -> None:
        """In the child, where other code may hold what was lent in the parent."""
        self.ours = self.ours and not self.lent


def _kept(reason: str) -> SignerUnavailable:
    return SignerUnavailable(
        f"The PKCS#11 module cannot be initialised anew in this process: {reason}.",
        hint='Restart the process; isolation="process" replaces a child instead.',
        details={"step": "module", "needs": "process"},
    )

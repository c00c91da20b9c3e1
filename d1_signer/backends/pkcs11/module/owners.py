# SPDX-License-Identifier: Apache-2.0
"""Which modules this process has: one `Module` for each file, shared by all who sign with it."""

from __future__ import annotations

import os
import threading
import time

from d1_signer.backends.pkcs11.module import siblings
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.signing import forks

_SECONDS_TO_FORK = 5.0  # before a fork; a longer call leaves the child without this module

_modules: dict[str, Module] = {}
_lock = threading.Lock()


def acquire(
    path: str, *, locking: str, reserved: str | None, deadline: float | None = None
) -> Module:
    """Load and initialise a module, or share it with the signers that use it already.

    Args:
        path: Its file.
        locking: ``"auto"``, ``"os"`` or ``"lock"``.
        reserved: What the module takes as ``pReserved`` of ``C_Initialize``, if anything.
        deadline: Moment on ``time.monotonic()`` until which to wait for others that initialise
            or finalise it; None: no limit. A call of the module itself has none.

    Returns:
        The module, to be given back by `Module.release`.

    Raises:
        SignerUnavailable: Others did so until the deadline.
        ConfigurationError: It cannot be loaded or initialised, or has other settings.
    """
    real = os.path.realpath(path)
    with _lock:
        module = _modules.get(real)
        if module is None:
            module = _modules[real] = Module(path, reserved)
    module.join(locking, reserved, deadline)
    return module


def _before_fork() -> None:
    if _modules:
        siblings.prepare()
    limit = time.monotonic() + _SECONDS_TO_FORK
    for module in list(_modules.values()):
        module.hold_for_fork(limit)


def _after_fork_in_parent() -> None:
    for module in list(_modules.values()):
        module.resume_in_parent()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (the parent's may be held by a thread that is not here)
    _lock = threading.Lock()
    for module in _modules.values():
        module.begin_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
forks.in_child(_after_fork_in_child)

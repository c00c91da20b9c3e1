# SPDX-License-Identifier: Apache-2.0
"""A module that speaks to a TPM from within this process serves no child of a fork.

What holds for it was measured with tpm2-pkcs11 1.9. The child inherits the connection to the TPM,
and with it the parent's objects and authorization sessions there. ``C_Finalize`` in the child
flushes them. Through p11-kit's proxy, which does not finalise there, the sessions of both run
apart, and the TPM counts the parent's next signature as a wrong PIN, which may lock it. Through
tpm2-abrmd the child waits for ever for a thread of GLib's that only the parent has, even where the
parent had finalised the module before the fork.

So the child makes no call at all. Whether a module is of that kind, neither its file tells nor
``C_GetInfo`` (of a proxy; or of a module in a server, which does no harm). The TPM Software Stack
tells that it brings into the process, and the part of it that is loaded to connect (a TCTI).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from d1_signer.errors import ConfigurationError

_MAPPED = Path("/proc/self/maps")
_TCTI = "/libtss2-tcti-"
_STACK = re.compile(r"/\S*lib(?:tss2-|tpm2_pkcs11)\S*")


class Connection:
    """Whether a module has a connection to a TPM, and of which process it is.

    Made before the module is loaded: what other code brought into the process is not the module's.
    """

    def __init__(self) -> None:
        self._others = _stack()
        self._owner: int | None = None

    def noted(self) -> None:
        """The module was initialised, or tried to be: it may have a connection from now on."""
        stack = _stack()
        connects = any(_TCTI in library for library in stack)
        if self._owner is None and connects and stack - self._others:
            self._owner = os.getpid()

    def check_not_inherited(self) -> None:
        """Before the module is called.

        Raises:
            ConfigurationError: It was initialised before this process was forked.
        """
        if self._owner not in {None, os.getpid()}:
            raise ConfigurationError(
                "The PKCS#11 module speaks to a TPM and was initialised before this process was "
                "forked; it works in no child.",
                hint='Use isolation="process", or open the first signer on it after the fork.',
                details={"step": "module"},
            )


def _stack() -> set[str]:
    """The libraries of the TPM Software Stack in this process; none where it cannot be told."""
    try:
        return set(_STACK.findall(_MAPPED.read_text("utf-8", "replace")))
    except OSError:
        return set()

# SPDX-License-Identifier: Apache-2.0
"""Which modules have an OpenSSL library context of their own.

Such a module (opencryptoki's from 3.19 on) frees its context in ``C_Finalize``. OpenSSL keeps what
belongs to a thread until the thread ends, and looks it up in the context then: a thread that has
used the module and ends after that crashes, the main thread as the process ends (openssl#16778).
So all calls of such a module are made in threads of ours that never end.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MAKES_A_CONTEXT = b"OSSL_LIB_CTX_new"


def has_own(function: int) -> bool:
    """Whether the module that one of its functions belongs to may make a context.

    Its file has the name of OpenSSL's function in it then, as an import or as a text for ``dlsym``.
    Where it never calls it, all that is lost is the time that another thread costs.
    """
    place = (ctypes.c_void_p * 4)()  # Dl_info, whose first field is the file's name
    try:
        if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), place):
            return False
        content = Path(os.fsdecode(ctypes.string_at(place[0] or 0))).read_bytes()
    except (OSError, ValueError, AttributeError):
        return False
    return _MAKES_A_CONTEXT in content

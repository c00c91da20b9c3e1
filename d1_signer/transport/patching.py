# SPDX-License-Identifier: Apache-2.0
"""gevent and others replace parts of the standard library: what was made before does not fit."""

from __future__ import annotations

import ssl
import sys

from d1_signer.errors import ConfigurationError

# What the classes of this package are made of.
_CONTEXT = ssl.SSLContext


def require_patched_first() -> None:
    """Refuse to go on where the ssl module was replaced later, or certainly will be.

    Setting anything on a context of the old class then calls itself without end, and locks of the
    old kind stop a whole event loop.

    Raises:
        ConfigurationError: It was patched after this package was loaded, or gunicorn's workers will
            do so.
    """
    now = ssl.SSLContext
    if now is not _CONTEXT:
        raise _too_late(f"{now.__module__} has replaced the ssl module after d1_signer was loaded")
    # gunicorn has loaded its worker class, and --preload the application, before it patches.
    monkey = sys.modules.get("gevent.monkey")
    if (
        "gunicorn.workers.ggevent" in sys.modules
        and monkey is not None
        and not monkey.is_module_patched("ssl")
    ):
        raise _too_late("gunicorn's gevent workers replace the ssl module after --preload")


def _too_late(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"Patched too late: {what}.",
        hint="Patch before anything else is imported: `from gevent import monkey; "
        "monkey.patch_all()` as the first line of the program, or of gunicorn's configuration "
        "file (docs/fleet.md, gevent).",
    )

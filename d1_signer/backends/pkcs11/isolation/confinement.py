# SPDX-License-Identifier: Apache-2.0
"""What a child that hosts a module is given, what it leaves behind, and how long it lives.

It holds the PIN and runs a vendor's native code, so it gets no credentials that are no business of
the module's, writes no memory to a disk, and does not outlive who asked for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping

# Whose programs keep secrets, or what leads to them, in variables of these names. A vendor's own
# variables look like any other, so nothing is guessed from words such as TOKEN or PASSWORD.
_CREDENTIALS = (
    *("AWS_*", "AZURE_*", "BAO_*", "CLOUDSDK_*", "D1_*", "GCP_*", "GOOGLE_*", "VAULT_*"),
    *("AMQP_*", "CELERY_*", "DATABASE_*", "MONGO*", "MYSQL_*", "PG*", "POSTGRES*", "REDIS*"),
    *("CI_*", "DOCKER_*", "GH_*", "GITHUB_*", "GITLAB_*", "KUBE*", "NPM_*", "OTEL_*", "PIP_*"),
    *("SENTRY_*", "SSH_*", "TWINE_*", "UV_*"),
)
# A module that reaches its HSM over the network may need its proxy: it stays if it names no user.
_PROXIES = "*_proxy"
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_LOOK_EVERY_MS = 1000


def environment(variables: Mapping[str, str], kept: tuple[str, ...]) -> dict[str, str]:
    """What of a process's variables its child gets.

    Args:
        variables: The process's own.
        kept: Names that stay, as of `fnmatch.fnmatchcase`, whatever they are.
    """
    return {
        name: value
        for name, value in variables.items()
        if _fits(name, kept) or not (_fits(name, _CREDENTIALS) or _is_proxy_with_user(name, value))
    }


def _is_proxy_with_user(name: str, value: str) -> bool:
    # Clients differ in what of a malformed address they take for the user, so any "@" counts.
    return fnmatch.fnmatchcase(name.lower(), _PROXIES) and "@" in value


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def write_no_core() -> None:
    """From here on a crash of this process leaves no file with its memory in it."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    if sys.platform == "linux":
        # A collector behind `kernel.core_pattern` is called whatever the limit is; not for this.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def watch(parent: int, control: socket.socket, end: Callable[[], None]) -> None:
    """Call ``end`` in a thread of its own when the parent has gone, whatever hangs here then.

    Args:
        parent: Its process ID. A copy of its socket may be open in a process that it has forked.
        control: The socket to it.
        end: Ends this process.
    """
    waiting = select.poll()
    waiting.register(control, 0)  # of what it sends nothing is looked at, only that it has ended

    def wait() -> None:
        while os.getppid() == parent and not waiting.poll(_LOOK_EVERY_MS):
            pass
        end()

    threading.Thread(target=wait, daemon=True).start()

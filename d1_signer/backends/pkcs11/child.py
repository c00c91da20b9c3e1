# SPDX-License-Identifier: Apache-2.0
"""One child process that hosts a module, seen from its parent."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import weakref

_SECONDS_TO_END = 3.0
_SECONDS_TO_BE_REAPED = 1.0  # killed; only the kernel's own waiting, for a device, takes longer
_HOST = "d1_signer.backends.pkcs11.host"


class Host:
    """The process and its sockets; `free` and `dead` are the backend's, under its lock."""

    def __init__(self, connections: int) -> None:
        """Start it.

        Args:
            connections: How many calls it serves at once.

        Raises:
            OSError: No sockets, or no process, can be made.
        """
        pairs = [socket.socketpair() for _ in range(connections + 1)]
        theirs = [their for _, their in pairs]
        self.control, *self.free = [our for our, _ in pairs]
        self.size = connections
        self.dead = False
        numbers = [their.fileno() for their in theirs]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, a module of ours)
            # -P: it is given the PIN, so it imports nothing from where it happens to be started.
            [sys.executable, "-P", "-m", _HOST, *map(str, numbers)],
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # the terminal's Ctrl-C is the parent's business
        )
        for their in theirs:
            their.close()
        _hosts.add(self)

    @property
    def busy(self) -> int:
        """Calls under way."""
        return self.size - len(self.free)

    def kill(self) -> None:
        """End it at once, and with it every call that is under way in it."""
        self.dead = True
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # `subprocess` reaps it later
            self.process.wait(_SECONDS_TO_BE_REAPED)
        self.let_go()

    def let_go(self) -> None:
        """Close this side's sockets; the child ends by itself when it notices."""
        self.dead = True
        for connection in (self.control, *self.free):
            connection.close()

    def end(self) -> None:
        """Let it end, by force if it does not."""
        self.let_go()
        try:
            self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.kill()


_hosts: weakref.WeakSet[Host] = weakref.WeakSet()


def let_go_after_fork() -> None:
    """In the child of a fork: the parent's processes are not this one's."""
    for host in list(_hosts):
        # An open copy of its control socket would keep it alive when its parent has gone.
        host.let_go()
        host.process.returncode = 0  # not a child of this process: nothing to wait for

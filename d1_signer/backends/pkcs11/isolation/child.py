# SPDX-License-Identifier: Apache-2.0
"""One child process that hosts a module, seen from its parent."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref

from d1_signer.backends.pkcs11.isolation import confinement
from d1_signer.signing import forks

_SECONDS_TO_END = 3.0
_SECONDS_TO_BE_REAPED = 1.0  # killed; only the kernel's own waiting, for a device, takes longer
_HOST = "d1_signer.backends.pkcs11.isolation.host"


class Host:
    """The process and its sockets; `free`, `dead` and `openings` are the backend's, under its lock.

    `openings` is what it told last.
    """

    def __init__(
        self, connections: int, *, kept_variables: tuple[str, ...], core_dumps: bool
    ) -> None:
        """Start it.

        Args:
            connections: How many calls it serves at once.
            kept_variables: As of `confinement.environment`.
            core_dumps: Whether a crash may leave a core file.

        Raises:
            OSError: No sockets, or no process, can be made.
        """
        self.size = connections
        self.dead = False
        self.openings = b""
        self._kept_variables = kept_variables
        self._core_dumps = core_dumps
        self._sockets: list[socket.socket] = []
        self.process: subprocess.Popen[bytes]
        with _starting:
            _hosts.add(self)
            try:
                self._start()
            except BaseException:
                self.close_all()
                raise

    def _start(self) -> None:
        theirs: list[socket.socket] = []
        for _ in range(self.size + 1):
            pair = socket.socketpair()
            self._sockets += pair
            theirs.append(pair[1])
        self.control, *self.free = self._sockets[::2]
        numbers = [their.fileno() for their in theirs]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, a module of ours)
            # -P: it is given the PIN, so it imports nothing from where it happens to be started.
            [
                *(sys.executable, "-P", "-m", _HOST),
                *map(str, (os.getpid(), int(self._core_dumps), *numbers)),
            ],
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={
                **confinement.environment(os.environ, self._kept_variables),
                "PYTHONPATH": path,
            },
            start_new_session=True,  # the terminal's Ctrl-C is the parent's business
        )
        for their in theirs:
            their.close()

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

    def close_all(self) -> None:
        """Close every socket, where nobody can be using one: not started, or in a fork's child."""
        self.dead = True
        for connection in self._sockets:
            connection.close()

    def end(self, patience: float | None = None) -> None:
        """Let it close its sessions and end, by force if it does not in time."""
        self.let_go()
        try:
            self.process.wait(_SECONDS_TO_END if patience is None else patience)
        except subprocess.TimeoutExpired:
            self.kill()


_hosts: weakref.WeakSet[Host] = weakref.WeakSet()

# A fork waits until a child of ours has been started. Before, the fork's child would inherit the
# other ends of the sockets, and the pipe by which `subprocess` sees that it started: open in there,
# they hide that ours has ended.
_starting = threading.RLock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release)


def _let_go_after_fork() -> None:
    """In the child of a fork: the parent's processes are not this one's."""
    # As the standard library does; see concurrent.futures.thread.
    _starting._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001
    for host in list(_hosts):
        # An open copy of its control socket would keep it alive when its parent has gone.
        host.close_all()
        if hasattr(host, "process"):
            host.process.returncode = 0  # not a child of this process: nothing to wait for


forks.in_child(_let_go_after_fork)

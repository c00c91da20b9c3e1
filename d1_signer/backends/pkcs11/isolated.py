# SPDX-License-Identifier: Apache-2.0
"""The same key with the module hosted in child processes: ``isolation="process"``.

A vendor's library that hangs, crashes or leaks costs a child, which is killed and replaced. The
module is never loaded here, and the PIN is only passed on (a prompt's is kept for the next child).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from d1_signer.backend import SignatureEncoding
from d1_signer.backends.pkcs11.gate import remaining
from d1_signer.backends.pkcs11.login import refused
from d1_signer.backends.pkcs11.recovery import Circuit
from d1_signer.backends.pkcs11.wire import (
    CUSTODY,
    DONE,
    OPEN,
    SIGN,
    Gone,
    decoded_error,
    receive,
    send,
)
from d1_signer.custody import Assurance, Evidence, Fact
from d1_signer.errors import (
    D1SignerError,
    KeyMismatchError,
    SignerClosedError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret, SecretSource, read_secret

_SECONDS_TO_START = 10.0  # Python, the module and its login; then the child is taken as hung
_SECONDS_TO_END = 3.0
_HOST = "d1_signer.backends.pkcs11.host"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """What each child opens, and how many there are."""

    uri: str = field(repr=False)  # may hold a PIN
    location: str
    options: dict[str, Any]
    pin_source: SecretSource | None
    processes: int
    connections: int
    patience: float
    timeout: float | None


class _Host:
    """One child process, seen from its parent."""

    def __init__(self, connections: int) -> None:
        pairs = [socket.socketpair() for _ in range(connections + 1)]
        theirs = [their for _, their in pairs]
        self.control, *self.free = [our for our, _ in pairs]
        self.size = connections
        self.ready = False
        self.dead = False
        numbers = [their.fileno() for their in theirs]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, a module of ours)
            [sys.executable, "-m", _HOST, *map(str, numbers)],
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
        return self.size - len(self.free)

    def kill(self) -> None:
        """End the child at once, and with it every call that is under way in it."""
        self.dead = True
        self.process.kill()
        self.process.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close this side's sockets; the child ends by itself when it notices."""
        self.dead = True
        for connection in (self.control, *self.free):
            connection.close()

    def end(self) -> None:
        """Let the child end, by force if it does not."""
        self.let_go()
        try:
            self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.kill()


class IsolatedBackend:
    """A key in a PKCS#11 token, the module in child processes; safe in threads and after fork."""

    name = "pkcs11"
    encoding = SignatureEncoding.RAW

    def __init__(self, settings: HostSettings) -> None:
        """Start the children and open the key in each.

        Raises:
            D1SignerError: It cannot be opened; ``details["step"]`` names the step that failed.
        """
        self._settings = settings
        self._pin: Secret | None = None
        self._pinned: PublicKey | None = None
        self._renew()
        _all.add(self)
        try:
            connection = self._take(self._deadline(None))
            self._give(*connection)
        except BaseException:
            self.close()
            raise

    def _renew(self) -> None:
        self._lock = threading.Lock()  # taken by itself, as in `pool`
        self._changed = threading.Condition(self._lock)
        self._hosts: list[_Host] = []
        self._starting = 0
        self._error: D1SignerError | None = None
        self._circuit = Circuit(self._settings.location)
        self._closed = False

    # -- the Backend protocol -----------------------------------------------------------------

    def public_key(self) -> PublicKey:
        """The public key, pinned at opening."""
        assert self._pinned is not None  # noqa: S101 (set before the first connection is ready)
        return self._pinned

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes; the answer is r||s, 64 bytes."""
        return self._asked(SIGN, digest, self._deadline(deadline))

    def custody(self) -> Evidence:
        """Ask the token what it claims about the key."""
        document = json.loads(self._asked(CUSTODY, b"", self._deadline(None)))
        facts = [
            Fact(**{**fact, "assurance": Assurance(fact["assurance"])})
            for fact in document.pop("facts")
        ]
        facts.append(Fact(name="isolation", value="process", source="d1_signer"))
        return Evidence(**document, facts=tuple(facts))

    def close(self) -> None:
        """End the children; calling it again does nothing."""
        with self._lock:
            self._closed = True
            hosts, self._hosts = self._hosts, []
            self._changed.notify_all()
        for host in hosts:
            host.end()

    # -- asking a child -----------------------------------------------------------------------

    def _deadline(self, deadline: float | None) -> float | None:
        if deadline is None and self._settings.timeout is not None:
            return time.monotonic() + self._settings.timeout
        return deadline

    def _asked(self, kind: bytes, body: bytes, deadline: float | None) -> bytes:
        """Ask once; once more where the child was killed for another caller's deadline."""
        try:
            return self._asked_once(kind, body, deadline)
        except _Killed:
            pass
        try:
            return self._asked_once(kind, body, deadline)
        except _Killed:
            raise _died() from None

    def _asked_once(self, kind: bytes, body: bytes, deadline: float | None) -> bytes:
        host, connection = self._take(deadline)
        left = remaining(deadline)
        if left == 0:
            self._give(host, connection)
            raise _too_late()
        try:
            if left is not None or connection.gettimeout() is not None:  # each costs a system call
                connection.settimeout(left)
            send(connection, kind, body)
            answered, answer = receive(connection)
        except TimeoutError:
            connection.close()
            self._discard(host)
            raise _too_late() from None
        except Gone:
            killed = host.dead
            connection.close()
            self._discard(host)
            if killed:
                raise _Killed from None
            raise _died() from None
        self._give(host, connection)
        self._circuit.closed_by_success()
        if answered == DONE:
            return answer
        error, more = decoded_error(answer)
        refused.merge(more["refused"])
        raise error

    def _take(self, deadline: float | None) -> tuple[_Host, socket.socket]:
        """A free connection of the child with the fewest calls under way."""
        limit = time.monotonic() + self._settings.patience
        if deadline is not None:
            limit = min(limit, deadline)
        with self._lock:
            while True:
                if self._closed:
                    raise SignerClosedError("The PKCS#11 signer is closed.", hint="Open it anew.")
                able = [host for host in self._hosts if host.free]
                if able:
                    host = min(able, key=lambda host: host.busy) if len(able) > 1 else able[0]
                    return host, host.free.pop()
                self._start_missing()
                if not self._changed.wait(max(0.0, limit - time.monotonic())):
                    raise SignerTimeout(
                        "No process that hosts the PKCS#11 module was free in time.",
                        hint="Check the HSM; else raise max_sessions, processes or timeout.",
                    )
                if self._error is not None and not self._hosts and not self._starting:
                    raise self._error.fresh()

    def _give(self, host: _Host, connection: socket.socket) -> None:
        with self._lock:
            if host.dead or self._closed:
                connection.close()
                return
            host.free.append(connection)
            self._changed.notify()

    # -- children -----------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """Start the children that are missing, unless the last ones failed just now."""
        missing = self._settings.processes - len(self._hosts) - self._starting
        if missing > 0 and not self._hosts and not self._starting:
            self._circuit.check()
        for _ in range(missing):
            self._starting += 1
            threading.Thread(target=self._start, name="d1-signer-host", daemon=True).start()

    def _start(self) -> None:
        host: _Host | None = None
        error: D1SignerError | None = None
        try:
            host = _Host(self._settings.connections)
            self._open(host)
        except D1SignerError as failure:
            error = failure
        except (OSError, ValueError, KeyError) as failure:
            error = SignerUnavailable(
                f"The process that hosts the PKCS#11 module does not start: {failure}.",
                hint="Check the process limits of this user.",
                details={"step": "module"},
            )
        if error is not None and host is not None:
            host.kill()
        with self._lock:
            self._starting -= 1
            self._error = error
            if error is not None:
                self._circuit.opened_by(error)
            elif host is not None and not self._closed:
                self._hosts.append(host)
                host = None
            self._changed.notify_all()
        if error is None and host is not None:
            host.end()  # the signer was closed meanwhile

    def _open(self, host: _Host) -> None:
        host.control.settimeout(_SECONDS_TO_START)
        opened = self._told_to_open(host)
        if isinstance(opened, D1SignerError):
            raise opened
        public = PublicKey.from_pem(opened)
        with self._lock:
            if self._pinned is None:
                self._pinned = public
        if public != self._pinned:
            raise KeyMismatchError(
                "The token's key is not the one that was pinned at opening.",
                hint="Check whether the key was replaced.",
                details={"step": "key"},
            )

    def _told_to_open(self, host: _Host) -> bytes | D1SignerError:
        """The key in PEM, or why not: returned, since what is raised here would carry the PIN."""
        request = {
            "uri": self._settings.uri,
            "options": self._settings.options,
            "refused": refused.export(),
            **self._pin_to_pass_on(),
        }
        try:
            send(host.control, OPEN, json.dumps(request).encode())
            answered, answer = receive(host.control)
        except TimeoutError:
            return SignerUnavailable(
                "The PKCS#11 module did not open the key in time.",
                hint="Check the HSM and its connection.",
                details={"step": "token"},
            )
        except Gone:
            return _died()
        if answered == DONE:
            return answer
        error, more = decoded_error(answer)
        refused.merge(more["refused"])
        return error

    def _pin_to_pass_on(self) -> dict[str, str]:
        """What the child cannot read by itself: a callable's answer, or a prompt's."""
        source = self._settings.pin_source
        if source is None:
            return {}
        if source == "prompt":
            if self._pin is None:
                self._pin = read_secret(source, what="PIN")
            return {"pin": self._pin.reveal()}
        return {"pin": read_secret(source, what="PIN").reveal()}

    def _discard(self, host: _Host) -> None:
        """Kill a child, and start its successor at once."""
        with self._lock:
            known = host in self._hosts
            if known:
                self._hosts.remove(host)
                host.kill()
                if not self._closed:
                    with contextlib.suppress(D1SignerError):
                        self._start_missing()
            self._changed.notify_all()

    # -- forks --------------------------------------------------------------------------------

    def renew_in_child(self) -> None:
        """Leave the parent's children alone; the first signature starts own ones."""
        closed = self._closed
        self._renew()
        self._closed = closed

    def __repr__(self) -> str:
        return f"<IsolatedBackend {self._settings.location}>"


class _Killed(Exception):
    """The child was killed for another caller's deadline."""


_all: weakref.WeakSet[IsolatedBackend] = weakref.WeakSet()
_hosts: weakref.WeakSet[_Host] = weakref.WeakSet()


def _renew_all() -> None:
    for host in list(_hosts):
        # An open copy of its control socket would keep it alive when its parent has gone.
        host.let_go()
        host.process.returncode = 0  # not a child of this process: nothing to wait for
    for backend in list(_all):
        backend.renew_in_child()


os.register_at_fork(after_in_child=_renew_all)


def _died() -> SignerUnavailable:
    return SignerUnavailable(
        "The process that hosts the PKCS#11 module has ended; it is replaced.",
        hint="If it happens again, look at what the vendor's library writes to standard error.",
        details={"step": "signature"},
    )


def _too_late() -> SignerTimeout:
    return SignerTimeout(
        "The HSM gave no answer within the deadline.",
        hint="Check the HSM and its connection, or allow more time.",
    )

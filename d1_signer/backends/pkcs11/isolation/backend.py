# SPDX-License-Identifier: Apache-2.0
"""The same key with the module hosted in child processes: ``isolation="process"``.

A vendor's library that hangs, crashes or leaks costs a child, which is killed and replaced. The
module is never loaded here, and the PIN is only passed on (see `opening`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
import weakref

from d1_signer.backends.pkcs11.isolation.answers import (
    Again,
    died,
    signed,
    too_late,
)
from d1_signer.backends.pkcs11.isolation.child import Host
from d1_signer.backends.pkcs11.isolation.opening import (
    HostSettings,
    Opener,
    not_started,
    renew_turns_after_fork,
)
from d1_signer.backends.pkcs11.isolation.wire import (
    CUSTODY,
    DONE,
    SIGN,
    Gone,
    decoded_error,
    receive,
    send,
)
from d1_signer.backends.pkcs11.module.gate import remaining
from d1_signer.backends.pkcs11.session.pin import refused
from d1_signer.backends.pkcs11.session.recovery import Circuit, Remedy
from d1_signer.custody.evidence import Assurance, Evidence, Fact
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    KeyMismatchError,
    KeyNotFoundError,
    SignerClosedError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing import forks
from d1_signer.signing.backend import SignatureEncoding

__all__ = ["HostSettings", "IsolatedBackend"]

_Taken = tuple[Host, socket.socket]

_GONE = {
    "module": "The PKCS#11 module does not work any more",
    "token": "The token is not there any more",
}


class IsolatedBackend:
    """A key in a PKCS#11 token, the module in child processes; safe in threads and after fork."""

    name = "pkcs11"
    encoding = SignatureEncoding.RAW

    def __init__(self, settings: HostSettings) -> None:
        """Start one child, which opens the key, and the others once it has.

        It takes ``timeout``, or 10 seconds, at most, beside reading the PIN and waiting for other
        signers that are being opened on the token. A successor, which nobody waits for, has 10.

        Raises:
            D1SignerError: It cannot be opened; ``details["step"]`` names the step that failed.
        """
        forks.notice()
        self._settings = settings
        self._count = itertools.count(1)
        self.openings = 0  # see `d1_signer.signing.backend.Reopening`
        self._opener = Opener(settings)
        self._renew()
        host, self._pinned = self._opener.open(settings.timeout)
        self._hosts.append(host)
        _all.add(self)
        with self._lock, contextlib.suppress(D1SignerError):
            self._start_next()

    def _renew(self) -> None:
        self._lock = threading.Lock()  # taken by itself, as in `pool`
        self._changed = threading.Condition(self._lock)
        self._hosts: list[Host] = []
        self._starting = False
        self._failures = 0
        self._error: D1SignerError | None = None
        self._circuit = Circuit(self._settings.location)
        self._replacing = Remedy()
        self._closed = False

    # -- the Backend protocol -----------------------------------------------------------------

    def public_key(self) -> PublicKey:
        """The public key, pinned at opening."""
        return self._pinned

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes; the answer is r||s, 64 bytes."""
        return self._asked(SIGN, digest, self._deadline(deadline))

    def custody(self) -> Evidence:
        """Ask the token what it claims about the key."""
        return self.custody_within(None)

    def custody_within(self, deadline: float | None) -> Evidence:
        """As `custody`; see `d1_signer.signing.backend.Reopening`."""
        document = json.loads(self._asked(CUSTODY, b"", self._deadline(deadline)))
        facts = [
            Fact(**{**fact, "assurance": Assurance(fact["assurance"])})
            for fact in document.pop("facts")
        ]
        facts.append(Fact(name="isolation", value="process", source="d1_signer"))
        return Evidence(**document, facts=tuple(facts))

    def pool_use(self) -> tuple[int, int]:
        """Connections in use, and how many there may be; see `d1_signer.signing.backend.Pooled`."""
        forks.notice()
        with self._lock:
            busy = sum(host.busy for host in self._hosts)
        return busy, self._settings.connections * self._settings.processes

    def close(self) -> None:
        """End the children; calling it again does nothing."""
        forks.notice()
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
        """Ask once; once more where the child was killed for another caller, or is replaced."""
        forks.notice()
        try:
            return self._asked_once(kind, body, deadline)
        except Again as again:
            reason = again.reason
        helped = False
        try:
            answer = self._asked_once(kind, body, deadline)
            helped = True
        except Again:
            raise reason or died(self._settings.location) from None
        finally:
            if reason is not None:
                self._replacing.taken(helped=helped)
        return answer

    def _asked_once(self, kind: bytes, body: bytes, deadline: float | None) -> bytes:
        taken: list[_Taken] = []
        try:
            host, connection = self._take(taken, deadline)
            left = remaining(deadline)
            if left == 0:
                self._give(host, connection)
                raise too_late(self._settings.location)  # noqa: TRY301 (the whole use of a connection is in here)
            if left is not None or connection.gettimeout() is not None:  # each costs a system call
                connection.settimeout(left)
            send(connection, kind, body)
            answered, answer = receive(connection, deadline)
            self._give(host, connection)
        except TimeoutError:
            self._lost(taken)
            raise too_late(self._settings.location) from None
        except Gone:
            if self._lost(taken):
                raise Again from None
            raise died(self._settings.location) from None
        except D1SignerError:
            raise
        except BaseException:
            # A signal's handler raised in the middle of an answer: what is left of it must not
            # be taken for the next one's.
            self._lost(taken)
            raise
        if answered == DONE:
            return self._signed(host, answer) if kind == SIGN else answer
        raise self._failure(answer, host, deadline)

    def _signed(self, host: Host, answer: bytes) -> bytes:
        signature, openings = signed(answer)
        if openings != host.openings:  # the child is new, or has opened the key anew
            host.openings = openings
            self.openings = next(self._count)
        return signature

    def _failure(self, answer: bytes, host: Host, deadline: float | None) -> Exception:
        try:
            error, more = decoded_error(answer)
        except Gone:
            return died(self._settings.location)
        refused.merge(more["refused"])
        if host.dead:
            return Again()
        if error.details.get("needs") == "process" and self._replacing.due:
            self._replace(host, deadline)
            return Again(error)
        return error

    def _take(self, taken: list[_Taken], deadline: float | None) -> _Taken:
        """A free connection of the child with the fewest calls under way; `taken` gets it too."""
        limit = time.monotonic() + self._settings.patience
        if deadline is not None:
            limit = min(limit, deadline)
        with self._lock:
            try:
                return self._taken(taken, limit)
            except BaseException:
                self._changed.notify()  # this thread may have been told of a free connection
                raise

    def _taken(self, taken: list[_Taken], limit: float) -> _Taken:
        failures = self._failures
        while True:
            if self._closed:
                raise SignerClosedError("The PKCS#11 signer is closed.", hint="Open it anew.")
            able = [host for host in self._hosts if host.free]
            if able:
                host = min(able, key=lambda host: host.busy) if len(able) > 1 else able[0]
                found = host, host.free[-1]
                del host.free[-1]  # no signal's handler comes between this and the next step
                taken.append(found)
                return found
            if self._error is not None and self._failures != failures and not self._hosts:
                raise self._error.fresh()
            self._start_next()
            if not self._changed.wait(max(0.0, limit - time.monotonic())):
                raise SignerTimeout(
                    "No process that hosts the PKCS#11 module was free in time.",
                    hint="Check the HSM; else raise max_sessions, processes or timeout.",
                )

    def _give(self, host: Host, connection: socket.socket) -> None:
        with self._lock:
            if host.dead or self._closed:
                connection.close()
                return
            host.free.append(connection)
            self._changed.notify()

    # -- children -----------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Start a child that is missing, unless one is starting or has failed to just now.

        One at a time: each logs in, and a PIN that has become wrong must reach the token once only.
        The lock is held.

        Raises:
            D1SignerError: None can be started, and there is none.
        """
        if self._starting or len(self._hosts) >= self._settings.processes:
            return
        try:
            self._circuit.check()
        except D1SignerError:
            if self._hosts:
                return
            raise
        self._starting = True
        try:
            threading.Thread(target=self._start, name="d1-signer-host", daemon=True).start()
        except RuntimeError as failure:
            self._starting = False
            if not self._hosts:
                raise not_started(str(failure)) from None

    def _start(self) -> None:
        host: Host | None = None
        error: D1SignerError | None = not_started("its thread has ended")
        try:
            host = self._opened()
            error = None
        except D1SignerError as failure:
            error = failure
        finally:
            self._started(host, error)

    def _started(self, host: Host | None, error: D1SignerError | None) -> None:
        with self._lock:
            self._starting = False
            if error is not None:
                self._error = error
                self._failures += 1
                self._circuit.opened_by(error)
            elif host is not None and not self._closed:
                self._circuit.closed_by_success()
                self._hosts.append(host)
                host = None
                with contextlib.suppress(D1SignerError):
                    self._start_next()
            self._changed.notify_all()
        if host is not None:
            host.end()  # the signer was closed meanwhile

    def _opened(self) -> Host:
        try:
            host, public = self._opener.open()
        except (ConfigurationError, KeyNotFoundError) as failure:
            gone = _GONE.get(str(failure.details.get("step")))
            if gone is None:
                raise
            # It was there when the signer was opened, so it is away and may come back.
            raise SignerUnavailable(
                f"{gone}: {failure.message}",
                hint="Check that the device is connected; it is looked for again by itself.",
                details=failure.details,
            ) from None
        if public == self._pinned:
            return host
        host.kill()
        raise KeyMismatchError(
            "The token's key is not the one that was pinned at opening.",
            hint="Check whether the key was replaced.",
            details={"step": "key"},
        )

    def _lost(self, taken: list[_Taken]) -> bool:
        """Give up the connection that was taken, if any; whether its child was killed before."""
        killed = False
        for host, connection in taken:
            killed = host.dead
            self._discard(host, connection)
        return killed

    def _discard(self, host: Host, connection: socket.socket) -> None:
        """Kill a child, and start its successor at once."""
        with self._lock:
            known = host in self._hosts
            if known:
                self._hosts.remove(host)
                host.dead = True
                if not self._closed:
                    with contextlib.suppress(D1SignerError):
                        self._start_next()
            self._changed.notify_all()
        connection.close()
        if known:
            host.kill()

    def _replace(self, host: Host, deadline: float | None) -> None:
        """Let a child close its sessions and end; the next call starts its successor."""
        with self._lock:
            known = host in self._hosts
            if known:
                self._hosts.remove(host)
                host.dead = True
        if known:
            host.end(remaining(deadline))

    # -- forks --------------------------------------------------------------------------------

    def renew_in_child(self) -> None:
        """Leave the parent's children alone; the first signature starts own ones."""
        closed = self._closed
        self._renew()
        self._closed = closed

    def __repr__(self) -> str:
        return f"<IsolatedBackend {self._settings.location}>"


_all: weakref.WeakSet[IsolatedBackend] = weakref.WeakSet()


def _renew_all() -> None:
    renew_turns_after_fork()
    for backend in list(_all):
        backend.renew_in_child()


forks.in_child(_renew_all)

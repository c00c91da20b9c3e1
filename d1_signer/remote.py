# SPDX-License-Identifier: Apache-2.0
"""What backends over a network share: a client for each process, and a bound on each call."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import SplitResult, urlsplit

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssl_match_hostname import CertificateError

from d1_signer.bounded_response import BoundedReader, BoundedResponse
from d1_signer.errors import ConfigurationError, IntegrityError, SignerTimeout, SignerUnavailable
from d1_signer.hosts import is_loopback

T = TypeVar("T")

# More threads than connections would work too, but warn for each connection thrown away.
CONNECTIONS = 128
_LARGEST_ANSWER = 1 << 20

# A firewall forgets idle connections without a word; each one that it forgot would cost a time-out.
_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # Linux: after a minute, and not after two hours
    _KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


class PerProcess(Generic[T]):
    """An object that each process makes for itself, when it first needs it.

    What a child inherits over a fork is neither used nor cleaned up there: its connections belong
    to the parent, and its threads do not exist.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Keep ``make``, which is called once in each process, by one thread at a time."""
        self._make = make
        # One lock for each: a caller's function may use another signer of ours, and one service
        # that hangs must not hold up the others.
        self._lock = threading.RLock()
        self._made: tuple[int, T] | None = None
        self._inherited: list[T] = []
        _all.add(self)

    def get(self) -> T:
        """The object of this process."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        with self._lock:
            made = self._made
            if made is not None and made[0] == os.getpid():
                return made[1]
            value = self._make()
            if made is not None:
                self._inherited.append(made[1])
            self._made = (os.getpid(), value)
            return value

    def made_here(self) -> T | None:
        """The object of this process, or None where it was not made yet."""
        made = self._made
        return made[1] if made is not None and made[0] == os.getpid() else None


_all: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


def _new_locks() -> None:
    # The parent's may have been held at the moment of the fork.
    for one in list(_all):
        one._lock = threading.RLock()  # noqa: SLF001 (this module's own class)


os.register_at_fork(after_in_child=_new_locks)


def only_in_this_process(value: T, what: str) -> Callable[[], T]:
    """Give ``value`` in this process; in a forked child, refuse to use what it inherited."""
    owner = os.getpid()

    def get() -> T:
        if os.getpid() != owner:
            raise ConfigurationError(
                f"The {what} was given as an object, and this process was forked after that.",
                hint="Give a function that makes it: it is called once in each process.",
            )
        return value

    return get


_LONGEST_WAIT_TO_FORK = 15.0  # seconds


class ForkGate:
    """Lets no process be forked while a thread is where a library does not survive it.

    Between such calls a fork is safe. gRPC: its own fork handlers give up while another thread
    calls, and then one child in ten waits for ever on a channel that it made itself. OpenSSL: one
    child in two thousand waited for ever on a lock that a handshake of its parent had held.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._reset,
        )

    def _reset(self) -> None:
        # A forked child has none of the threads that were in calls or about to fork.
        self._changed = threading.Condition()
        self._calls = 0
        self._forks = 0

    @contextlib.contextmanager
    def call(self, until: float) -> Iterator[None]:
        """A call which a fork waits for; begun after the forks that are under way.

        Args:
            until: Moment on ``time.monotonic()`` by which the call is to be over.

        Raises:
            SignerTimeout: It is not begun by then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._forks, until - time.monotonic()):
                raise no_time_left()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                if self._forks and not self._calls:
                    self._changed.notify_all()

    def _before_fork(self) -> None:
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: not self._calls, _LONGEST_WAIT_TO_FORK)

    def _after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


fork_gate = ForkGate()


def within(deadline: float, work: Callable[[], T]) -> T:
    """Do blocking work in a thread of its own and wait for it until the deadline.

    Names are resolved, and SDKs look for credentials, under no time limit; so only leaving the call
    to another thread bounds it. After the deadline, its result is dropped.

    Args:
        deadline: Moment on ``time.monotonic()``.
        work: What to do; its exceptions are raised here.

    Raises:
        SignerTimeout: The deadline passed first.
        SignerUnavailable: No thread can be started.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again by the waiting thread)
            errors.append(error)
        finally:
            done.set()

    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise no_time_left()
    try:
        threading.Thread(target=run, name="d1-signer-call", daemon=True).start()
    except RuntimeError:
        raise SignerUnavailable(
            "No thread can be started for a call with a deadline.",
            hint="The process has reached its limit of threads.",
        ) from None
    if not done.wait(remaining):
        raise no_time_left()
    if errors:
        raise errors[0]
    return results[0]


def no_time_left() -> SignerTimeout:
    """The error for a deadline that has passed."""
    return SignerTimeout(
        "The service gave no answer within the deadline.",
        hint="Check that it can be reached, or allow more time.",
    )


def check_endpoint(url: str, what: str) -> None:
    """Refuse an endpoint that is not https; plain http is for loopback addresses only.

    Raises:
        ConfigurationError: Another scheme, no host, user information, or http to another machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"The {what} is not a URL.") from None
    if parts.scheme not in {"https", "http"} or not host or "@" in parts.netloc:
        raise ConfigurationError(
            f"The {what} is not a URL of the form https://HOST[:PORT].",
            hint="Credentials never stand in it.",
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"The {what} is plain http to {host}.",
            hint="Use https; plain http is taken for a loopback address only.",
        )


def check_proxy(url: str) -> None:
    """Refuse a proxy that is not ``http://HOST:PORT``.

    Raises:
        ConfigurationError: Another form. A proxy that is itself reached by TLS would need a trust
            of its own, and credentials never stand in a URL.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        good = False
    if not good or "@" in url:
        raise ConfigurationError(
            "The proxy cannot be used.", hint="Write http://HOST:PORT, without credentials."
        )


def is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused, which stays so; anything else about TLS may pass."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        cause = todo.pop()
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        if isinstance(cause, ssl.SSLCertVerificationError | CertificateError):
            return True
        seen.add(id(cause))
        todo += [cause.__cause__, cause.__context__, *cause.args]
    return False


# -- HTTP -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Http:
    """HTTP to a service: each exchange ends by a moment, and no answer has more than 1 MiB.

    urllib3's own limit is for each read, which a server that sends byte after byte never reaches.
    Nothing of the environment is used, and no redirect is followed. Thread-safe; one for each
    process.
    """

    def __init__(
        self,
        what: str,
        context: ssl.SSLContext,
        *,
        connect_timeout: float,
        read_timeout: float,
        proxy: str | None = None,
    ) -> None:
        """Prepare connections; none is opened yet.

        Args:
            what: The service, for error texts.
            context: For every https connection.
            connect_timeout: Seconds for each attempt to connect.
            read_timeout: Seconds for each wait for bytes.
            proxy: URL of the proxy for https, or None.
        """
        self._what = what
        self._limits = (connect_timeout, read_timeout)
        options: dict[str, Any] = {
            "maxsize": CONNECTIONS,
            "ssl_context": context,
            "socket_options": [*HTTPConnection.default_socket_options, *_KEEP_ALIVE],
        }
        direct = PoolManager(**options)
        self._managers = {
            "http": direct,
            "https": direct if proxy is None else ProxyManager(proxy, **options),
        }
        self._pools: dict[tuple[str, ...], HTTPConnectionPool] = {}
        for manager in self._managers.values():
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def exchange(
        self, method: str, url: str, *, headers: Mapping[str, Any], body: bytes | None, until: float
    ) -> Answer:
        """Send one request and read the whole answer.

        Args:
            method: HTTP method.
            url: Where to.
            headers: The request's headers.
            body: Its body, or None.
            until: Moment on ``time.monotonic()``.

        Raises:
            SignerTimeout: The moment has passed, and nothing was sent.
            IntegrityError: The answer is too large.
            urllib3.exceptions.HTTPError: Any other failure.
        """
        left = until - time.monotonic()
        if left <= 0:
            raise no_time_left()
        connect, read = (min(limit, left) for limit in self._limits)
        parts = urlsplit(url)
        reset = _until.set(until)
        try:
            response = self._pool(parts).urlopen(
                method,
                f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}",
                body=body,
                headers=headers,
                redirect=False,
                retries=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=connect, read=read),
            )
            length = response.headers.get("Content-Length", "")
            # What is told counts for nothing where the body comes in chunks.
            told_length = length.isdecimal() and "Transfer-Encoding" not in response.headers
            bounded = told_length and int(length) <= _LARGEST_ANSWER
            # A read with a limit of its own takes much longer: for answers of no known length.
            told = response.read() if bounded else response.read(_LARGEST_ANSWER + 1)
            if len(told) > _LARGEST_ANSWER:
                response.close()
                raise IntegrityError(
                    f"{self._what} gave an answer of more than 1 MiB.",
                    hint=f"Something between this process and {self._what} alters answers.",
                )
            response.release_conn()
            return Answer(response.status, response.headers, told)
        finally:
            _until.reset(reset)

    def _pool(self, parts: SplitResult) -> HTTPConnectionPool:
        # Looking for it in the manager would take a twentieth of a call.
        pool = self._pools.get(parts[:2])
        if pool is None:
            url = f"{parts.scheme}://{parts.netloc}"
            pool = self._pools[parts[:2]] = self._managers[parts.scheme].connection_from_url(url)
        return pool

    def close(self) -> None:
        """Close the connections that are kept."""
        for manager in self._managers.values():
            manager.clear()


def tls_context(authorities: str | None) -> ssl.SSLContext:
    """A context that verifies; ``authorities`` is a PEM file, or None for the system's.

    Raises:
        OSError: The file cannot be read.
        ssl.SSLError: It holds no certificates.
    """
    # Not create_default_context(): it writes session keys to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(authorities)
    return context


# urllib3 passes nothing of ours on to a connection.
_until: ContextVar[float] = ContextVar("d1_signer_until")


class _Response(BoundedResponse):
    def reader(self, raw: io.RawIOBase, sock: socket.socket) -> io.RawIOBase:
        return BoundedReader(raw, sock, _until.get())


class _Connection(HTTPConnection):
    response_class = _Response  # type: ignore[mutable-override]
    _held: list[bytes] | None = None

    def request(self, *args: Any, **options: Any) -> None:
        # urllib3 sends head and body apart, which costs a tenth of a call.
        self._held = []
        try:
            super().request(*args, **options)
        finally:
            held, self._held = self._held, None
        self.send(b"".join(held))

    def send(self, data: Any) -> None:
        if self._held is None:
            super().send(data)
        else:
            self._held.append(data)

    def connect(self) -> None:
        with fork_gate.call(_until.get()):
            super().connect()

    def _new_conn(self) -> socket.socket:
        until = _until.get()
        # In a thread of its own, since a name is resolved in it; it is rare.
        sock = within(until, super()._new_conn)
        left = until - time.monotonic()
        if left <= 0:
            sock.close()
            raise no_time_left()
        # For the handshake, which Python bounds as a whole.
        sock.settimeout(min(left, sock.gettimeout() or left))
        return sock


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[mutable-override]


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection  # type: ignore[mutable-override]

# SPDX-License-Identifier: Apache-2.0
"""TLS contexts that verify, and their sockets.

Verification of the server cannot be switched off, here or by what a caller does to a session.
"""

from __future__ import annotations

import errno
import os
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cryptography import x509

from d1_signer.errors import ConfigurationError
from d1_signer.secret import read_public_file
from d1_signer.signing import forks
from d1_signer.transport import handshake
from d1_signer.transport.failures import note_no_agreement
from d1_signer.transport.processes import fork_gate
from d1_signer.transport.verification import (
    require_verified,
    require_verifying,
    suites_without_certificate,
    unverified,
)

# Seconds, for a socket without a limit.
_LONGEST_HANDSHAKE = 60.0


class VerifiedSocket(ssl.SSLSocket):
    """A TLS socket that carries nothing before its handshake was looked at, and no clear text.

    OpenSSL makes a handshake by itself, where none was made, amid the first read or write.
    """

    _looked_at = False

    def do_handshake(self, *block: bool) -> None:  # gevent's takes no argument
        """Do it; see `ssl.SSLSocket`.

        Raises:
            ssl.SSLCertVerificationError: See `require_verified`.
            D1SignerError: What the signer of the client key raised.
        """
        try:
            require_verifying(self.context)
            until = time.monotonic() + (self.gettimeout() or _LONGEST_HANDSHAKE)
            with fork_gate.call(until), handshake.with_server(self.server_hostname), _told(self):
                super().do_handshake(*block)
            require_verified(self, self.server_hostname or "")
            self._looked_at = True
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise  # a step of one that does not block
        except BaseException:
            self.close()
            raise

    # Arguments are handed on as they come: gevent has others. What is received comes by `read`.

    def read(self, *args: Any, **options: Any) -> Any:
        """Read; see `ssl.SSLSocket`. A server may ask for the client certificate amid it."""
        _require_looked_at(self)
        with handshake.with_server(self.server_hostname):
            return super().read(*args, **options)  # type: ignore[deprecated]

    def write(self, *args: Any, **options: Any) -> int:
        """Write; see `ssl.SSLSocket`."""
        _require_looked_at(self)
        with handshake.with_server(self.server_hostname):
            return super().write(*args, **options)  # type: ignore[deprecated]

    def send(self, *args: Any, **options: Any) -> int:
        """Send; see `ssl.SSLSocket`."""
        _require_looked_at(self)
        with handshake.with_server(self.server_hostname):
            return super().send(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        """Send all of it; see `ssl.SSLSocket`."""
        _require_looked_at(self)
        super().sendall(*args, **options)

    def sendfile(self, *args: Any, **options: Any) -> int:
        """Send a file; see `ssl.SSLSocket`."""
        _require_looked_at(self)
        return super().sendfile(*args, **options)

    def sendto(self, *args: Any) -> int:
        """Not for TLS; see `ssl.SSLSocket`."""
        _require_looked_at(self)
        return super().sendto(*args)

    def shutdown(self, how: int) -> None:
        """End it; see `ssl.SSLSocket`, which would send on in clear text."""
        self._looked_at = False
        super().shutdown(how)

    def unwrap(self) -> Any:
        """End TLS; see `ssl.SSLSocket`, which would send on in clear text."""
        self._looked_at = False
        return super().unwrap()


class VerifiedObject(ssl.SSLObject):
    """The same over buffers in memory, as asyncio has it."""

    _looked_at = False
    _begun = False

    def do_handshake(self) -> None:
        """Do it, or a step of it; see `ssl.SSLObject`.

        Raises:
            ssl.SSLCertVerificationError: See `require_verified`.
            D1SignerError: What the signer of the client key raised.
        """
        if not self._begun:  # what is set later is for others
            require_verifying(self.context)
            self._begun = True
        with handshake.with_server(self.server_hostname), _told(self):
            super().do_handshake()
        require_verified(self, self.server_hostname or "")
        self._looked_at = True

    def read(self, *args: Any, **options: Any) -> Any:
        """Read; see `ssl.SSLObject`. A server may ask for the client certificate amid it."""
        _require_looked_at(self)
        with handshake.with_server(self.server_hostname):
            return super().read(*args, **options)

    def write(self, *args: Any, **options: Any) -> int:
        """Write; see `ssl.SSLObject`."""
        _require_looked_at(self)
        with handshake.with_server(self.server_hostname):
            return super().write(*args, **options)


def _require_looked_at(sock: VerifiedSocket | VerifiedObject) -> None:
    if not sock._looked_at:  # noqa: SLF001 (this module's own classes)
        raise unverified("its handshake was not made by do_handshake(), or it has ended")


@contextmanager
def _told(sock: ssl.SSLSocket | ssl.SSLObject) -> Iterator[None]:
    """Around a handshake: an error tells whether the two sides had agreed on anything by then."""
    try:
        yield
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        raise
    except ssl.SSLError as error:
        if sock.cipher() is None:
            note_no_agreement(error)
        raise


class Lent:
    """A context as urllib3 has it, which changes what it is given.

    It switches off the check of the host name in it, for instance, where somebody has told it to
    use pyOpenSSL: for the caller of whose context that is, and for other threads.
    """

    verify_mode = ssl.CERT_REQUIRED
    check_hostname = True
    _context: ssl.SSLContext

    def __init__(self, context: ssl.SSLContext) -> None:
        """Lend ``context``."""
        vars(self)["_context"] = context

    def __setattr__(self, name: str, value: object) -> None:
        """Change nothing: verification stays as it is."""

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Set them; see `ssl.SSLContext`."""
        self._context.set_alpn_protocols(alpn_protocols)

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """Begin TLS; see `ssl.SSLContext`."""
        return self._context.wrap_socket(*args, **options)


@contextmanager
def as_file(content: bytes) -> Iterator[str]:
    """A path to bytes in memory: OpenSSL takes files, which may change from one look to the next.

    Raises:
        OSError: No memory or descriptor is left for it.
    """
    descriptor = os.memfd_create("d1-signer", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        del content  # it may be a key
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


_contexts: weakref.WeakSet[VerifyingContext] = weakref.WeakSet()


def _new_locks() -> None:
    # The parent's may have been held at the moment of the fork.
    for context in list(_contexts):
        context.changing = threading.RLock()


forks.in_child(_new_locks)


class VerifyingContext(ssl.SSLContext):
    """A context of ours, whose sockets are looked at whoever makes them.

    Attributes:
        before_each: Called before each connection is wrapped.
        changing: Held while the context is changed, and while a connection is made of it: OpenSSL
            takes both at once for neither.
        client_certificate: What it shows; None for nothing.
    """

    sslsocket_class = VerifiedSocket  # type: ignore[mutable-override]
    sslobject_class = VerifiedObject  # type: ignore[mutable-override]
    before_each: Callable[[], None] = staticmethod(lambda: None)
    client_certificate: x509.Certificate | None = None

    def __init__(self, _protocol: int) -> None:
        """Make a lock; what is the ssl module's is made before."""
        self.changing = threading.RLock()
        _contexts.add(self)

    @property
    def check_hostname(self) -> bool:
        """Whether the server's name is looked at: it is.

        Setting it to False does nothing: urllib3 does so in every context that it is given, where
        somebody has told it to use pyOpenSSL.
        """
        return super().check_hostname

    @check_hostname.setter
    def check_hostname(self, value: bool) -> None:
        pass

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """Begin TLS; see `ssl.SSLContext`."""
        self.before_each()
        require_verifying(self)
        return super().wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin TLS over buffers; see `ssl.SSLContext`."""
        self.before_each()
        require_verifying(self)
        return super().wrap_bio(*args, **options)

    def trust(self, authorities: bytes) -> None:
        """Add authorities, in PEM.

        Raises:
            OSError: No memory or descriptor is left for it.
            ssl.SSLError: They are no certificates.
        """
        with as_file(authorities) as path:
            self.load_verify_locations(path)

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Set them; httpx does so before each handshake."""
        with self.changing:
            super().set_alpn_protocols(alpn_protocols)

    def _wrap_socket(self, *args: Any, **options: Any) -> Any:
        with self.changing:
            return super()._wrap_socket(*args, **options)  # type: ignore[misc]

    def _wrap_bio(self, *args: Any, **options: Any) -> Any:
        with self.changing:
            return super()._wrap_bio(*args, **options)  # type: ignore[misc]


def verifying_context(authorities: str | None) -> VerifyingContext:
    """A context that verifies the server.

    Args:
        authorities: PEM file of those that may sign its certificate; None: the system's.

    Raises:
        OSError: The file cannot be read, is none, or is larger than 1 MiB.
        ssl.SSLError: It holds no certificates.
    """
    context = new_context()
    if authorities is None:
        context.load_default_certs()
    else:
        context.trust(read_public_file(authorities))
    return context


def read_authorities(path: str) -> bytes:
    """The content of a PEM file of authorities, for a client that verifies by itself.

    Raises:
        OSError: It cannot be read, is larger than 1 MiB, or holds no certificates.
        ValueError: Not a file name.
    """
    pem = read_public_file(path)
    try:
        new_context().trust(pem)
    except (ssl.SSLError, ValueError):
        raise OSError(errno.EINVAL, "it holds no certificates in PEM") from None
    return pem


def new_context() -> VerifyingContext:
    """A context that verifies the server, and knows no authorities yet."""
    # Not create_default_context(): it would log session keys where SSLKEYLOGFILE says so.
    context = VerifyingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    refused = suites_without_certificate(context)
    if refused:
        # The system's list without those, so that its policy stays in force. Suites of TLS 1.3 are
        # no part of this list to OpenSSL.
        suites = ((suite["name"], suite["protocol"]) for suite in context.get_ciphers())
        context.set_ciphers(
            ":".join(name for name, tls in suites if tls != "TLSv1.3" and name not in refused)
        )
    return context


def look_at_sockets_of(context: ssl.SSLContext) -> None:
    """Have the sockets of a caller's context looked at as those of ours, whoever makes them.

    Raises:
        ConfigurationError: It does not verify the server, or makes sockets of another kind.
    """
    require_verifying(context)
    ours = (VerifiedSocket, VerifiedObject)
    made = (context.sslsocket_class, context.sslobject_class)
    if made not in ((ssl.SSLSocket, ssl.SSLObject), ours):
        raise ConfigurationError(
            "The ssl.SSLContext makes sockets of a class of its own.",
            hint="Leave sslsocket_class and sslobject_class of the context as they are.",
        )
    context.sslsocket_class, context.sslobject_class = ours

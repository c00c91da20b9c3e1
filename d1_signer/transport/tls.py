# SPDX-License-Identifier: Apache-2.0
"""TLS contexts that verify, and what a handshake must have shown.

Verification of the server cannot be switched off, here or by what a caller does to a session.
"""

from __future__ import annotations

import functools
import re
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from urllib3.util.ssl_match_hostname import CertificateError, match_hostname

from d1_signer.errors import ConfigurationError
from d1_signer.signing import forks
from d1_signer.transport import handshake
from d1_signer.transport.processes import fork_gate

_NEW_ENOUGH = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED)
# Seconds, for a socket without a limit.
_LONGEST_HANDSHAKE = 60.0
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME
_LEAST_RSA, _LEAST_EC = 2048, 224  # bits of a key


class VerifiedSocket(ssl.SSLSocket):
    """A TLS socket that is not given out before its handshake was looked at."""

    def do_handshake(self, *block: bool) -> None:  # gevent's takes no argument
        """Do it; see `ssl.SSLSocket`.

        Raises:
            ssl.SSLCertVerificationError: See `require_verified`.
            D1SignerError: What the signer of the client key raised.
        """
        try:
            require_verifying(self.context)
            until = time.monotonic() + (self.gettimeout() or _LONGEST_HANDSHAKE)
            with fork_gate.call(until), handshake.with_server(self.server_hostname):
                super().do_handshake(*block)
            require_verified(self, self.server_hostname or "")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise  # a step of one that does not block
        except BaseException:
            self.close()
            raise


class VerifiedObject(ssl.SSLObject):
    """The same over buffers in memory, as asyncio has it."""

    def do_handshake(self) -> None:
        """Do it, or a step of it; see `ssl.SSLObject`.

        Raises:
            ssl.SSLCertVerificationError: See `require_verified`.
            D1SignerError: What the signer of the client key raised.
        """
        require_verifying(self.context)
        with handshake.with_server(self.server_hostname):
            super().do_handshake()
        require_verified(self, self.server_hostname or "")


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

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """Begin TLS; see `ssl.SSLContext`."""
        self.before_each()
        return super().wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin TLS over buffers; see `ssl.SSLContext`."""
        self.before_each()
        return super().wrap_bio(*args, **options)

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
        OSError: The file cannot be read.
        ssl.SSLError: It holds no certificates.
    """
    # Not create_default_context(): it would log session keys where SSLKEYLOGFILE says so.
    context = VerifyingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(authorities)
    refused = _suites_without_certificate(context)
    if refused:
        # The system's list without those, so that its policy stays in force. Suites of TLS 1.3 are
        # no part of this list to OpenSSL.
        suites = ((suite["name"], suite["protocol"]) for suite in context.get_ciphers())
        context.set_ciphers(
            ":".join(name for name, tls in suites if tls != "TLSv1.3" and name not in refused)
        )
    return context


def require_verifying(context: ssl.SSLContext | None) -> None:
    """Refuse a context that does not verify the server or that writes its keys to a file.

    Raises:
        ConfigurationError: Verification, the host name check or TLS 1.2 is not enforced, or a
            key log file is set.
    """
    if context is None:
        raise ConfigurationError("A TLS connection has no context of ours.")
    # Our sockets look for the name themselves; urllib3 turns this check off where somebody has told
    # it to use pyOpenSSL.
    named = context.check_hostname or isinstance(context, VerifyingContext)
    if context.verify_mode is not ssl.CERT_REQUIRED or not named:
        raise ConfigurationError(
            "The ssl.SSLContext does not verify the server's certificate and host name.",
            hint="Set verify_mode to CERT_REQUIRED and check_hostname to True.",
        )
    if context.verify_flags & _NO_CHECK_TIME:
        raise ConfigurationError(
            "The ssl.SSLContext does not look at when certificates are valid.",
            hint="Leave X509_V_FLAG_NO_CHECK_TIME out of verify_flags.",
        )
    usual_minimum, usual_suites = _usual()
    if (
        context.minimum_version < ssl.TLSVersion.TLSv1_2
        and context.minimum_version != usual_minimum
    ):
        raise ConfigurationError(
            "The ssl.SSLContext allows TLS below 1.2.",
            hint="Set minimum_version to ssl.TLSVersion.TLSv1_2.",
        )
    if not _suites_without_certificate(context) <= usual_suites:
        raise ConfigurationError(
            "The ssl.SSLContext offers cipher suites that need no server certificate.",
            hint='Leave the ciphers as they are, or add ":!aNULL:!eNULL:!PSK:!SRP" to them.',
        )
    if context.keylog_filename:
        raise ConfigurationError(
            "The ssl.SSLContext logs TLS keys to a file.",
            hint="Unset SSLKEYLOGFILE, or leave keylog_filename unset.",
        )


# With keys that are shared beforehand, with passwords, with nothing; and without encryption.
_NOT_BY_CERTIFICATE = re.compile(r"(^|-)(PSK|SRP|ADH|AECDH|NULL)(-|$)")


def _suites_without_certificate(context: ssl.SSLContext) -> frozenset[str]:
    names = (suite["name"] for suite in context.get_ciphers())
    return frozenset(name for name in names if _NOT_BY_CERTIFICATE.search(name))


@functools.cache
def _usual() -> tuple[ssl.TLSVersion, frozenset[str]]:
    # Builds of Python that leave both to OpenSSL (those of Debian, Ubuntu and RHEL) list suites
    # that nobody negotiates without a key or a password, and no minimum version, which then stands
    # in OpenSSL's own configuration. `require_verified` looks at what was negotiated.
    fresh = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return fresh.minimum_version, _suites_without_certificate(fresh)


def require_verified(sock: object, host: str) -> None:
    """Look at what a handshake came to, before the first byte of a request.

    The settings of a context do not tell all: a callback for keys that are shared beforehand
    (Python 3.13) cannot be read back, and with one no certificate is shown.

    Args:
        sock: The socket, or TLS over buffers, after its handshake.
        host: Name or address that was asked for.

    Raises:
        ssl.SSLCertVerificationError: No certificate was shown and verified, its subjectAltName
            does not have the host, the cipher suite does not rest on it, or TLS is below 1.2.
    """
    if not isinstance(sock, ssl.SSLSocket | ssl.SSLObject):  # urllib3 can be told to use pyOpenSSL
        raise _unverified("the handshake was not made by Python's ssl module")
    suite, version = sock.cipher(), sock.version()
    certificate: Any = sock.getpeercert()
    if version not in {"TLSv1.2", "TLSv1.3"}:
        raise _unverified(f"{version} is too old")
    if suite is None or _NOT_BY_CERTIFICATE.search(suite[0]) or not suite[2]:
        raise _unverified("the cipher suite does not rest on a certificate")
    if not certificate:
        raise _unverified("no certificate was shown")
    if _is_weak(sock.getpeercert(binary_form=True) or b""):
        raise _unverified("its key or its signature is weaker than 112 bits of security")
    try:
        # RFC 9110 section 4.3.4: the name is in subjectAltName; OpenSSL may take a common name.
        match_hostname(certificate, host.strip("[]"))
    except CertificateError:
        raise _unverified(f"its subjectAltName does not have {host}") from None


def _is_weak(der: bytes) -> bool:
    # NIST SP 800-57 part 1, section 5.6.1; a context may have lowered OpenSSL's own level.
    try:
        certificate = x509.load_der_x509_certificate(der)
        key, algorithm = certificate.public_key(), certificate.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm):
        return True
    if isinstance(key, rsa.RSAPublicKey | dsa.DSAPublicKey):
        short = key.key_size < _LEAST_RSA
    else:
        short = isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < _LEAST_EC
    # None: one whose signature has its hash built in (Ed25519).
    return short or isinstance(algorithm, hashes.MD5 | hashes.SHA1)


def _unverified(reason: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, reason)
    error.verify_message = reason
    return error

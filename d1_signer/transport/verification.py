# SPDX-License-Identifier: Apache-2.0
"""What a TLS context must be set to, and what a handshake must have shown."""

from __future__ import annotations

import functools
import re
import ssl
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from urllib3.util.ssl_match_hostname import CertificateError, match_hostname

from d1_signer.errors import ConfigurationError

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME
_LEAST_RSA, _LEAST_EC = 2048, 224  # bits of a key


def require_verifying(context: ssl.SSLContext | None) -> None:
    """Refuse a context that does not verify the server or that writes its keys to a file.

    Raises:
        ConfigurationError: Verification, the host name check or TLS 1.2 is not enforced, or a
            key log file is set.
    """
    if context is None:
        raise ConfigurationError("A TLS connection has no context of ours.")
    if context.verify_mode is not ssl.CERT_REQUIRED or not context.check_hostname:
        raise ConfigurationError(
            "The ssl.SSLContext does not verify the server's certificate and host name.",
            hint="Set verify_mode to CERT_REQUIRED and check_hostname to True. urllib3 sets the "
            "latter to False where pyOpenSSL is injected: share this context with no other client.",
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
    if not suites_without_certificate(context) <= usual_suites:
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


def suites_without_certificate(context: ssl.SSLContext) -> frozenset[str]:
    """The cipher suites of a context that do not rest on a certificate of the server."""
    return _without_certificate(tuple(suite["name"] for suite in context.get_ciphers()))


@functools.lru_cache(maxsize=16)
def _without_certificate(names: tuple[str, ...]) -> frozenset[str]:
    # Kept: it is looked at in each handshake, and the names are nearly always the same.
    return frozenset(name for name in names if _NOT_BY_CERTIFICATE.search(name))


@functools.cache
def _usual() -> tuple[ssl.TLSVersion, frozenset[str]]:
    # Builds of Python that leave both to OpenSSL (those of Debian, Ubuntu and RHEL) list suites
    # that nobody negotiates without a key or a password, and no minimum version, which then stands
    # in OpenSSL's own configuration. `require_verified` looks at what was negotiated.
    fresh = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return fresh.minimum_version, suites_without_certificate(fresh)


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
        raise unverified("the handshake was not made by Python's ssl module")
    suite, version = sock.cipher(), sock.version()
    certificate: Any = sock.getpeercert()
    if version not in {"TLSv1.2", "TLSv1.3"}:
        raise unverified(f"{version} is too old")
    if suite is None or _NOT_BY_CERTIFICATE.search(suite[0]) or not suite[2]:
        raise unverified("the cipher suite does not rest on a certificate")
    if not certificate:
        raise unverified("no certificate was shown")
    if _is_weak(sock.getpeercert(binary_form=True) or b""):
        raise unverified("its key or its signature is weaker than 112 bits of security")
    try:
        # RFC 9110 section 4.3.4: the name is in subjectAltName; OpenSSL may take a common name.
        match_hostname(certificate, host.strip("[]"))
    except CertificateError:
        raise unverified(f"its subjectAltName does not have {host}") from None


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


def unverified(reason: str) -> ssl.SSLCertVerificationError:
    """The error of the ssl module for a server that was not verified."""
    error = ssl.SSLCertVerificationError(1, reason)
    error.verify_message = reason
    return error

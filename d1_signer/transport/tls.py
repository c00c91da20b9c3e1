# SPDX-License-Identifier: Apache-2.0
"""TLS contexts: mutual TLS towards D1, and what every context must hold.

Verification of the server cannot be switched off, here or by what a caller does to a session.
"""

from __future__ import annotations

import functools
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Any, final

import certifi
from urllib3.util.ssl_match_hostname import CertificateError, match_hostname

from d1_signer.errors import ConfigurationError, SecretSourceError
from d1_signer.secret import SecretSource, read_private_file, read_secret, shown_path

_NEW_ENOUGH = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED)
_ENCRYPTED_HINT = "Name the source of its passphrase: file:PATH or env:NAME."


@final
@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client certificate that D1's mutual TLS asks for.

    Attributes:
        certificate: Path of the certificate in PEM, its chain behind it.
        key: Path of its private key in PEM; readable by its owner only.
        passphrase: Source of the key's passphrase; None for a key that is not encrypted.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    passphrase: SecretSource | None = field(default=None, repr=False, kw_only=True)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load certificate and key into a context.

        Raises:
            SecretSourceError: A file or the passphrase cannot be read or used.
            ConfigurationError: The key does not belong to the certificate.
        """
        certificate, key = _path(self.certificate), _path(self.key)
        shown = f"{shown_path(certificate)}, {shown_path(key)}"
        read_private_file(key, what="client key file")
        asked = False

        def passphrase() -> str:
            nonlocal asked
            asked = True
            if self.passphrase is None:
                return ""  # an empty answer keeps OpenSSL from asking on the terminal
            return read_secret(self.passphrase, what="client key's passphrase").reveal()

        try:
            context.load_cert_chain(certificate, key, password=passphrase)
        except FileNotFoundError:
            raise SecretSourceError(
                f"The client certificate is missing: {shown_path(certificate)}.",
                hint="Give the file that Thales sent for your CSR.",
            ) from None
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise ConfigurationError(
                    f"The client key does not belong to the client certificate: {shown}.",
                    hint="Give the key from whose CSR Thales signed the certificate.",
                ) from None
            raise SecretSourceError(
                f"The client certificate or its key cannot be read: {shown}.",
                hint=_ENCRYPTED_HINT if asked else "Both must be PEM files.",
            ) from None
        except (OSError, ValueError):
            raise SecretSourceError(
                f"The client certificate or its key cannot be read: {shown}.",
                hint="Check the paths, their permissions, and the passphrase.",
            ) from None


def verifying_context(authorities: str | None) -> ssl.SSLContext:
    """A context that verifies the server.

    Args:
        authorities: PEM file of those that may sign its certificate; None: the system's.

    Raises:
        OSError: The file cannot be read.
        ssl.SSLError: It holds no certificates.
    """
    # Not create_default_context(): it would log session keys where SSLKEYLOGFILE says so.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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


def client_context(
    certificate: ClientCertificate | ssl.SSLContext | None,
    ca_file: str | os.PathLike[str] | None,
) -> ssl.SSLContext:
    """Build the TLS context for D1, or check the caller's.

    Args:
        certificate: The client certificate; or a ready context, which is used as it is.
        ca_file: PEM file of the authorities that may sign the server's certificate, instead of
            the public ones that ``certifi`` lists.

    Raises:
        ConfigurationError: A ready context that does not verify the server, or both a ready
            context and a CA file.
        SecretSourceError: A file cannot be read.
    """
    if isinstance(certificate, ssl.SSLContext):
        if ca_file is not None:
            raise ConfigurationError(
                "A CA file and a ready ssl.SSLContext were both given.",
                hint="Load the CA file into the context.",
            )
        require_verifying(certificate)
        return certificate
    authorities = certifi.where() if ca_file is None else _path(ca_file)
    try:
        context = verifying_context(authorities)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"The CA file cannot be read: {shown_path(authorities)}.",
            hint="It must hold certificates in PEM.",
        ) from None
    if isinstance(certificate, ClientCertificate):
        certificate.load_into(context)
    elif certificate is not None:
        raise ConfigurationError(
            "The client certificate is neither a ClientCertificate nor an ssl.SSLContext.",
            hint="Give ClientCertificate(certificate, key).",
        )
    return context


def _path(value: object) -> str:
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError("A certificate, key or CA file is not given as a path.") from None


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
            hint="Set verify_mode to CERT_REQUIRED and check_hostname to True.",
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
        sock: The socket, after its handshake.
        host: Name or address that was asked for.

    Raises:
        ssl.SSLCertVerificationError: No certificate was shown and verified, its subjectAltName
            does not have the host, the cipher suite does not rest on it, or TLS is below 1.2.
    """
    if not isinstance(sock, ssl.SSLSocket):  # urllib3 can be told to use pyOpenSSL
        raise _unverified("the handshake was not made by Python's ssl module")
    suite, version = sock.cipher(), sock.version()
    certificate: Any = sock.getpeercert()
    if version not in {"TLSv1.2", "TLSv1.3"}:
        raise _unverified(f"{version} is too old")
    if suite is None or _NOT_BY_CERTIFICATE.search(suite[0]) or not suite[2]:
        raise _unverified("the cipher suite does not rest on a certificate")
    if not certificate:
        raise _unverified("no certificate was shown")
    try:
        # RFC 9110 section 4.3.4: the name is in subjectAltName; OpenSSL may take a common name.
        match_hostname(certificate, host.strip("[]"))
    except CertificateError:
        raise _unverified(f"its subjectAltName does not have {host}") from None


def _unverified(reason: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, reason)
    error.verify_message = reason
    return error

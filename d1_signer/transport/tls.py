# SPDX-License-Identifier: Apache-2.0
"""TLS contexts: mutual TLS towards D1, and what every context must hold.

Verification of the server cannot be switched off, here or by what a caller does to a session.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import certifi

from d1_signer.errors import ConfigurationError, SecretSourceError
from d1_signer.secret import SecretSource, read_private_file, read_secret, shown_path

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
    # MINIMUM_SUPPORTED is a negative number: whatever the OpenSSL build allows.
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        raise ConfigurationError(
            "The ssl.SSLContext allows TLS below 1.2.",
            hint="Set minimum_version to ssl.TLSVersion.TLSv1_2.",
        )
    # Such suites authenticate no server by a certificate, whatever verify_mode says; TLS 1.3 has
    # none of them and reads "auth-any".
    if any(_is_anonymous(suite) for suite in context.get_ciphers()):
        raise ConfigurationError(
            "The ssl.SSLContext offers cipher suites that need no server certificate.",
            hint='Leave the ciphers as they are, or add ":!aNULL:!eNULL:!PSK:!SRP" to them.',
        )
    if context.keylog_filename:
        raise ConfigurationError(
            "The ssl.SSLContext logs TLS keys to a file.",
            hint="Unset SSLKEYLOGFILE, or leave keylog_filename unset.",
        )


def _is_anonymous(suite: Mapping[str, Any]) -> bool:
    kind = str(suite["auth"])
    return "null" in kind or "psk" in kind or "srp" in kind or "NULL" in str(suite["name"])

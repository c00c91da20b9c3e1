# SPDX-License-Identifier: Apache-2.0
"""The client's side of mutual TLS towards D1: its certificate and key, and contexts with them."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import certifi
from cryptography import x509

from d1_signer.errors import ConfigurationError, D1SignerError, SecretSourceError
from d1_signer.events import CertificateEvent, Observer, notify
from d1_signer.secret import Secret, SecretSource, read_private_file, read_secret, shown_path
from d1_signer.signing import forks
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.signer import Signer
from d1_signer.transport import handshake
from d1_signer.transport.patching import require_patched_first
from d1_signer.transport.tls import VerifyingContext, require_verifying, verifying_context

_log = logging.getLogger("d1_signer.tls")

_ENCRYPTED_HINT = "Name the source of its passphrase: file:PATH or env:NAME."


# Seconds between two looks at the files; a look is made when a connection is.
_LOOK_INTERVAL = 2.0
_DAY = 86_400
_WARN_DAYS = 30

ClientKey = str | os.PathLike[str] | Signer | LazySigner | Sequence[Signer | LazySigner]


@final
@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client certificate that D1's mutual TLS asks for.

    Attributes:
        certificate: Path of the certificate in PEM, its chain behind it.
        key: Path of its private key in PEM, readable by its owner only; or a `Signer` or
            `LazySigner` of it, or several of them: the one whose key is the certificate's signs, so
            that a certificate for a new key can take this one's place. They stay the caller's.
        passphrase: Source of a key file's passphrase; None for one that is not encrypted.
        timeout: Seconds for a signer's signature of one handshake.
    """

    certificate: str | os.PathLike[str]
    key: ClientKey
    passphrase: SecretSource | None = field(default=None, repr=False, kw_only=True)
    timeout: float = field(default=2.0, kw_only=True)

    def load_into(self, context: ssl.SSLContext) -> x509.Certificate:
        """Load certificate and key into a context of ours; returns the certificate.

        Raises:
            SecretSourceError: A file or the passphrase cannot be read or used.
            ConfigurationError: The certificate cannot be read, the key does not belong to it, or a
                signer cannot sign handshakes here.
            InvalidKeyError: Signers are given for a certificate of another kind of key.
            KeyMismatchError: The key of none of the signers is the certificate's.
        """
        path = _path(self.certificate)
        chain = handshake.chain_of(_public_file(path, "client certificate"), shown_path(path))
        if isinstance(self.key, str | os.PathLike):
            _load_files(context, path, _path(self.key), self.passphrase)
        else:
            public_key = handshake.public_key_of(chain[0], shown_path(path))
            signers = self.signers()
            handshake.require_one_that_fits(signers, public_key, shown_path(path))
            handshake.sign_with(context, chain, public_key, signers, timeout=self.timeout)
        return chain[0]

    def signers(self) -> tuple[Signer | LazySigner, ...]:
        """The signers of the key; none where it is a file.

        Raises:
            ConfigurationError: What is given as the key is neither a path nor signers.
        """
        if isinstance(self.key, str | bytes | os.PathLike):
            return ()
        several = isinstance(self.key, Sequence)
        signers = tuple(self.key) if several else (self.key,)  # type: ignore[arg-type]
        if not signers or not all(isinstance(each, Signer | LazySigner) for each in signers):
            raise ConfigurationError(
                "The client key is neither a path nor a Signer.",
                hint="Give ClientCertificate(certificate, key) a path, a Signer or several.",
            )
        return signers  # type: ignore[return-value]  # looked at above

    def files(self) -> list[str]:
        """The files that it is made of."""
        key = [_path(self.key)] if isinstance(self.key, str | bytes | os.PathLike) else []
        return [_path(self.certificate), *key]


def _public_file(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise SecretSourceError(
            f"The {what} cannot be read: {shown_path(path)}: {reason}.",
            hint="Give the file that Thales sent for your CSR.",
        ) from None


def _load_files(
    context: ssl.SSLContext, certificate: str, key: str, source: SecretSource | None
) -> None:
    shown = f"{shown_path(certificate)}, {shown_path(key)}"
    read_private_file(key, what="client key file")
    asked = False

    def passphrase() -> str:
        nonlocal asked
        asked = True
        if source is None:
            return ""  # an empty answer keeps OpenSSL from asking on the terminal
        return read_secret(source, what="client key's passphrase").reveal()

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


class ClientTls:
    """The contexts of one fetcher, with what their files hold now.

    A change of a file serves the next connection; a file that is broken or half-written keeps what
    was good last. Thread-safe. There is no thread that watches: whoever makes a connection looks.
    """

    def __init__(
        self,
        certificate: ClientCertificate | ssl.SSLContext | None,
        ca_file: str | os.PathLike[str] | None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Build a context, so that a wrong setting shows now.

        Args:
            certificate: The client certificate; or a ready context, which is used as it is.
            ca_file: PEM file of the authorities that may sign the server's certificate, instead of
                the public ones that ``certifi`` lists.
            observers: Told of a `CertificateEvent` for each certificate that is loaded.

        Raises:
            ConfigurationError: A ready context that does not verify the server, or both a ready
                context and a CA file.
            SecretSourceError: A file cannot be read.
        """
        require_patched_first()
        self._observers = observers
        self._new_locks()
        _all.add(self)
        self._looked_at = time.monotonic()
        self._warned_on: float = float("-inf")
        self._own: weakref.WeakSet[VerifyingContext] = weakref.WeakSet()
        self.generation = 0
        self.certificate: x509.Certificate | None = None
        self._given = certificate if isinstance(certificate, ssl.SSLContext) else None
        if self._given is not None:
            if ca_file is not None:
                raise ConfigurationError(
                    "A CA file and a ready ssl.SSLContext were both given.",
                    hint="Load the CA file into the context.",
                )
            require_verifying(self._given)
            return
        if certificate is not None and not isinstance(certificate, ClientCertificate):
            raise ConfigurationError(
                "The client certificate is neither a ClientCertificate nor an ssl.SSLContext.",
                hint="Give ClientCertificate(certificate, key).",
            )
        self._client = certificate and _asking_once(certificate)
        self._authorities = certifi.where() if ca_file is None else _path(ca_file)
        self._files = [self._authorities, *(certificate.files() if certificate else [])]
        self._state = _state_of(self._files)
        self._last, found = self._built()
        self._loaded(found)

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._handing_out = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """A context for one consumer, who shares it with nobody; the caller's where one was given.

        Raises:
            ConfigurationError: The caller's does not verify any more.
        """
        if self._given is not None:
            require_verifying(self._given)
            return self._given
        require_patched_first()
        forks.notice()
        while True:
            generation = self.generation
            try:
                context, found = self._built()
            except D1SignerError as error:
                _log.warning("tls.files_unusable the last good ones are used on: %s", error)
                context, found = self._last, self.certificate
            if found != self.certificate:
                self._looked_at = float("-inf")
                self.look()
            context.before_each = self.look
            with self._handing_out:
                # Or another thread has taken newer files, and knew nothing of this context.
                if generation == self.generation:
                    self._own.add(context)
                    return context

    def shown_certificate(self) -> x509.Certificate | None:
        """The certificate that a server is shown; None for none, and where a caller's has it."""
        given = self._given
        return given.client_certificate if isinstance(given, VerifyingContext) else self.certificate

    def shows_none(self) -> bool:
        """Whether it is certain that a server is shown no certificate."""
        own = self._given is None or isinstance(self._given, VerifyingContext)
        return own and self.shown_certificate() is None

    def look(self) -> None:
        """Take what the files hold now, where one has changed; every few seconds at most."""
        forks.notice()
        now = time.monotonic()
        if self._given is not None or now - self._looked_at < _LOOK_INTERVAL:
            return
        # Another thread that looks is enough: nobody waits here.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._looked_at = now
            self._warn_of_expiry()
            state = _state_of(self._files)
            if state == self._state:
                return
            try:
                self._renew(state)
            except D1SignerError as error:
                # Once for each state of the files, not for each look.
                self._state = state
                _log.warning("tls.files_unusable the last good ones are used on: %s", error)
        finally:
            self._lock.release()

    def reload(self) -> None:
        """Take what the files hold now.

        Raises:
            D1SignerError: They cannot be used; the last good ones are used on.
        """
        if self._given is not None:
            return
        forks.notice()
        with self._lock:
            self._renew(_state_of(self._files))

    def _renew(self, state: tuple[object, ...]) -> None:
        self._last, found = self._built()
        self._state = state
        with self._handing_out:
            contexts = list(self._own)
            self.generation += 1
        try:
            for context in contexts:
                with context.changing:
                    self._load_into(context)
        except BaseException:
            # They changed once more, between two contexts: the next look takes all of them anew.
            self._state, self._looked_at = (), float("-inf")
            raise
        self._loaded(found)

    def _built(self) -> tuple[VerifyingContext, x509.Certificate | None]:
        try:
            context = verifying_context(self._authorities)
        except (OSError, ValueError):
            raise ConfigurationError(
                f"The CA file cannot be read: {shown_path(self._authorities)}.",
                hint="It must hold certificates in PEM.",
            ) from None
        if self._client is not None:
            context.client_certificate = self._client.load_into(context)
        return context, context.client_certificate

    def _load_into(self, context: VerifyingContext) -> None:
        # Authorities that are no longer in the file stay in a context that was given out.
        context.load_verify_locations(self._authorities)
        if self._client is not None:
            context.client_certificate = self._client.load_into(context)

    def _loaded(self, certificate: x509.Certificate | None) -> None:
        before, self.certificate = self.certificate, certificate
        if certificate is None or certificate == before:
            return
        not_after = certificate.not_valid_after_utc
        subject = certificate.subject.rfc4514_string()
        if before is not None:
            _log.info("tls.client_certificate_replaced subject=%r not_after=%s", subject, not_after)
        event = CertificateEvent(
            subject=subject,
            serial_number=certificate.serial_number,
            not_after=not_after.timestamp(),
        )
        notify(self._observers, event)
        self._warned_on = float("-inf")
        self._warn_of_expiry()

    def _warn_of_expiry(self) -> None:
        if self.certificate is None:
            return
        now = time.time()
        left = self.certificate.not_valid_after_utc.timestamp() - now
        if left < _WARN_DAYS * _DAY and now - self._warned_on >= _DAY:
            self._warned_on = now
            _log.warning(
                "tls.client_certificate_expires in %d days, on %s: have Thales sign a new one",
                left // _DAY,
                self.certificate.not_valid_after_utc,
            )


_all: weakref.WeakSet[ClientTls] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The parent's locks may have been held at the moment of the fork.
    for tls in list(_all):
        tls._new_locks()  # noqa: SLF001 (this module's own class)


forks.in_child(_after_fork_in_child)


class _AskedOnce:
    """A passphrase that a person types, or a function gives: contexts are made again and again."""

    def __init__(self, source: SecretSource) -> None:
        self._source = source
        self._kept: Secret | None = None

    def __call__(self) -> str:
        if self._kept is None:
            self._kept = read_secret(self._source, what="client key's passphrase")
        return self._kept.reveal()


def _asking_once(certificate: ClientCertificate) -> ClientCertificate:
    source = certificate.passphrase
    # A file is read again: it changes with the key.
    if source is None or (isinstance(source, str) and source.startswith("file:")):
        return certificate
    return replace(certificate, passphrase=_AskedOnce(source))


def _state_of(files: Sequence[str]) -> tuple[object, ...]:
    """What tells that a file was changed or replaced, also behind symbolic links."""
    found: list[object] = []
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 (paths come as text)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _path(value: object) -> str:
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError("A certificate, key or CA file is not given as a path.") from None

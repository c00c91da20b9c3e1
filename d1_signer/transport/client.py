# SPDX-License-Identifier: Apache-2.0
"""The client's side of TLS towards D1 and Vault: contexts that follow what is on disk."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import certifi
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.errors import ConfigurationError, D1SignerError, SignerUnavailable
from d1_signer.events import CertificateEvent, Observer, notify
from d1_signer.logfmt import told
from d1_signer.secret import Secret, read_secret, shown_path
from d1_signer.signing import forks
from d1_signer.transport.credentials import (
    Authorities,
    ClientCertificate,
    Credentials,
    Hints,
    as_path,
    state_of,
)
from d1_signer.transport.patching import require_patched_first
from d1_signer.transport.processes import fork_gate
from d1_signer.transport.tls import VerifyingContext, look_at_sockets_of
from d1_signer.transport.verification import require_verifying

_log = logging.getLogger("d1_signer.tls")

# Seconds between two looks at the files where no connection is made, and between two attempts to
# take files that cannot be used.
_LOOK_INTERVAL = 2.0
# Seconds for forks that are under way: of whoever can wait, and of who looks in passing.
_LONGEST_FORK, _SHORT_WAIT = 20.0, 0.5
_DAY = 86_400
DAYS_OF_WARNING = 30


class ClientTls:
    """The contexts of one fetcher or signer, with what their files hold now.

    A change of a file serves the next connection; a file that is broken or half-written keeps what
    was good last. Thread-safe. There is no thread that watches: whoever makes a connection looks.
    """

    def __init__(
        self,
        certificate: ClientCertificate | ssl.SSLContext | None,
        ca_file: str | os.PathLike[str] | Authorities | None,
        observers: Sequence[Observer] = (),
        *,
        accept: Callable[[x509.Certificate], None] = lambda _: None,
        hints: Hints = Hints(),  # noqa: B008 (frozen)
        patience: float = _LONGEST_FORK,
    ) -> None:
        """Build a context, so that a wrong setting shows now.

        Args:
            certificate: The client certificate; or a ready context, whose sockets are looked at as
                those of ours from now on.
            ca_file: PEM file of the authorities that may sign the server's certificate, instead of
                the public ones that ``certifi`` lists; or other `Authorities`.
            observers: Told of a `CertificateEvent` for each certificate that is loaded.
            accept: Called with each certificate before it is used; raises to refuse it.
            hints: What to do about files that cannot be used.
            patience: Seconds for which a caller waits for forks that are under way.

        Raises:
            ConfigurationError: A ready context that does not verify the server, or both a ready
                context and a CA file.
            SecretSourceError: A file cannot be read.
        """
        require_patched_first()
        self._observers = observers
        self._accept = accept
        self._hints = hints
        self._patience = patience
        self._new_locks()
        _all.add(self)
        self._looked_at = time.monotonic()
        self._warned_on: float = float("-inf")
        self._own: weakref.WeakSet[VerifyingContext] = weakref.WeakSet()
        self.generation = 0
        self._given = certificate if isinstance(certificate, ssl.SSLContext) else None
        if self._given is not None:
            self._take_given(self._given, ca_file)
            return
        if certificate is not None and not isinstance(certificate, ClientCertificate):
            raise ConfigurationError(
                "The client certificate is neither a ClientCertificate nor an ssl.SSLContext.",
                hint="Give ClientCertificate(certificate, key).",
            )
        self._client = certificate and _asking_once(certificate)
        self._authorities = ca_file if isinstance(ca_file, Authorities) else _authorities(ca_file)
        self._unusable: tuple[object, ...] | None = None
        self._tried_at = self._looked_at
        self._credentials = self._tried(patience)
        self._loaded(None)

    def _take_given(self, context: ssl.SSLContext, ca_file: object) -> None:
        if ca_file is not None:
            raise ConfigurationError(
                "A CA file and a ready ssl.SSLContext were both given.",
                hint="Load the CA file into the context.",
            )
        look_at_sockets_of(context)
        shown = self.shown_certificate()
        if shown is not None:
            self._accept(shown)

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._handing_out = threading.Lock()

    @property
    def certificate(self) -> x509.Certificate | None:
        """The one of the `ClientCertificate`, as it is now; None where none was given."""
        return None if self._given is not None else self._credentials.certificate

    def context(self) -> ssl.SSLContext:
        """A context for one consumer, who shares it with nobody; the caller's where one was given.

        Raises:
            ConfigurationError: The caller's does not verify any more.
        """
        if self._given is not None:
            require_verifying(self._given)
            return self._given
        require_patched_first()
        self._look()
        while True:
            credentials = self._credentials
            with _no_fork(self._patience):
                context = credentials.context()
            context.before_each = self._look
            with self._handing_out:
                # Or another thread has taken newer files, and knew nothing of this context.
                if credentials is self._credentials:
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
        if self._is_time(self._looked_at):
            self._look()

    def _is_time(self, last: float) -> bool:
        return time.monotonic() - last >= _LOOK_INTERVAL

    def _look(self) -> None:
        forks.notice()
        # Another thread that looks is enough: nobody waits here.
        if self._given is not None or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked_at = time.monotonic()
            self._warn_of_expiry()
            state = state_of(self._authorities, self._client)
            known = state == self._unusable
            if state == self._credentials.state or (known and not self._is_time(self._tried_at)):
                return
            self._tried_at = self._looked_at
            try:
                self._renew(_SHORT_WAIT)
            except D1SignerError as error:
                # What is amiss may not show in the files: it is tried again, and told once.
                self._unusable = state
                if not known:
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
            self._renew(self._patience)

    def change(
        self, certificate: ClientCertificate | None, ca_file: str | os.PathLike[str] | None
    ) -> None:
        """Be made of other files from now on, in all contexts that were given out.

        Raises:
            D1SignerError: They cannot be used; the others are used on.
        """
        forks.notice()
        with self._lock:
            before = self._client, self._authorities
            self._client = certificate and _asking_once(certificate)
            self._authorities = _authorities(ca_file)
            try:
                self._renew(self._patience)
            except BaseException:
                self._client, self._authorities = before
                raise

    def _renew(self, patience: float) -> None:
        fresh = self._tried(patience)
        # A child of a fork has no thread that would go on here.
        with _no_fork(patience):
            before = self._take(fresh)
        self._unusable = None
        self._loaded(before.certificate)

    def _tried(self, patience: float) -> Credentials:
        """What the files hold, after it has served a context that nobody uses."""
        credentials = Credentials.read(self._authorities, self._client, self._hints)
        if credentials.certificate is not None:
            self._accept(credentials.certificate)
        with _no_fork(patience):
            credentials.context()
        return credentials

    def _take(self, fresh: Credentials) -> Credentials:
        """Have all contexts hold what is fresh, or none of them; returns what they held."""
        with self._handing_out:
            before, self._credentials = self._credentials, fresh
            contexts = list(self._own)
            self.generation += 1
        changed = []
        try:
            for context in contexts:
                changed.append(context)
                with context.changing:
                    fresh.load_into(context)
        except BaseException:
            self._credentials = before
            for context in changed:
                with suppress(Exception), context.changing:
                    before.load_into(context)
            raise
        return before

    def _loaded(self, before: x509.Certificate | None) -> None:
        certificate = self.certificate
        if certificate is None or certificate == before:
            return
        not_after = certificate.not_valid_after_utc
        subject = certificate.subject.rfc4514_string()
        if before is not None:
            ended = before.not_valid_after_utc
            facts = {
                "subject": subject,
                "sha256": certificate.fingerprint(SHA256()).hex(),
                "not_after": not_after.isoformat(),
                "not_after_before": ended.isoformat(),
            }
            if not_after < ended:
                facts["message"] = "it ends before the one that it replaces: is it the right one?"
                _log.warning("tls.client_certificate_replaced %s", told(facts))
            else:
                _log.info("tls.client_certificate_replaced %s", told(facts))
        event = CertificateEvent(
            subject=subject,
            serial_number=certificate.serial_number,
            not_after=not_after.timestamp(),
        )
        notify(self._observers, event)
        self._warned_on = float("-inf")
        self._warn_of_expiry()

    def _warn_of_expiry(self) -> None:
        if self.certificate is None or self._hints.expiry is None:
            return
        now = time.time()
        left = self.certificate.not_valid_after_utc.timestamp() - now
        if left < DAYS_OF_WARNING * _DAY and now - self._warned_on >= _DAY:
            self._warned_on = now
            _log.warning(
                "tls.client_certificate_expires %s, on %s: %s",
                _ahead(left),
                self.certificate.not_valid_after_utc,
                self._hints.expiry,
            )


def _ahead(seconds: float) -> str:
    if seconds < 0:
        return "already"
    for length, unit in ((_DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"in {seconds // length:.0f} {unit}"
    return "within two minutes"


def _authorities(ca_file: str | os.PathLike[str] | None) -> Authorities:
    return Authorities(file=certifi.where() if ca_file is None else as_path(ca_file))


_all: weakref.WeakSet[ClientTls] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The parent's locks may have been held at the moment of the fork.
    for tls in list(_all):
        tls._new_locks()  # noqa: SLF001 (this module's own class)


forks.in_child(_after_fork_in_child)


@contextmanager
def _no_fork(patience: float) -> Iterator[None]:
    """OpenSSL at work: a child that met it half-way would have it half-way for ever."""
    with ExitStack() as gate:
        try:
            gate.enter_context(fork_gate.call(time.monotonic() + patience))
        except TimeoutError:
            raise SignerUnavailable(
                "The TLS settings cannot be loaded while this process is being forked.",
                hint="Try again.",
            ) from None
        yield


class _Typed:
    """A passphrase that a person types, who is not asked again when files change."""

    def __init__(self, of: str) -> None:
        self._of = of
        self._kept: Secret | None = None

    def __call__(self) -> str:
        if self._kept is None:
            self._kept = read_secret("prompt", what="client key's passphrase", of=self._of)
        return self._kept.reveal()


def _asking_once(certificate: ClientCertificate) -> ClientCertificate:
    typed = certificate.passphrase == "prompt"  # noqa: S105 (where it comes from)
    if not typed:
        return certificate
    return replace(certificate, passphrase=_Typed(shown_path(certificate.key)))

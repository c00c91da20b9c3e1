# SPDX-License-Identifier: Apache-2.0
"""What observers are told: one frozen record for each thing that happened, never a secret."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from d1_signer.errors import ConfigurationError
from d1_signer.frames import of_signal_handler

if TYPE_CHECKING:
    from d1_signer.es256 import PublicKey

_log = logging.getLogger("d1_signer")

Scalar = str | int | bool | None
Recordable = Scalar | Sequence[Scalar] | Sequence[Sequence[Scalar]]
"""What a member of a record holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """Why a signature is asked for; opaque to this package, kept for the audit trail.

    Attributes:
        purpose: What it is for, such as ``"d1-assertion"``.
        references: Pairs of name and value that let an auditor find the use again, such as
            ``("jti", "…")``. Never secret.
    """

    purpose: str
    references: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SignEvent:
    """One call of `Signer.sign` or `Signer.sign_digest` has ended.

    Attributes:
        backend: Name of the backend, such as ``"pkcs11"``.
        kid: Key identifier.
        duration: Seconds from call to end, verification included.
        error: Code of the error, or None for a signature.
        use: What the caller said the signature is for.
        pool_use: Sessions in use as the call began, and how many there may be; None for a backend
            without such a bound.
        time: When the call began, in seconds since the epoch.
        thumbprint: RFC 7638 thumbprint of the key.
        digest: SHA-256 of what was signed, in hexadecimal.
    """

    backend: str
    kid: str
    duration: float
    error: str | None = None
    use: Use | None = None
    pool_use: tuple[int, int] | None = None
    time: float | None = None
    thumbprint: str | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestEvent:
    """One POST to the token endpoint has ended.

    Attributes:
        correlation_id: Its ``x-correlation-id``, which stands in D1's log.
        duration: Seconds from sending to the end of the answer.
        status: HTTP status code; None where no answer came.
        error: Code of the error, or None for a token.
        jti: ``jti`` of the assertion that was sent.
        kid: Key identifier of the key that signed it.
    """

    correlation_id: str
    duration: float
    status: int | None
    error: str | None
    jti: str | None = None
    kid: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RenewalEvent:
    """One renewal has ended: with a token or, after all its attempts, without.

    Attributes:
        duration: Seconds from its start.
        error: Code of the error, or None for a token.
        expires_in: Seconds that the new token lives; None without one.
        shared: Whether the token came from the fleet's store instead of D1.
        valid_for: Seconds for which callers get a token from now on: the new one, or after a
            failure the one before; 0 where there is none.
        callers: Trace id and span id, see `current_span`, of calls that waited for it.
        store: What the fleet's store has shown, as ``status().store`` has it.
    """

    duration: float
    error: str | None
    expires_in: float | None
    shared: bool
    valid_for: float = 0.0
    callers: tuple[tuple[str, str], ...] = ()
    store: str = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailoverEvent:
    """A member of a `SignerSet` failed and the next one is asked.

    Attributes:
        kid: Key identifier of the member that failed.
        error: Code of its error.
    """

    kid: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateEvent:
    """The client certificate of mutual TLS was loaded, or another one took its place.

    Attributes:
        subject: Its subject, as RFC 4514 writes it.
        serial_number: Its serial number.
        not_after: Until when it is valid, in seconds since the epoch.
    """

    subject: str
    serial_number: int
    not_after: float


class Trail(Protocol):
    """Where uses of a key are recorded before they happen; `AuditTrail` is one.

    Unlike an observer it is asked first, and what it refuses is not done.
    """

    def watch(self, public_key: PublicKey) -> None:
        """Refuse a key whose uses it cannot record.

        Raises:
            ConfigurationError: It is such a key.
        """
        ...

    def begin(
        self, action: str, about: Mapping[str, Recordable], *, deadline: float | None = None
    ) -> object:
        """Record that something is about to be done.

        Args:
            action: What, such as ``"sign"``.
            about: What is known of it.
            deadline: Moment on ``time.monotonic()`` until which to wait.

        Returns:
            What `end` takes.

        Raises:
            AuditUnavailable: It cannot be recorded, so it must not be done.
        """
        ...

    def end(
        self, begun: object, outcome: str, about: Mapping[str, Recordable] | None = None
    ) -> None:
        """Record how it ended: ``"done"``, or the code of an error.

        Raises:
            AuditUnavailable: It cannot be recorded, so its result must not be used.
        """
        ...

    def note(self, event: str, about: Mapping[str, Recordable]) -> None:
        """Record something that is no use of a key.

        Raises:
            AuditUnavailable: It cannot be recorded.
        """
        ...


Event = SignEvent | RequestEvent | RenewalEvent | FailoverEvent | CertificateEvent
Observer = Callable[[Event], None]
"""Called in the thread where the event happened, so it must be quick."""


@runtime_checkable
class BeginningObserver(Protocol):
    """An observer that is told of the beginning of a renewal, too."""

    def __call__(self, event: Event) -> None:
        """As every observer."""
        ...

    def renewal_begins(self) -> None:
        """A renewal begins in this thread, in which its events, the `RenewalEvent` last, follow."""
        ...


def checked(observers: Iterable[Observer]) -> tuple[Observer, ...]:
    """Return observers that can be called.

    Raises:
        ConfigurationError: Not a sequence of callables.
    """
    found = tuple(observers) if isinstance(observers, Iterable) else (None,)
    if not all(callable(observer) for observer in found):
        raise ConfigurationError(
            "observers is not a sequence of callables.", hint="Write observers=[my_observer]."
        )
    return found


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Tell each observer; one that fails is logged and never breaks the work it watches."""
    for observer in observers:
        _tell(partial(observer, event))


def notify_beginning(observers: Iterable[Observer]) -> None:
    """Tell the observers that want to know it that a renewal begins; as `notify` does."""
    for observer in observers:
        _tell(partial(_begin, observer))


def _begin(observer: Observer) -> None:
    if isinstance(observer, BeginningObserver):
        observer.renewal_begins()


def _tell(observer: Callable[[], None]) -> None:
    try:
        observer()
    except Exception as error:
        if of_signal_handler(error):
            raise
        _log.warning("observer.failed %s", type(error).__name__)


def current_span() -> tuple[str, str] | None:
    """Trace id and span id of OpenTelemetry's current span, in hexadecimal; None without one.

    Nothing is imported for it: where nobody has loaded OpenTelemetry, there is no span.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    try:
        context = trace.get_current_span().get_span_context()
        found = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    except Exception as error:  # others' code, which another thread may be loading just now
        if of_signal_handler(error):
            raise
        return None
    return found if context.is_valid else None

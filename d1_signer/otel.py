# SPDX-License-Identifier: Apache-2.0
"""Spans and metrics for OpenTelemetry; needs ``d1-signer[otel]``.

Use, one observer for each fetcher::

    observer = OpenTelemetryObserver()
    signer = open_signer(uri, observers=[observer])
    signers = SignerSet([signer], observers=[observer])
    fetcher = TokenFetcher(signers, observers=[observer], **settings)

The names are listed in ``docs/observability.md``. They follow OpenTelemetry's semantic conventions
where there are some (``error.type``, ``http.*``) and begin with ``d1_signer.`` otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, final

from d1_signer.errors import MissingExtraError
from d1_signer.events import (
    CertificateEvent,
    Event,
    FailoverEvent,
    RenewalEvent,
    RequestEvent,
    SignEvent,
    current_span,
)
from d1_signer.token.clock import token_clock

try:
    from opentelemetry.context import attach, detach
    from opentelemetry.metrics import (
        CallbackOptions,
        Meter,
        MeterProvider,
        Observation,
        get_meter_provider,
    )
    from opentelemetry.trace import (
        Span,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TracerProvider,
        get_tracer_provider,
        set_span_in_context,
    )
except ModuleNotFoundError:
    raise MissingExtraError.of("opentelemetry-api", "otel") from None

if TYPE_CHECKING:
    from d1_signer.audit.trail import AuditTrail

_SCOPE = "d1_signer"
# Seconds. The first ones tell a local HSM from one on a network; the rest are those of the
# semantic conventions for HTTP durations.
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SHARES: Final = (0, 0.25, 0.5, 0.75, 0.999)

_NEVER: Final = float("-inf")
_RENEWAL: Final = f"{_SCOPE}.token.renewal"

_Attributes = dict[str, str | int | bool]


@final
class OpenTelemetryObserver:
    """Turns events into spans and metrics. An observer: pass it to signers, sets and fetchers."""

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        trail: AuditTrail | None = None,
    ) -> None:
        """Create the instruments.

        Args:
            meter_provider: Gets the metrics; None: the process-wide one.
            tracer_provider: Gets the spans; None: the process-wide one.
            attributes: Stand on each span and metric; they tell several fetchers of one process
                apart, such as ``{"deployment.environment.name": "production"}``.
            trail: The audit trail whose records are counted; give it to one observer.
        """
        meter = (meter_provider or get_meter_provider()).get_meter(_SCOPE)
        self._tracer = (tracer_provider or get_tracer_provider()).get_tracer(_SCOPE)
        self._attributes: _Attributes = dict(attributes or {})
        self._renewing = threading.local()
        # On the clock of tokens, and on the wall clock, which may be set: the earlier one counts.
        self._dies_at: tuple[float, float] | None = None
        self._certificate_ends: float | None = None

        def seconds(name: str, description: str) -> Callable[..., None]:
            return meter.create_histogram(
                f"{_SCOPE}.{name}",
                unit="s",
                description=description,
                explicit_bucket_boundaries_advisory=_SECONDS,
            ).record

        self._sign = seconds("sign.duration", "Duration of a signature, verification included.")
        self._request = seconds("token.request.duration", "Duration of a request for a token.")
        self._renewal = seconds("token.renewal.duration", "Duration of a renewal, all attempts.")
        self._in_use = meter.create_histogram(
            f"{_SCOPE}.sign.sessions_in_use",
            unit="1",
            description="Share of the backend's sessions that were in use as a signature began.",
            explicit_bucket_boundaries_advisory=_SHARES,
        ).record
        self._failovers = meter.create_counter(
            f"{_SCOPE}.failovers",
            unit="{failover}",
            description="Members of a SignerSet that failed while signing.",
        )
        meter.create_observable_gauge(
            f"{_SCOPE}.token.remaining_life",
            callbacks=[self._remaining],
            unit="s",
            description="Seconds until the last token expires; 0 from then on.",
        )
        meter.create_observable_gauge(
            f"{_SCOPE}.client_certificate.remaining_life",
            callbacks=[self._remaining_of_certificate],
            unit="s",
            description="Seconds until the client certificate expires; 0 from then on.",
        )

        if trail is not None:
            self._watch(meter, trail)

    def _watch(self, meter: Meter, trail: AuditTrail) -> None:
        def records(_: CallbackOptions) -> list[Observation]:
            return [Observation(trail.status().records, self._attributes)]

        def unsealed(_: CallbackOptions) -> list[Observation]:
            age = trail.status().unsealed_for
            return [] if age is None else [Observation(age, self._attributes)]

        meter.create_observable_counter(
            f"{_SCOPE}.audit.records",
            callbacks=[records],
            unit="{record}",
            description="Records of the audit trail that this process has written.",
        )
        meter.create_observable_gauge(
            f"{_SCOPE}.audit.unsealed_age",
            callbacks=[unsealed],
            unit="s",
            description="Seconds since the oldest record that is not sealed; 0 where all are.",
        )

    def __call__(self, event: Event) -> None:
        """Record one event; called by signers, sets and fetchers."""
        match event:
            case SignEvent():
                self._signed(event)
            case RequestEvent():
                self._requested(event)
            case RenewalEvent():
                self._renewed(event)
            case FailoverEvent():
                self._failovers.add(1, self._with(event.error, {"d1_signer.kid": event.kid}))
            case CertificateEvent():
                self._certificate_ends = event.not_after

    def renewal_begins(self) -> None:
        """Begin the renewal's span, and make it the current one of this thread."""
        parent = current_span()
        span = self._tracer.start_span(_RENEWAL, attributes=self._attributes)
        self._renewing.span = span, parent, attach(set_span_in_context(span))

    def _signed(self, event: SignEvent) -> None:
        labels = self._with(
            event.error, {"d1_signer.backend": event.backend, "d1_signer.kid": event.kid}
        )
        self._sign(event.duration, labels)
        if event.pool_use is not None:
            in_use, size = event.pool_use
            self._in_use(in_use / size, labels)
        if event.use is not None:
            # Of a span alone: a metric would grow with each value.
            labels = labels | {"d1_signer.use.purpose": event.use.purpose}
            labels |= {f"d1_signer.use.{name}": value for name, value in event.use.references}
        self._span("d1_signer.sign", event.duration, labels)

    def _requested(self, event: RequestEvent) -> None:
        labels = self._with(event.error, {"http.request.method": "POST"})
        if event.status is not None:
            labels["http.response.status_code"] = event.status
        self._request(event.duration, labels)
        # Of a span alone, as above.
        labels = labels | {"d1_signer.correlation_id": event.correlation_id}
        joined = {"d1_signer.jti": event.jti, "d1_signer.kid": event.kid}
        labels |= {name: value for name, value in joined.items() if value is not None}
        self._span("d1_signer.token.request", event.duration, labels, SpanKind.CLIENT)

    def _renewed(self, event: RenewalEvent) -> None:
        if event.expires_in is not None:
            self._dies_at = token_clock() + event.expires_in, time.time() + event.expires_in
        elif not event.valid_for:
            self._dies_at = _NEVER, _NEVER  # there is none, or it was refused before its end
        labels = self._with(
            event.error, {"d1_signer.shared": event.shared, "d1_signer.store": event.store}
        )
        self._renewal(event.duration, labels)
        span, parent, token = self._renewing.__dict__.pop("span", (None, None, None))
        if span is None:  # its beginning was not passed on by whoever passed this event on
            self._span(_RENEWAL, event.duration, labels)
            return
        detach(token)
        for trace_id, span_id in event.callers:
            if (trace_id, span_id) != parent:
                span.add_link(SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False))
        span.set_attributes(labels)
        _end(span, labels)

    def _span(
        self,
        name: str,
        duration: float,
        attributes: _Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        end = time.time_ns()
        start = end - int(duration * 1e9)
        span = self._tracer.start_span(name, kind=kind, attributes=attributes, start_time=start)
        _end(span, attributes, end)

    def _with(self, error: str | None, attributes: _Attributes) -> _Attributes:
        failed: _Attributes = {} if error is None else {"error.type": error}
        return self._attributes | attributes | failed

    def _remaining(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._dies_at is None:
            return []
        by_age, by_date = self._dies_at
        return self._life(min(by_age - token_clock(), by_date - time.time()))

    def _remaining_of_certificate(self, _: CallbackOptions) -> Iterable[Observation]:
        ends = self._certificate_ends
        return [] if ends is None else self._life(ends - time.time())

    def _life(self, seconds: float) -> list[Observation]:
        return [Observation(max(0.0, seconds), self._attributes)]


def _end(span: Span, attributes: _Attributes, moment: int | None = None) -> None:
    if "error.type" in attributes:
        span.set_status(Status(StatusCode.ERROR))
    span.end(moment)

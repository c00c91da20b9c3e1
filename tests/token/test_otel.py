# SPDX-License-Identifier: Apache-2.0
"""Spans and metrics of real renewals, read back from OpenTelemetry's own SDK."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from d1_signer import (
    AuditTrail,
    CertificateEvent,
    LazySigner,
    Signer,
    SignerSet,
    TokenRefusedError,
    open_signer,
)
from d1_signer.errors import SignerUnavailable
from d1_signer.otel import OpenTelemetryObserver
from d1_signer.sandbox import Fault, Sandbox
from tests.audit.trails import ORIGIN, records, sealing_signer
from tests.signing.backends import KeyBackend
from tests.token.conftest import KID, FetcherMaker
from tests.token.test_fetcher import age, until

DOCUMENT = Path(__file__).parents[2] / "docs/observability.md"


class Telemetry:
    """What one observer told, as the SDK understood it."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.exporter = InMemorySpanExporter()
        self.meters = MeterProvider([self.reader])
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = OpenTelemetryObserver(
            self.meters, self.tracers, attributes={"deployment.environment.name": "test"}
        )

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    told = Telemetry()
    yield told
    told.meters.shutdown()
    told.tracers.shutdown()


@pytest.fixture
def signers(pem_uri: str, telemetry: Telemetry) -> Iterator[SignerSet]:
    observers = [telemetry.observer]
    signer = open_signer(pem_uri, kid=KID, observers=observers)

    def down() -> Any:
        raise SignerUnavailable("The HSM is away.")

    first = LazySigner(down, kid="away", public_key=signer.public_key)
    with SignerSet([first, signer], observers=observers) as members:
        yield members


def test_a_renewal_is_told_in_spans_and_metrics(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signers: SignerSet, telemetry: Telemetry
) -> None:
    before = time.time_ns()
    fetcher = make_fetcher(signer=signers, observers=[telemetry.observer])
    sandbox.misbehave(Fault.DELAY, seconds=0.1)
    token = fetcher.token()
    until(lambda: bool(telemetry.spans("d1_signer.token.renewal")))

    (sign,) = telemetry.spans("d1_signer.sign")
    (request,) = telemetry.spans("d1_signer.token.request")
    (renewal,) = telemetry.spans("d1_signer.token.renewal")
    environment = {"deployment.environment.name": "test"}
    assert dict(sign.attributes or {}) == environment | {
        "d1_signer.backend": "pem",
        "d1_signer.kid": KID,
        "d1_signer.use.purpose": "d1-assertion",
        "d1_signer.use.iss": sandbox.requests[0].claims["iss"],
        "d1_signer.use.jti": sandbox.requests[0].claims["jti"],
        "d1_signer.use.correlation_id": sandbox.requests[0].correlation_id,
    }
    assert dict(request.attributes or {}) == environment | {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "d1_signer.correlation_id": sandbox.requests[0].correlation_id,
        "d1_signer.jti": sandbox.requests[0].claims["jti"],
        "d1_signer.kid": KID,
    }
    assert dict(renewal.attributes or {}) == environment | {
        "d1_signer.shared": False,
        "d1_signer.store": "none",
    }
    assert request.kind is SpanKind.CLIENT
    for span in (sign, request, renewal):
        assert span.status.status_code is StatusCode.UNSET
        assert span.start_time is not None
        assert span.end_time is not None
        assert before <= span.start_time <= span.end_time <= time.time_ns()
    assert renewal.start_time is not None
    assert request.start_time is not None
    assert request.end_time is not None
    assert renewal.start_time <= request.start_time
    assert request.end_time - request.start_time >= 0.1e9

    points = telemetry.points()
    for name in ("sign.duration", "token.request.duration", "token.renewal.duration"):
        (point,) = points[f"d1_signer.{name}"]
        assert point.count == 1
        assert point.explicit_bounds[0] == 0.0005
    assert points["d1_signer.token.request.duration"][0].sum >= 0.1
    (failover,) = points["d1_signer.failovers"]
    assert failover.value == 1
    assert failover.attributes == environment | {
        "d1_signer.kid": "away",
        "error.type": "signer_unavailable",
    }
    (life,) = points["d1_signer.token.remaining_life"]
    assert abs(life.value - (token.expires_at - time.time())) < 1


@pytest.mark.parametrize("by", [-7200.0, 7200.0])
def test_a_wall_clock_that_is_set_lengthens_no_life(
    make_fetcher: FetcherMaker, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    fetcher = make_fetcher(observers=[telemetry.observer])
    fetcher.token()
    until(lambda: "d1_signer.token.remaining_life" in telemetry.points())
    before, real = fetcher.status().expires_at, time.time
    assert before is not None
    assert abs(before - fetcher.token().expires_at) < 1
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + by)
        patch.setattr(fetcher, "_wall", time.time)
        (life,) = telemetry.points()["d1_signer.token.remaining_life"]
        status = fetcher.status()
    assert status.expires_at is not None
    if by < 0:  # what is there ends as it would have
        assert 800 < life.value <= 900
        assert 800 < status.expires_at - status.at <= 900
        assert status.token == "fresh"
    else:  # nobody gets it any more
        assert life.value == 0
        assert status.expires_at < status.at
        assert status.token == "expired"


def test_the_life_of_the_client_certificate_is_told(
    make_fetcher: FetcherMaker, sandbox: Sandbox, telemetry: Telemetry
) -> None:
    name = "d1_signer.client_certificate.remaining_life"
    make_fetcher(observers=[telemetry.observer])
    (life,) = telemetry.points()[name]
    (parsed,) = x509.load_pem_x509_certificates(sandbox.client_certificate.read_bytes())
    assert abs(life.value - (parsed.not_valid_after_utc.timestamp() - time.time())) < 5
    assert life.attributes == {"deployment.environment.name": "test"}


def test_a_certificate_that_has_expired_has_no_life_left(telemetry: Telemetry) -> None:
    ended = CertificateEvent(subject="CN=client", serial_number=1, not_after=time.time() - 9)
    telemetry.observer(ended)
    (life,) = telemetry.points()["d1_signer.client_certificate.remaining_life"]
    assert life.value == 0


def test_failures_are_told_by_their_code(
    make_fetcher: FetcherMaker, sandbox: Sandbox, telemetry: Telemetry
) -> None:
    fetcher = make_fetcher(observers=[telemetry.observer])
    sandbox.misbehave(Fault.INVALID_GRANT)
    with pytest.raises(TokenRefusedError):
        fetcher.token()
    until(lambda: bool(telemetry.spans("d1_signer.token.renewal")))
    for name in ("request", "renewal"):
        (span,) = telemetry.spans(f"d1_signer.token.{name}")
        assert (span.attributes or {})["error.type"] == "token_refused"
        assert span.status.status_code is StatusCode.ERROR
    points = telemetry.points()
    (point,) = points["d1_signer.token.request.duration"]
    assert point.attributes["error.type"] == "token_refused"
    assert point.attributes["http.response.status_code"] == 400
    (life,) = points["d1_signer.token.remaining_life"]
    assert life.value == 0


def test_a_token_that_the_api_refused_has_no_life_left(
    make_fetcher: FetcherMaker, sandbox: Sandbox, telemetry: Telemetry
) -> None:
    fetcher = make_fetcher(observers=[telemetry.observer])
    assert "d1_signer.token.remaining_life" not in telemetry.points()
    fetcher.invalidate(fetcher.token())
    sandbox.misbehave(Fault.INVALID_GRANT)
    with pytest.raises(TokenRefusedError):
        fetcher.token()
    until(lambda: len(telemetry.spans("d1_signer.token.renewal")) == 2)
    (life,) = telemetry.points()["d1_signer.token.remaining_life"]
    assert life.value == 0


def test_no_value_of_one_call_becomes_an_attribute_of_a_metric(
    make_fetcher: FetcherMaker, signers: SignerSet, telemetry: Telemetry
) -> None:
    fetcher = make_fetcher(signer=signers, observers=[telemetry.observer], retry_interval=0.01)
    for _ in range(3):
        fetcher.token()
        age(fetcher, 895)
    until(lambda: len(telemetry.spans("d1_signer.token.renewal")) == 3)
    for name, points in telemetry.points().items():
        assert len(points) == 1, name


def test_the_records_of_the_trail_are_counted(
    pem_uri: str, tmp_path: Path, telemetry: Telemetry
) -> None:
    place = tmp_path / "trail"
    labels = {"deployment.environment.name": "test"}
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        OpenTelemetryObserver(telemetry.meters, telemetry.tracers, attributes=labels, trail=trail)

        def told() -> tuple[int, float]:
            points = telemetry.points()
            (number,) = points["d1_signer.audit.records"]
            (age,) = points["d1_signer.audit.unsealed_age"]
            assert number.attributes == age.attributes == labels
            return number.value, age.value

        assert told() == (0, 0)
        with open_signer(pem_uri, kid=KID, trail=trail) as signer:
            signer.sign(b"x")
            number, age = told()
            assert number == len(records(place))
            assert 0 < age < 600
            assert trail.seal()
            assert told() == (number, 0)
            signer.sign(b"y")
            place.rename(tmp_path / "elsewhere")
            points = telemetry.points()
            assert points["d1_signer.audit.records"][0].value == number + 2
            assert "d1_signer.audit.unsealed_age" not in points  # it cannot be read
            (tmp_path / "elsewhere").rename(place)
    text = DOCUMENT.read_text()
    assert "`d1_signer.audit.records`" in text
    assert "`d1_signer.audit.unsealed_age`" in text


def test_the_document_names_what_is_told(
    make_fetcher: FetcherMaker, signers: SignerSet, telemetry: Telemetry
) -> None:
    fetcher = make_fetcher(signer=signers, observers=[telemetry.observer])
    fetcher.token()
    until(lambda: bool(telemetry.spans("d1_signer.token.renewal")))
    text = DOCUMENT.read_text()
    told = set(telemetry.points())
    for span in telemetry.exporter.get_finished_spans():
        told |= {span.name, *(span.attributes or {})}
    told -= {"deployment.environment.name"}
    assert {name for name in told if f"`{name}`" not in text} == set()


def test_a_pool_of_which_all_is_in_use_is_told_from_one_that_is_nearly_so(
    telemetry: Telemetry,
) -> None:
    class Pool(KeyBackend):
        in_use = 0

        def pool_use(self) -> tuple[int, int]:
            return self.in_use, 100

    backend = Pool(ec.derive_private_key(11, ec.SECP256R1()))
    with Signer(backend, observers=[telemetry.observer]) as signer:
        for backend.in_use in (0, 25, 50, 75, 99, 100):
            signer.sign(b"m")
    (point,) = telemetry.points()["d1_signer.sign.sessions_in_use"]
    assert tuple(point.bucket_counts) == (1, 1, 1, 1, 1, 1)

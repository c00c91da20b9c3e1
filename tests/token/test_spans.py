# SPDX-License-Identifier: Apache-2.0
"""Which span is whose child, and how a trail's records join them."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import SpanContext, Tracer, get_current_span

from d1_signer import (
    AuditTrail,
    HttpxD1Auth,
    SignerSet,
    TokenFetcher,
    TokenTimeout,
    open_signer,
)
from d1_signer.events import Event
from d1_signer.otel import OpenTelemetryObserver
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token.flight import Flight
from tests.audit.trails import ORIGIN, records, verified
from tests.token.conftest import KID, FetcherMaker
from tests.token.test_fetcher import age, until
from tests.token.test_otel import Telemetry, signers, telemetry

__all__ = ["signers", "telemetry"]

RENEWAL = "d1_signer.token.renewal"


@pytest.fixture
def tracer(telemetry: Telemetry) -> Tracer:
    return telemetry.tracers.get_tracer("the caller's")


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker, signers: SignerSet, telemetry: Telemetry) -> TokenFetcher:
    return make_fetcher(signer=signers, observers=[telemetry.observer], retry_interval=0.01)


def renewals(telemetry: Telemetry, number: int = 1) -> list[ReadableSpan]:
    """So many renewals, whose spans end just behind the calls that wait for them."""
    until(lambda: len(telemetry.spans(RENEWAL)) == number)
    return telemetry.spans(RENEWAL)


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def test_the_spans_of_a_renewal_are_below_the_callers(
    fetcher: TokenFetcher, sandbox: Sandbox, telemetry: Telemetry, tracer: Tracer
) -> None:
    sandbox.misbehave(Fault.STATUS_503, times=1, retry_after=None)
    with tracer.start_as_current_span("caller") as caller:
        fetcher.token()
        assert get_current_span() is caller
    (renewal,) = renewals(telemetry)
    assert renewal.parent == caller.get_span_context()
    assert not renewal.links
    for name in ("d1_signer.sign", "d1_signer.token.request"):
        spans = telemetry.spans(name)
        assert len(spans) == 2
        for span in spans:
            assert span.parent == renewal.get_span_context()
            assert context_of(span).trace_id == caller.get_span_context().trace_id


def test_without_a_span_of_the_caller_a_renewal_is_a_trace_of_its_own(
    fetcher: TokenFetcher, telemetry: Telemetry
) -> None:
    fetcher.token()
    (renewal,) = renewals(telemetry)
    assert renewal.parent is None
    (sign,) = telemetry.spans("d1_signer.sign")
    (request,) = telemetry.spans("d1_signer.token.request")
    assert sign.parent == request.parent == renewal.get_span_context()
    assert not get_current_span().get_span_context().is_valid


def test_a_failed_renewal_ends_its_span(
    fetcher: TokenFetcher, sandbox: Sandbox, telemetry: Telemetry, tracer: Tracer
) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT)
    with (
        tracer.start_as_current_span("caller") as caller,
        pytest.raises(Exception, match="refused"),
    ):
        fetcher.token()
    (renewal,) = renewals(telemetry)
    assert renewal.parent == caller.get_span_context()
    assert (renewal.attributes or {})["error.type"] == "token_refused"


@pytest.mark.parametrize("way", ["stale", "prefetch"])
def test_a_renewal_in_the_background_is_below_the_call_that_began_it(
    fetcher: TokenFetcher, telemetry: Telemetry, tracer: Tracer, way: str
) -> None:
    if way == "stale":
        fetcher.token()
        renewals(telemetry)
        age(fetcher, 700)
    with tracer.start_as_current_span("caller") as caller:
        if way == "stale":
            fetcher.token()
        else:
            fetcher.prefetch()
    renewal = renewals(telemetry, 2 if way == "stale" else 1)[-1]
    assert renewal.parent == caller.get_span_context()


async def _get(auth: HttpxD1Auth, tracer: Tracer) -> SpanContext:
    transport = httpx.MockTransport(lambda _: httpx.Response(204))
    async with httpx.AsyncClient(transport=transport, auth=auth) as client:
        with tracer.start_as_current_span("caller") as caller:
            await client.get(str(auth._source.environment.base_url))
    return caller.get_span_context()


def test_the_renewal_of_an_event_loop_is_below_the_task_that_began_it(
    fetcher: TokenFetcher, telemetry: Telemetry, tracer: Tracer
) -> None:
    caller = asyncio.run(_get(HttpxD1Auth(fetcher), tracer))
    (renewal,) = renewals(telemetry)
    assert renewal.parent == caller


def test_a_renewal_that_several_wait_for_is_linked_to_the_others(
    make_fetcher: FetcherMaker, telemetry: Telemetry, tracer: Tracer
) -> None:
    release = threading.Event()

    def correlation_id() -> str:
        assert release.wait(60)
        return "held-up"

    fetcher = make_fetcher(observers=[telemetry.observer], correlation_id=correlation_id)
    callers: list[SpanContext] = []

    def call() -> None:
        with tracer.start_as_current_span("caller") as caller:
            callers.append(caller.get_span_context())
            fetcher.token()

    def waiting(number: int) -> None:
        until(lambda: fetcher._flight is not None and len(fetcher._flight.callers) == number)

    threads = [threading.Thread(target=call) for _ in range(4)]
    threads[0].start()
    waiting(1)
    for thread in threads[1:]:
        thread.start()
    waiting(4)
    with tracer.start_as_current_span("impatient") as impatient:
        for _ in range(2):
            with pytest.raises(TokenTimeout, match="No token within"):
                fetcher.token(timeout=0.01)
    with pytest.raises(TokenTimeout, match="No token within"):
        fetcher.token(timeout=0.01)  # without a span
    release.set()
    for thread in threads:
        thread.join(60)
    (renewal,) = renewals(telemetry)
    assert renewal.parent == callers[0]
    others = [*callers[1:], impatient.get_span_context()]
    assert {(link.context.trace_id, link.context.span_id) for link in renewal.links} == {
        (other.trace_id, other.span_id) for other in others
    }
    assert len(renewal.links) == len(others)


def test_links_are_bounded() -> None:
    flight = Flight(starts_in=0, total=1)
    for number in range(1000):
        flight.awaited_in((f"{1:032x}", f"{number + 1:016x}"))
    assert len(flight.callers) == 128


class Broken(TracerProvider):
    def get_tracer(self, *_: Any, **__: Any) -> Any:
        def start_span(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError("no span to be had")

        return SimpleNamespace(start_span=start_span)


def test_a_broken_tracer_breaks_nothing(
    make_fetcher: FetcherMaker, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    observer = OpenTelemetryObserver(telemetry.meters, Broken())
    with caplog.at_level(logging.WARNING, "d1_signer"):
        assert make_fetcher(observers=[observer]).token().value
        until(lambda: caplog.text.count("observer.failed RuntimeError") == 3)
    (point,) = telemetry.points()["d1_signer.token.renewal.duration"]
    assert point.count == 1


def test_events_that_are_passed_on_alone_have_their_spans(
    make_fetcher: FetcherMaker, telemetry: Telemetry
) -> None:
    def pass_on(event: Event) -> None:
        telemetry.observer(event)

    make_fetcher(observers=[pass_on]).token()
    (renewal,) = renewals(telemetry)
    assert renewal.parent is None
    assert renewal.start_time is not None
    assert renewal.end_time is not None
    assert renewal.end_time > renewal.start_time


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


@pytest.fixture
def trail(place: Path) -> Iterator[AuditTrail]:
    with AuditTrail(place, origin=ORIGIN) as trail:
        yield trail


def begun(place: Path, action: str) -> list[dict[str, Any]]:
    return [record for record in records(place) if record.get("action") == action]


def test_the_trail_joins_with_the_request_and_the_trace(
    make_fetcher: FetcherMaker,
    pem_uri: str,
    trail: AuditTrail,
    place: Path,
    sandbox: Sandbox,
    telemetry: Telemetry,
) -> None:
    with open_signer(pem_uri, kid=KID, trail=trail) as signer:
        sandbox.misbehave(Fault.STATUS_503, times=1, retry_after=None)
        make_fetcher(signer=signer, observers=[telemetry.observer]).token()
    (renewal,) = renewals(telemetry)
    context = context_of(renewal)
    signed = begun(place, "sign")
    assert len(signed) == len(sandbox.requests) == 2
    for record, request in zip(signed, sandbox.requests, strict=True):
        assert record["references"] == [
            ["iss", request.claims["iss"]],
            ["jti", request.claims["jti"]],
            ["correlation_id", request.correlation_id],
            ["trace_id", f"{context.trace_id:032x}"],
            ["span_id", f"{context.span_id:016x}"],
        ]
    told = [dict(span.attributes or {}) for span in telemetry.spans("d1_signer.token.request")]
    for attributes, request in zip(told, sandbox.requests, strict=True):
        assert attributes["d1_signer.correlation_id"] == request.correlation_id
        assert attributes["d1_signer.jti"] == request.claims["jti"]


def test_every_use_of_a_key_has_the_current_span(
    pem_uri: str, trail: AuditTrail, place: Path, tracer: Tracer
) -> None:
    with open_signer(pem_uri, kid=KID, trail=trail) as signer:
        signer.sign(b"without a span")
        with tracer.start_as_current_span("caller") as caller:
            signer.sign(b"without a purpose")
            signer.custody()
    context = caller.get_span_context()
    joined = [["trace_id", f"{context.trace_id:032x}"], ["span_id", f"{context.span_id:016x}"]]
    told = [record.get("references") for record in begun(place, "sign")]
    assert told == [None, joined]
    assert [record["references"] for record in begun(place, "custody")] == [joined]
    trail.close()
    (report,) = verified(place)
    assert not report.unfinished


@pytest.mark.parametrize("trace", [SimpleNamespace(), None])
def test_a_broken_opentelemetry_breaks_no_signature(
    pem_uri: str,
    trail: AuditTrail,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    trace: SimpleNamespace | None,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)  # None: it may not be imported
    with open_signer(pem_uri, kid=KID, trail=trail) as signer:
        assert len(signer.sign(b"x")) == 64
    assert "references" not in begun(place, "sign")[0]


def test_nothing_is_loaded_for_a_span_that_nobody_has(pem_uri: str, place: Path) -> None:
    code = """
import sys
from d1_signer import AuditTrail, open_signer
with AuditTrail(sys.argv[2], origin="bank.example/d1") as trail:
    with open_signer(sys.argv[1], trail=trail) as signer:
        signer.sign(b"x")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code, pem_uri, str(place)], check=True, timeout=120)
    assert "references" not in begun(place, "sign")[0]

# SPDX-License-Identifier: Apache-2.0
"""The rules for Prometheus ask for metrics and labels that the observer exports."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    Sum,
)

from d1_signer import (
    AuditTrail,
    CertificateEvent,
    FailoverEvent,
    RenewalEvent,
    RequestEvent,
    SignEvent,
)
from d1_signer.otel import OpenTelemetryObserver
from tests.docs.reading import ROOT, anchors, error_kinds, rows, section

RULES = ROOT / "docs" / "examples" / "alerts.yaml"
(GROUP,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS: list[dict[str, Any]] = GROUP["rules"]
Each = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
UNITS = {"s": "_seconds", "1": "", "{failover}": "", "{record}": ""}
OF_PROMETHEUS = {"job", "instance", "le"}


def exported() -> dict[str, tuple[set[str], Metric]]:
    """Names of the series by the translation of OpenTelemetry's specification, and their labels.

    One event of each kind, with all that it can have, is what any of them can come to.
    """
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    with (
        tempfile.TemporaryDirectory() as folder,
        AuditTrail(folder, origin="bank.example/d1") as trail,
    ):
        observer = OpenTelemetryObserver(provider, trail=trail)
        for event in events():
            observer(event)
        data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, tuple[set[str], Metric]] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        assert metric.unit is not None
        name = metric.name.replace(".", "_") + UNITS[metric.unit]
        labels = {
            label.replace(".", "_")
            for point in metric.data.data_points
            for label in point.attributes or {}
        }
        if isinstance(metric.data, Histogram):
            for end in ("_bucket", "_count", "_sum"):
                found[name + end] = (labels, metric)
        elif isinstance(metric.data, Sum) and metric.data.is_monotonic:
            found[f"{name}_total"] = (labels, metric)
        else:
            assert isinstance(metric.data, Gauge)
            # A gauge of unit 1 would become a ratio.
            assert metric.unit != "1"
            found[name] = (labels, metric)
    provider.shutdown()
    return found


def events() -> list[Any]:
    return [
        SignEvent(
            backend="pkcs11",
            kid="k",
            duration=0.1,
            error="signer_timeout",
            pool_use=(1, 4),
        ),
        FailoverEvent(kid="k", error="signer_timeout"),
        RequestEvent(duration=0.1, status=400, error="token_refused", correlation_id="c"),
        RenewalEvent(duration=0.1, error=None, expires_in=900.0, shared=False, store="away"),
        RenewalEvent(duration=0.1, error="token_refused", expires_in=None, shared=False),
        CertificateEvent(subject="CN=c", serial_number=1, not_after=1e10),
    ]


def selectors(expression: str) -> list[tuple[str, Mapping[str, tuple[str, str]]]]:
    """The series that an expression asks for, with their matchers."""
    found: list[tuple[str, Mapping[str, tuple[str, str]]]] = []
    for name, braces in re.findall(r"\b(d1_signer_\w+)(?:\{([^}]*)\})?(?=[\[\s)]|$)", expression):
        matchers = re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', braces)
        found.append((name, {label: (sign, value) for label, sign, value in matchers}))
    return found


def without_grouping(expression: str) -> tuple[str, set[str]]:
    """An expression without its ``by (…)``, and the labels in these."""
    lists = re.findall(r"\bby \(([^)]*)\)", expression)
    labels = {label.strip() for each in lists for label in each.split(",")}
    return re.sub(r"\bby \([^)]*\)", "", expression), labels


@Each
def test_what_it_asks_for_is_exported(alert: dict[str, Any]) -> None:
    series = exported()
    expression, grouped = without_grouping(alert["expr"])
    asked = selectors(expression)
    assert asked
    known: set[str] = set(OF_PROMETHEUS)
    for name, matchers in asked:
        assert name in series, name
        labels, metric = series[name]
        known |= labels
        assert set(matchers) <= labels | {"le"}, name
        if "le" in matchers:
            (point, *_) = metric.data.data_points
            assert isinstance(point, HistogramDataPoint)
            bounds = {str(bound) for bound in point.explicit_bounds}
            assert matchers["le"][1] in bounds
        if "error_type" in matchers and matchers["error_type"][1]:
            assert matchers["error_type"][1] in {error.code for error in error_kinds()}
    assert grouped <= known
    # What is left after names, functions and numbers would be a slip of the pen.
    words = set(re.findall(r"(?<![\w\"])[a-z_]\w*(?=[\s({])", expression))
    functions = {"sum", "rate", "increase", "histogram_quantile"}
    assert words <= functions | {name for name, _ in asked}
    assert expression.count("(") == expression.count(")")


@Each
def test_its_text_has_labels_that_are_left(alert: dict[str, Any]) -> None:
    text = " ".join(alert["annotations"].values())
    used = set(re.findall(r"\$labels\.(\w+)", text))
    expression, grouped = without_grouping(alert["expr"])
    labels = set().union(*(exported()[name][0] for name, _ in selectors(expression)))
    left = grouped - {"le"} if grouped else labels | {"job", "instance"}
    assert used <= left


@Each
def test_it_leads_to_a_section_of_the_runbook(alert: dict[str, Any]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert (ROOT / page).exists()
    assert anchor in anchors((ROOT / page).read_text(encoding="utf-8"))
    assert alert["labels"]["severity"] in {"page", "warn", "ticket"}
    assert re.fullmatch(r"\d+[smh]", alert.get("for", "0s"))


def test_the_runbook_lists_them_and_leads_where_they_lead() -> None:
    told = {
        name.strip("`"): re.findall(r"\]\(#([^)]+)\)", do)
        for name, means, do in rows(section(RUNBOOK, "Alerts"), 3)
        if means
    }
    assert told == {
        alert["alert"]: [alert["annotations"]["runbook"].partition("#")[2]] for alert in ALERTS
    }
    named = set(re.findall(r"alert `(\w+)`", RUNBOOK))
    assert named <= set(told)


def test_thresholds_are_those_of_the_pages() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    means = {row[0].strip("`"): row[1] for row in rows(section(RUNBOOK, "Alerts"), 3)}
    by_name = {alert["alert"]: alert["expr"] for alert in ALERTS}
    assert "`d1_signer.token.remaining_life` below 120 s" in section(page, "What to alert on")
    assert "less than two minutes" in means["D1TokenEnds"]
    assert by_name["D1TokenEnds"].endswith("< 120")
    assert "within 30 days" in means["D1ClientCertificateEnds"]
    assert by_name["D1ClientCertificateEnds"].endswith("< 30 * 24 * 3600")
    usual = inspect.signature(AuditTrail).parameters["seal_seconds"].default
    assert "five times a trail's usual `seal_seconds`" in means["D1AuditUnsealed"]
    assert by_name["D1AuditUnsealed"].endswith(f"> {5 * usual:.0f}")


def test_promtool_takes_the_rules() -> None:
    """Where it is installed; what else it would find is looked for above."""
    assert set(GROUP) == {"name", "rules"}
    assert all(set(alert) <= {"alert", "expr", "for", "labels", "annotations"} for alert in ALERTS)
    if shutil.which("promtool"):
        told = subprocess.run(
            ["promtool", "check", "rules", str(RULES)],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert told.returncode == 0, told.stdout + told.stderr

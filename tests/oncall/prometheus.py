# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry's metrics as Prometheus would scrape them; histograms by count and sum alone."""

from __future__ import annotations

from collections.abc import Iterator

from opentelemetry.sdk.metrics.export import (
    Gauge,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    NumberDataPoint,
    Sum,
)

_UNITS = {"s": "_seconds"}


def text(reader: InMemoryMetricReader) -> str:
    """What has been measured so far, by the names that OpenTelemetry's specification makes."""
    data = reader.get_metrics_data()
    scopes = [scope for one in data.resource_metrics for scope in one.scope_metrics] if data else []
    metrics = [metric for scope in scopes for metric in scope.metrics]
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    name = metric.name.replace(".", "_") + _UNITS.get(metric.unit or "", "")
    if isinstance(metric.data, Sum):
        name, kind = f"{name}_total", "counter"
    else:
        kind = "gauge" if isinstance(metric.data, Gauge) else "summary"
    yield f"# HELP {name} {metric.description}"
    yield f"# TYPE {name} {kind}"
    for point in metric.data.data_points:
        pairs = sorted((point.attributes or {}).items())
        labels = ",".join(f'{label.replace(".", "_")}="{value!s}"' for label, value in pairs)
        if isinstance(point, HistogramDataPoint):
            yield f"{name}_count{{{labels}}} {point.count}"
            yield f"{name}_sum{{{labels}}} {point.sum:.3f}"
        elif isinstance(point, NumberDataPoint):
            yield f"{name}{{{labels}}} {point.value:.0f}"

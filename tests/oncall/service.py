# SPDX-License-Identifier: Apache-2.0
"""An issuer's service: it activates cards at D1 as load comes, and shows what production shows.

python -m tests.oncall.service SETTINGS FOLDER HOST SECONDS RETRY
"""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from pathlib import Path

import requests
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import NoOpTracerProvider

from d1_signer import D1SignerError, TokenFetcher
from d1_signer.otel import OpenTelemetryObserver
from tests.oncall import prometheus

_CALLERS = 2
_log = logging.getLogger("issuer")
_access = logging.getLogger("issuer.access")


def main(settings: Path, folder: Path, host: str, seconds: float, retry: float) -> None:
    """Serve until killed.

    Args:
        settings: The fetcher's file.
        folder: Gets the log, which all hosts share, and this host's metrics and status.
        host: Its name.
        seconds: Between two calls of one caller.
        retry: Seconds between two renewals at least.
    """
    _write_log(folder / "log.txt", host)
    reader = InMemoryMetricReader()
    observer = OpenTelemetryObserver(
        MeterProvider([reader], shutdown_on_exit=False),
        NoOpTracerProvider(),
        attributes={"host.name": host},
    )
    _log.info("starting, settings %s", settings)
    fetcher = TokenFetcher.from_settings(settings, observers=[observer], retry_interval=retry)
    for _ in range(_CALLERS):
        threading.Thread(target=_load, args=(fetcher, seconds), daemon=True).start()
    while True:
        metrics = prometheus.text(reader)
        status = json.dumps({host: fetcher.status().to_dict()}, indent=2)
        _replace(folder / f"metrics.{host}", metrics)
        _replace(folder / f"status.{host}", status)
        time.sleep(seconds / 2)


def _load(fetcher: TokenFetcher, seconds: float) -> None:
    with fetcher.session() as session:
        while True:
            _activate(fetcher, session)
            time.sleep(random.uniform(seconds / 2, 3 * seconds / 2))


def _activate(fetcher: TokenFetcher, session: requests.Session) -> None:
    started = time.perf_counter()
    outcome, told = 200, ""
    try:
        answer = session.get(f"{fetcher.environment.banking_url}/ping", timeout=5)
        outcome = 200 if answer.ok else 502
    except D1SignerError as error:
        outcome, told = 503, f" error={error.code}"
    except requests.RequestException as error:
        outcome, told = 502, f" error={type(error).__name__}"
    took = 1000 * (time.perf_counter() - started)
    path = f"/v1/cards/{random.randrange(10**6):06d}/activate"
    _access.info('"POST %s HTTP/1.1" %d %.0fms%s', path, outcome, took, told)


def _write_log(file: Path, host: str) -> None:
    form = f"%(asctime)s.%(msecs)03dZ {host} %(levelname)-7s %(name)s: %(message)s"
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%dT%H:%M:%S"))
    handler.formatter.converter = time.gmtime  # type: ignore[union-attr]
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for logger in ("d1_signer", "issuer"):
        logging.getLogger(logger).setLevel(logging.INFO)


def _replace(file: Path, content: str) -> None:
    fresh = file.with_suffix(f"{file.suffix}.new")
    fresh.write_text(content)
    fresh.replace(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))

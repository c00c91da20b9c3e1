# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/fleet.md and docs/rotation.md, as they stand: real servers, real forks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from d1_signer.sandbox import Sandbox
from tests.servers.process import accepts, free_port, running
from tests.servers.redis_server import RedisServer
from tests.token.fleet.member import ROOT
from tests.token.test_fetcher import until

EXAMPLES = ROOT / "docs/examples"
BIN = Path(sys.executable).parent

Server = Callable[..., object]


@contextmanager
def served(
    command: list[str], settings: dict[str, str], log: Path, ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | settings | {"PYTHONPATH": str(EXAMPLES)}
    with running(command, env=environment, log=log, ready=ready) as process:
        yield process
        # In order, so that what it closes is tested, too; `running` kills what is left.
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert "Traceback" not in log.read_text()


def calls(url: str, number: int, threads: int) -> list[int]:
    def one(_: int) -> int:
        return requests.get(url, timeout=20).status_code

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(number)))


@pytest.mark.parametrize("store", ["redis", "none"])
def test_gunicorn_preloaded_with_four_workers_of_eight_threads(
    member_settings: dict[str, str], sandbox: Sandbox, tmp_path: Path, store: str
) -> None:
    port = free_port()
    if store == "none":
        del member_settings["REDIS_URL"]
    command = [str(BIN / "gunicorn"), "--preload", "--workers", "4", "--threads", "8"]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "gunicorn_app:application"]
    url = f"http://127.0.0.1:{port}/"
    with served(command, member_settings, tmp_path / "log", lambda: accepts(port)):
        assert set(calls(url, 320, threads=32)) == {200}
        asked = sandbox.counters.token_requests
        assert 1 <= asked <= (1 if store == "redis" else 4)
        sandbox.revoke_tokens()
        # Each worker notices by a 401, forgets that token and repeats its call: no error.
        assert set(calls(url, 320, threads=32)) == {200}
        assert asked < sandbox.counters.token_requests <= 2 * asked + 3


def test_celery_with_a_worker_and_a_beat(
    member_settings: dict[str, str], sandbox: Sandbox, redis_server: RedisServer, tmp_path: Path
) -> None:
    broker = f"redis://127.0.0.1:{redis_server.port}/1"
    settings = member_settings | {
        "CELERY_BROKER_URL": broker,
        "CELERY_BACKEND_URL": broker,
        "D1_WARM_SECONDS": "0.5",
    }
    celery = [str(BIN / "celery"), "--app", "celery_app", "--quiet"]
    worker_log, beat_log = tmp_path / "worker", tmp_path / "beat"
    worker = [*celery, "worker", "--concurrency", "2", "--loglevel", "INFO", "--without-mingle"]
    beat = [*celery, "beat", "--schedule", str(tmp_path / "schedule")]
    with (
        served(worker, settings, worker_log, lambda: " ready" in worker_log.read_text()),
        served(beat, settings, beat_log, lambda: True),
    ):
        # The beat alone keeps a token warm, before anybody asks.
        until(lambda: sandbox.counters.token_requests >= 1, seconds=60)
        ask = (
            "import celery_app; print([celery_app.ping.delay().get(timeout=60) for _ in range(4)])"
        )
        asked = subprocess.run(
            [sys.executable, "-c", ask],
            env=os.environ | settings | {"PYTHONPATH": str(EXAMPLES)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert asked.stdout.strip() == "[200, 200, 200, 200]", asked.stderr + worker_log.read_text()
    worked = worker_log.read_text()
    # A machine that stands still for a second makes a store of two that answers too late.
    away = worked.count("fleet.store_unavailable")
    assert 1 <= sandbox.counters.token_requests <= 1 + away, worked


def test_fastapi_behind_uvicorn(
    member_settings: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    port = free_port()
    command = [str(BIN / "uvicorn"), "--port", str(port), "fastapi_app:app"]
    with served(command, member_settings, tmp_path / "log", lambda: accepts(port)):
        assert set(calls(f"http://127.0.0.1:{port}/ping", 160, threads=16)) == {200}
        assert sandbox.counters.token_requests == 1
        sandbox.revoke_tokens()
        assert set(calls(f"http://127.0.0.1:{port}/ping", 160, threads=16)) == {200}
        assert sandbox.counters.token_requests == 2


def test_rotation_and_failover() -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "rotation.py")],
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "rotated and failed over without an error"
    assert ended.stderr == ""


@pytest.mark.parametrize("page", ["fleet.md", "observability.md", "rotation.md"])
def test_the_pages_show_the_examples_as_they_are(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    shown = re.findall(
        r"<!-- examples/(\w+\.py)(?: (\w+))? -->\n```python\n(.*?)```", text, re.DOTALL
    )
    assert shown
    for name, function, code in shown:
        source = (EXAMPLES / name).read_text()
        part = source.partition('"""\n\n')[2]
        if function:
            start = source.index(f"def {function}(")
            part = source[start:].partition("\n\n\n")[0] + "\n"
        assert code == part, f"{page} shows another {name}"

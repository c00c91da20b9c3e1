# SPDX-License-Identifier: Apache-2.0
"""Rotation of key, certificate and limits in workers of gunicorn under load, as the page tells."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from d1_signer.sandbox import Sandbox
from d1_signer.token.settings import Settings
from tests.servers.process import accepts, free_port
from tests.servers.redis_server import RedisServer
from tests.token.fleet.member import ROOT
from tests.token.fleet.test_examples import BIN, EXAMPLES, served
from tests.token.following import SettingsFile
from tests.token.test_fetcher import until

# For gunicorn's own configuration: no call, and no look at the status, finds a change of the file.
AT_A_SIGNAL_ALONE = """
from unittest.mock import patch

from d1_signer.token.following import Following

patch.object(Following, "look", lambda _: None).start()
"""

PAGE = (ROOT / "docs/settings.md").read_text()
ROTATION = (ROOT / "docs/rotation.md").read_text()


@pytest.fixture
def file(tmp_path: Path, sandbox: Sandbox, redis_server: RedisServer) -> SettingsFile:
    key = tmp_path / "store-key"
    key.touch(0o600)
    key.write_text(os.urandom(32).hex())
    file = SettingsFile(tmp_path, sandbox)
    file.store = f'[store]\nurl = "{redis_server.url}"\nkey_source = "file:{key}"\n'
    file.keys("key-0")
    file.tables = file.store
    file.write()
    return file


class Load:
    """Callers that ask the workers all the time, and all that came back."""

    def __init__(self, url: str, callers: int) -> None:
        self.statuses: list[int | str] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                self.statuses.append(requests.get(self._url, timeout=120).status_code)
            except requests.RequestException as error:
                self.statuses.append(repr(error))

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(60)


def told(url: str, workers: int) -> dict[int, dict[str, Any]]:
    """What each of the workers tells of itself, by its process id."""
    found: dict[int, dict[str, Any]] = {}

    def all_asked() -> bool:
        document = json.loads(requests.get(f"{url}healthz", timeout=120).content)
        found[document["pid"]] = document
        return len(found) == workers

    until(all_asked, seconds=240)
    return found


def rotate(file: SettingsFile, number: int) -> str:
    """Write another key, certificate and limits, as an operator does; returns the digest."""
    file.keys(f"key-{number}", f"key-{number - 1}")
    file.certificate(*file.sandbox.issue_client_certificate())
    file.tables = f"[limits]\ntotal = {20 + number}\nread = {5 + number}\n{file.store}"
    file.write()
    return Settings.read(file.path).digest


def signing(file: SettingsFile) -> str:
    return str(file.sandbox.requests[-1].header["kid"])


def rotated_under_load(
    file: SettingsFile, log: Path, *, workers: int, callers: int, signals: bool
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [str(BIN / "gunicorn"), "--workers", str(workers), "--threads", "4"]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "--timeout", "120"]
    command += ["--keep-alive", "0"]
    if signals:
        config = log.with_name("conf.py")
        config.write_text(AT_A_SIGNAL_ALONE)
        command += ["--config", str(config)]
    command += ["gunicorn_settings:application"]
    load = Load(url, callers)
    file.sandbox.set_token_lifetime(12.0)  # so that each new key has to sign soon
    with served(command, {"D1_CONFIG": str(file.path)}, log, lambda: accepts(port)):
        before = told(url, workers)
        with load.running():
            for number in (1, 2, 3):
                digest = rotate(file, number)
                if signals:
                    for worker in before:
                        os.kill(worker, signal.SIGHUP)

                def everywhere(digest: str = digest) -> bool:
                    now = told(url, workers)
                    assert set(now) == set(before)  # no worker was started anew
                    return {each["settings"]["digest"] for each in now.values()} == {digest}

                until(everywhere, seconds=300)
                now = told(url, workers).values()
                assert {each["members"][0]["kid"] for each in now} == {f"key-{number}"}
                assert len({each["client_certificate"]["fingerprint"] for each in now}) == 1
                until(lambda: signing(file) == f"key-{number}", seconds=120)  # noqa: B023 (now)
    assert {*load.statuses} == {200}
    assert len(load.statuses) > 100


@pytest.mark.parametrize("signals", [True, False])
def test_rotation_in_workers_under_load(
    file: SettingsFile, tmp_path: Path, *, signals: bool
) -> None:
    rotated_under_load(file, tmp_path / "log", workers=3, callers=6, signals=signals)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("signals", [True, False])
def test_rotation_in_twenty_workers_under_load(
    file: SettingsFile, tmp_path: Path, *, signals: bool
) -> None:
    rotated_under_load(file, tmp_path / "log", workers=20, callers=16, signals=signals)


def test_a_signal_to_the_workers_of_a_preloaded_server(file: SettingsFile, tmp_path: Path) -> None:
    port = free_port()
    config, pid = tmp_path / "conf.py", tmp_path / "pid"
    config.write_text(
        f"{AT_A_SIGNAL_ALONE}\n\ndef post_worker_init(_):\n    import signal\n\n"
        "    import gunicorn_settings\n\n    gunicorn_settings.fetcher.reload_on(signal.SIGHUP)\n"
    )
    command = [str(BIN / "gunicorn"), "--preload", "--workers", "2", "--config", str(config)]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "--pid", str(pid)]
    command += ["gunicorn_settings:application"]
    url = f"http://127.0.0.1:{port}/"
    settings = {"D1_CONFIG": str(file.path)}
    with served(command, settings, tmp_path / "log", lambda: accepts(port)):
        before = told(url, 2)
        digest = rotate(file, 1)
        subprocess.run(["pkill", "-HUP", "-P", pid.read_text().strip()], check=True)
        until(lambda: digests(url, 2) == {digest}, seconds=60)
        assert set(told(url, 2)) == set(before)  # no worker was started anew


@pytest.mark.timeout(300)
def test_the_commands_of_the_page_rotate(
    file: SettingsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed; with two workers, since twenty take their time."""
    monkeypatch.chdir(tmp_path)
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    (block,) = re.findall(r"^```sh\n(D1_CONFIG=.*?)^```$", ROTATION, re.DOTALL | re.MULTILINE)
    (move,) = re.findall(r"^2\. `(mv [^`]*)`", ROTATION, re.MULTILINE)
    (hang_up,) = re.findall(r"`(pkill -HUP [^`]*)`", ROTATION)
    (check,) = re.findall(r"`(d1-signer check --config [^`]*)`", ROTATION)
    file.path = file.path.with_name("production.toml")
    file.write()
    (tmp_path / "gunicorn_settings.py").write_text((EXAMPLES / "gunicorn_settings.py").read_text())
    command = block.replace("/etc/d1/production.toml", str(file.path))
    assert "--workers 20 " in command
    command = command.replace("--workers 20 ", "--workers 2 ")

    def typed(line: str) -> None:
        settings = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-euc", line], env=settings, check=True, timeout=100)

    (tmp_path / "conf.py").write_text(AT_A_SIGNAL_ALONE)
    bind = {
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port} --no-control-socket --config conf.py",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    with served(["bash", "-euc", command], bind, tmp_path / "log", lambda: accepts(port)):
        workers = told(url, 2)
        file.keys("key-1", "key-0")
        Path(f"{file.path}.new").write_text(file.text())
        typed(check)
        typed(move)
        typed(hang_up)
        digest = Settings.read(file.path).digest
        until(lambda: digests(url, 2) == {digest}, seconds=120)
        assert set(told(url, 2)) == set(workers)  # no worker was started anew


def digests(url: str, workers: int) -> set[str]:
    return {each["settings"]["digest"] for each in told(url, workers).values()}


def test_every_name_of_the_schema_is_on_the_page() -> None:
    from d1_signer.token.values import _LIMITS, _STORE, FIELDS

    for name in (*FIELDS, *_LIMITS, *_STORE):
        assert f"`{name}`" in PAGE or f"`[{name}]`" in PAGE, name

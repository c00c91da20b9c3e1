# SPDX-License-Identifier: Apache-2.0
"""`d1-signer sandbox` as a process: used by the other commands, ended by a signal."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.cli.conftest import COMMAND, Run, run_process

_START = (
    "import os, signal, sys\n"
    "signal.signal(signal.SIGHUP, signal.Handlers(int(sys.argv[1])))\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


@contextlib.contextmanager
def running(
    *arguments: str, hang_up: signal.Handlers = signal.SIG_DFL, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        # What becomes of SIGHUP is inherited, and the tests may run under nohup themselves.
        [sys.executable, "-c", _START, str(int(hang_up)), *COMMAND, "sandbox", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    document: dict[str, Any] = json.loads(process.stdout.readline())
    return document


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_serves_the_other_commands_until_a_signal(
    run: Run, key_uri: str, number: signal.Signals
) -> None:
    with running("--json", D1_SIGNER_KEY=key_uri) as process:
        told = first_line(process)
        variables = told["variables"]
        assert told["kids"] == ["bank-2026"]
        folder = Path(variables["D1_CA_FILE"]).parent
        assert folder.is_dir()
        result = run("token", "--json", D1_SIGNER_KEY=key_uri, **variables)
        assert result.status == 0
        assert result.document["environment"] + "/oauth2/token" == told["token_endpoint"]
        assert run("check").out.endswith("All steps passed.\n")
        assert stop(process, number) == ("", "")
    assert not folder.exists()


def test_it_outlives_the_terminal_under_nohup(run: Run, key_uri: str) -> None:
    with running("--json", D1_SIGNER_KEY=key_uri, hang_up=signal.SIG_IGN) as process:
        variables = first_line(process)["variables"]
        process.send_signal(signal.SIGHUP)
        assert run("token", D1_SIGNER_KEY=key_uri, **variables).status == 0
        assert process.poll() is None
        stop(process, signal.SIGTERM)
    assert not Path(variables["D1_CA_FILE"]).exists()


def test_text_is_for_the_shell(run: Run, key_uri: str) -> None:
    with running("--issuer-id", "it's me", "--key", key_uri) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        assert lines[0].startswith("# ")
        assert "bank-2026" in lines[0]
        words = [shlex.split(line) for line in lines[1:]]
        assert {word[0] for word in words} == {"export"}
        variables = dict(word[1].split("=", 1) for word in words)
        assert variables["D1_ISSUER_ID"] == "it's me"
        assert run("token", D1_SIGNER_KEY=key_uri, **variables).status == 0
        _, err = stop(process, signal.SIGTERM)
    assert err == ("Stopped after 1 token requests, 1 tokens issued, 0 calls of the banking API.\n")


def test_registers_pem_and_jwk_files_and_speaks_http(
    run: Run, key_uri: str, other_uri: str, tmp_path: Path
) -> None:
    pem, jwk = str(tmp_path / "a.pem"), str(tmp_path / "b.jwk")
    run("public-key", "--key", key_uri, "-o", pem)
    run("public-key", "--key", other_uri, "--format", "jwk", "-o", jwk)
    registered = ("--register", f"bank-2026={pem}", "--register", f"next-2027={jwk}")
    with running("--json", "--http", *registered) as process:
        told = first_line(process)
        assert told["kids"] == ["bank-2026", "next-2027"]
        assert set(told["variables"]) == {"D1_ENVIRONMENT", "D1_ISSUER_ID"}
        assert told["variables"]["D1_ENVIRONMENT"].startswith("http://127.0.0.1:")
        for uri in (key_uri, other_uri):
            token = run("token", "--show-token", "--key", uri, **told["variables"]).out.strip()
            bearer = {"Authorization": f"Bearer {token}"}
            ping = requests.get(told["banking_url"] + "/ping", headers=bearer, timeout=10)
            assert ping.status_code == 200
        stop(process, signal.SIGTERM)


def test_misbehaves_and_shortens_tokens(run: Run, key_uri: str) -> None:
    fault = ("--fault", "invalid-grant", "--fault-parameter", "times=1")
    skew = ("--fault-parameter", "date_offset=0")
    with running("--json", "--token-lifetime", "60", *fault, *skew, "--key", key_uri) as process:
        variables = first_line(process)["variables"]
        refused = run("token", "--json", D1_SIGNER_KEY=key_uri, **variables)
        assert (refused.status, refused.document["code"]) == (1, "token_refused")
        given = run("token", "--json")
        assert given.status == 0
        assert 40 < given.document["expires_in"] <= 60
        stop(process, signal.SIGTERM)


def test_a_port_of_ones_own() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run_process("sandbox", "--json", "--port", port)
    assert result.status == 2
    assert result.document["code"] == "configuration"
    with running("--json", "--port", port) as process:
        assert f":{port}/" in first_line(process)["token_endpoint"]
        stop(process, signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fault", "no-such"], "--fault"),
        (["--fault-parameter", "seconds=1"], "needs --fault"),
        (["--fault", "delay", "--fault-parameter", "seconds"], "NAME=VALUE"),
        (["--fault", "delay", "--fault-parameter", "fault=1"], "NAME=VALUE"),
        (["--fault", "delay", "--fault-parameter", "other=1"], "no parameter 'other'"),
        (["--fault", "delay", "--fault-parameter", "seconds=soon"], "wrong type"),
        (["--fault", "delay", "--fault-parameter", "times=0"], "times"),
        (["--register", "kid"], "KID=FILE"),
        (["--register", "kid=/none/key.pem"], "cannot be read"),
        (["--token-lifetime", "0"], "positive"),
        (["--port", "70000"], "--port"),
    ],
)
def test_wrong_usage_is_told(run: Run, arguments: list[str], told: str) -> None:
    result = run("sandbox", *arguments)
    assert result.status == 2
    assert told in result.err
    assert result.out == ""


def test_a_file_that_is_no_text(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    result = run("sandbox", "--json", "--register", f"kid={file}")
    assert result.status == 2
    assert result.document["message"].endswith("key cannot be read: not a text file.")


@pytest.mark.parametrize("content", ["", "no key", "[]", '"x"', '{"kty": "EC", "crv": "P-384"}'])
def test_a_file_without_a_public_key(run: Run, tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    result = run("sandbox", "--json", "--register", f"kid={file}")
    assert result.status == 1
    assert result.document["code"] == "invalid_key"

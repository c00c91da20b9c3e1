# SPDX-License-Identifier: Apache-2.0
"""The command in this process and in one of its own; both are searched for secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qs

import pytest

from d1_signer import generate_key
from d1_signer.cli import main
from d1_signer.sandbox import Sandbox
from tests.conftest import LeakWatch

ISSUER = "cli-issuer"
COMMAND = (sys.executable, "-m", "d1_signer.cli")
_SHOWING = ("--show-token", "--show-assertion")


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        document: dict[str, Any] = json.loads(self.out)
        assert self.out.count("\n") == 1
        return document


class Run(Protocol):
    def __call__(self, *arguments: str, **variables: str) -> Result: ...


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("D1_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, leak_watch: LeakWatch
) -> Run:
    """Run a command in this process; keywords are environment variables, for this run and later."""

    def run(*arguments: str, **variables: str) -> Result:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        status = main(arguments)
        out, err = capsys.readouterr()
        shown = err if any(flag in arguments for flag in _SHOWING) else out + err
        assert not [secret for secret in leak_watch.secrets if secret in shown]
        assert "Traceback" not in err
        return Result(status, out, err)

    return run


def run_process(*arguments: str, **variables: str) -> Result:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, **variables},
    )
    assert "Traceback" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def run_onto(stdout: BinaryIO, *arguments: str, **variables: str) -> Result:
    """Run a command whose standard output leads there."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **variables},
    )
    return Result(done.returncode, "", done.stderr)


def run_on_full_stdout(*arguments: str) -> Result:
    """Run a command whose standard output has no room."""
    with Path("/dev/full").open("wb") as full:
        return run_onto(full, *arguments)


@pytest.fixture(scope="session")
def other_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("keys") / "other.pem"
    return generate_key(path.as_uri()).uri + "#next-2027"


@pytest.fixture(scope="session")
def key_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("keys") / "key.pem"
    return generate_key(path.as_uri()).uri + "#bank-2026"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(ISSUER) as sandbox:
        yield sandbox


@pytest.fixture
def settings(sandbox: Sandbox, key_uri: str, run: Run) -> dict[str, str]:
    """All D1_* variables for the sandbox, which knows the key."""
    jwk = run("public-key", "--key", key_uri, "--format", "jwk", "--json").document
    sandbox.register_key("bank-2026", jwk["public_key"])
    return {
        "D1_SIGNER_KEY": key_uri,
        "D1_ISSUER_ID": ISSUER,
        "D1_ENVIRONMENT": sandbox.base_url,
        "D1_CLIENT_CERT": str(sandbox.client_certificate),
        "D1_CLIENT_KEY": str(sandbox.client_key),
        "D1_CA_FILE": str(sandbox.ca_file),
    }


def bearer_values(sandbox: Sandbox) -> list[str]:
    """The assertions and tokens that went over the wire."""
    values = []
    for exchange in sandbox.exchanges:
        values += parse_qs(exchange.request_body.decode()).get("assertion", [])
        if exchange.status == 200 and exchange.path.endswith("/token"):
            values.append(json.loads(exchange.response_body)["access_token"])
    return [value for value in values if value != "not-an-assertion"]

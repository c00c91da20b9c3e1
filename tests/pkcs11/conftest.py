# SPDX-License-Identifier: Apache-2.0
"""SoftHSM tokens of one's own for each test, and child processes that end with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d1_signer.backends.pkcs11.session.pin import refused
from d1_signer.signing.opening import generate_key
from d1_signer.testing import SoftHsmToken, make_softhsm_token
from tests.pkcs11 import shim as shims
from tests.pkcs11.shim import Shim
from tests.pkcs11.softhsm import copy_token
from tests.pkcs11.wire import Wire, wire

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prepared_token(tmp_path_factory: pytest.TempPathFactory) -> SoftHsmToken:
    """A token with the key ``d1``; never used itself, only copied."""
    token = make_softhsm_token(tmp_path_factory.mktemp("prepared"))
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ["SOFTHSM2_CONF"] = str(token.configuration)
    try:
        generate_key(token.uri)
    finally:
        if before is None:
            del os.environ["SOFTHSM2_CONF"]
        else:
            os.environ["SOFTHSM2_CONF"] = before
    return token


@pytest.fixture(autouse=True)
def no_pin_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are one token to the memory of failed PINs, which lasts as long as the process."""
    monkeypatch.setattr(refused, "_digests", set())
    monkeypatch.setattr(refused, "_taken", set())


@pytest.fixture
def token(
    prepared_token: SoftHsmToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SoftHsmToken:
    """A token of this test's own with the key ``d1``, seen by the module in this process."""
    mine = copy_token(prepared_token, tmp_path / "token")
    monkeypatch.setenv("SOFTHSM2_CONF", str(mine.configuration))
    return mine


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python() -> Run:
    """Run Python code in a process of its own, so that a crash there is a failed test here."""

    def run(
        code: str, *arguments: str, timeout: float = 60, prefix: tuple[str, ...] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-X", "faulthandler", "-c", code, *arguments],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def shim_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shim(
    shim_path: Path, token: SoftHsmToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shim]:
    """The module in front of ``token``; a copy, since the state belongs to a loaded file."""
    mine = tmp_path / "shim.so"
    shutil.copy2(shim_path, mine)
    made = Shim(mine, token.module_path, tmp_path / "shim.state")
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.fixture
def hsm(token: SoftHsmToken, tmp_path: Path) -> Iterator[Wire]:
    """The token behind a server on a socket."""
    with wire(token, tmp_path) as running:
        yield running

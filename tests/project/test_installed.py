# SPDX-License-Identifier: Apache-2.0
"""From the wheel alone: its commands in a fresh environment, without this source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, installed where everything else comes from this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=50
    )
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run(
        [*install, "--no-index", "--no-deps", str(wheel)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    (libraries,) = folder.glob("lib/python*/site-packages")
    # A folder in a .pth file is searched last, and .pth files in it are not read: the editable
    # installation of the source tree stays away.
    (libraries / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "d1-signer"


def run(program: Path, *arguments: str, home: Path) -> str:
    """Run the command as a user does, with nothing of this source tree around it."""
    environment = {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "TMPDIR": str(home),
    }
    done = subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env=environment,
        cwd=home,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(home.iterdir()) == []
    return done.stdout


def test_it_is_the_installed_one(program: Path, tmp_path: Path) -> None:
    code = "import d1_signer; print(d1_signer.__file__)"
    told = run(program.with_name("python"), "-c", code, home=tmp_path)
    assert Path(told.strip()).is_relative_to(program.parents[1])


def test_the_first_signature_in_softhsm_by_one_command(program: Path, tmp_path: Path) -> None:
    told = json.loads(run(program, "demo", "--json", home=tmp_path))
    assert told["key"]["key_uri"].startswith("pkcs11:token=d1-demo;")
    assert told["signature"]["bytes"] == 64
    assert told["call"]["status"] == 200


def test_the_first_token_of_the_sandbox_by_one_command(program: Path, tmp_path: Path) -> None:
    told = run(program, "sandbox", "--", "d1-signer", "token", "--json", home=tmp_path)
    assert json.loads(told)["token_type"] == "Bearer"


def test_the_helper_of_softhsm(program: Path, tmp_path: Path) -> None:
    script = "d1-signer generate-key >&2 && d1-signer sandbox -- d1-signer check --json"
    told = json.loads(run(program, "softhsm", "--", "sh", "-c", script, home=tmp_path))
    assert told["ok"]
    assert {step["status"] for step in told["steps"]} == {"ok"}
    assert "module" in {step["step"] for step in told["steps"]}


@pytest.mark.parametrize("module", ["d1_signer", "d1_signer.cli"])
def test_the_package_as_a_program(program: Path, module: str, tmp_path: Path) -> None:
    told = run(program.with_name("python"), "-m", module, "--help", home=tmp_path)
    for name in ("demo", "sandbox", "softhsm"):
        assert f"  {name} " in told


PROJECT = """
import d1_signer

pytest_plugins = ["d1_signer.testing"]


def test_a_call(d1_fetcher, d1_sandbox):
    d1_sandbox.misbehave("status-503", times=1)
    with d1_fetcher.session() as session:
        assert session.get(d1_sandbox.banking_url + "/ping").ok


def test_a_signature(in_memory_signer, softhsm_token):
    assert len(in_memory_signer.sign(b"message")) == 64
    d1_signer.generate_key(softhsm_token.uri)
    with d1_signer.open_signer(softhsm_token.uri) as signer:
        assert len(signer.sign(b"message")) == 64
"""


def test_the_fixtures_in_another_projects_tests(program: Path, tmp_path: Path) -> None:
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    (project / "test_service.py").write_text(PROJECT)
    options = ("-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'temporary'}")
    told = run(
        program.with_name("python"),
        "-m",
        "pytest",
        *options,
        "-W",
        "error",
        str(project),
        home=home,
    )
    assert "2 passed" in told

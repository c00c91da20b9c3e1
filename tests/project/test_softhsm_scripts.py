# SPDX-License-Identifier: Apache-2.0
"""The scripts in softhsm/, on the real SoftHSM and looked at with OpenSC's pkcs11-tool."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

ROOT = Path(__file__).parents[2]
NEW_TOKEN = ROOT / "softhsm" / "new-token"
WITH_TOKEN = ROOT / "softhsm" / "with-token"


def new_token(folder: Path, *options: str, path: str | None = None) -> dict[str, str]:
    """Run the script and read its exports the way a shell does."""
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, str(NEW_TOKEN), str(folder), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=40,
        env=environment,
    )
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(word[0] == "export" and len(word) == 2 for word in words)
    return dict(word[1].split("=", 1) for word in words)


def pin_file_of(exports: dict[str, str]) -> Path:
    (source,) = parse_qs(exports["D1_SIGNER_KEY"].partition("?")[2])["pin-source"]
    return Path(source.removeprefix("file:"))


def pkcs11_tool(exports: dict[str, str], *arguments: str) -> str:
    pin = pin_file_of(exports).read_text(encoding="utf-8")
    done = subprocess.run(
        ["pkcs11-tool", "--module", exports["SOFTHSM2_MODULE"], *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "SOFTHSM2_CONF": exports["SOFTHSM2_CONF"], "TOKEN_PIN": pin},
    )
    return done.stdout


@pytest.mark.parametrize("name", ["plain", "with a blank", "it's; $HOME & é"])
def test_token_takes_the_pin_and_makes_a_key(tmp_path: Path, name: str) -> None:
    exports = new_token(tmp_path / name, "--label", "fjord 1", "--object", "bank 2026")
    assert exports["D1_SIGNER_KEY"].startswith("pkcs11:token=fjord%201;object=bank%202026?")
    login = ["--token-label", "fjord 1", "--login", "--pin", "env:TOKEN_PIN"]
    pkcs11_tool(
        exports, *login, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "bank 2026"
    )
    assert "Private Key Object; EC" in pkcs11_tool(exports, *login, "--list-objects")


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "token"
    exports = new_token(folder)
    assert pin_file_of(exports) == folder / "pin"
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_pin_is_not_on_a_command_line_nor_in_the_output(tmp_path: Path) -> None:
    real = shutil.which("softhsm2-util")
    assert real
    shim = tmp_path / "bin" / "softhsm2-util"
    shim.parent.mkdir()
    arguments = tmp_path / "arguments"
    shim.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >{shlex.quote(str(arguments))}\nexec {real} "$@"\n',
        encoding="utf-8",
    )
    shim.chmod(0o700)
    exports = new_token(tmp_path / "token", path=f"{shim.parent}:{os.environ['PATH']}")
    assert arguments.read_text(encoding="utf-8").split() == [
        "--init-token",
        "--free",
        "--label",
        "d1-throw-away",
    ]
    pin = pin_file_of(exports).read_text(encoding="utf-8")
    assert len(pin) == 32
    assert not any(pin in value for value in exports.values())


def test_two_tokens_have_two_pins(tmp_path: Path) -> None:
    first, second = (pin_file_of(new_token(tmp_path / name)).read_bytes() for name in "ab")
    assert first != second


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "token"
    new_token(folder)
    before = (folder / "pin").read_bytes()
    again = subprocess.run(
        [sys.executable, str(NEW_TOKEN), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert again.returncode == 1
    assert "is not empty" in again.stderr
    assert again.stdout == ""
    assert (folder / "pin").read_bytes() == before


def test_a_label_that_softhsm_refuses_is_reported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(NEW_TOKEN), str(tmp_path / "token"), "--label", "x" * 33],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "softhsm2-util failed" in done.stderr
    assert not re.search("[0-9a-f]{32}", done.stderr)  # a PIN
    assert [*tmp_path.iterdir()] == []


def test_with_token_passes_the_environment_and_the_status_and_cleans_up(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    script = f'printf "%s\\n%s" "$SOFTHSM2_CONF" "$D1_SIGNER_KEY" >{shlex.quote(str(seen))}; exit 7'
    done = subprocess.run(
        [str(WITH_TOKEN), "sh", "-c", script],
        check=False,
        timeout=40,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 7
    configuration, key = seen.read_text(encoding="utf-8").splitlines()
    assert unquote(key).startswith("pkcs11:token=d1-throw-away;object=d1-key?")
    assert configuration.startswith(str(tmp_path))
    assert not Path(configuration).exists()
    assert list(tmp_path.iterdir()) == [seen]


def test_with_token_cleans_up_after_a_signal(tmp_path: Path) -> None:
    with subprocess.Popen(
        [str(WITH_TOKEN), "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"ready\n"
        assert list(tmp_path.iterdir())
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert list(tmp_path.iterdir()) == []

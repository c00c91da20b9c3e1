# SPDX-License-Identifier: Apache-2.0
"""Every command that writes a file, on a disk that is full: status 1, and nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from d1_signer import generate_key
from d1_signer.sandbox import softhsm
from tests.cli.conftest import COMMAND, Run

FULL = os.strerror(errno.ENOSPC)


def told_late(_: int) -> None:
    """As `os.fsync` on a file server, which takes all that is written, and then has no room."""
    raise OSError(errno.ENOSPC, FULL)


@pytest.mark.parametrize("json", [False, True], ids=["text", "json"])
def test_a_key_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, json: bool
) -> None:
    path = tmp_path / "key.pem"
    monkeypatch.setattr(os, "fsync", told_late)
    result = run("generate-key", "--key", path.as_uri(), *(["--json"] if json else []))
    assert result.status == 1
    assert [*tmp_path.iterdir()] == []
    if json:
        told = result.document
        assert (told["code"], told["retryable"]) == ("signer_unavailable", True)
        assert told["message"] == f"The key file cannot be written: {path}: {FULL}."
        assert f"Make room on the file system of {tmp_path}" in told["hint"]
    else:
        assert result.out == ""
        assert "Make room" in result.err
    monkeypatch.undo()
    assert run("generate-key", "--key", path.as_uri()).status == 0


def test_output_that_is_closed_is_not_taken_for_written(tmp_path: Path) -> None:
    def closed(*arguments: str) -> tuple[int, str]:
        script = 'exec "$@" >&-'
        ran = subprocess.run(
            ["sh", "-c", script, "sh", *COMMAND, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.returncode, ran.stderr

    uri = (tmp_path / "key.pem").as_uri()
    status, told = closed("generate-key", "--key", uri)
    assert status == 1
    assert f"The key was made all the same: {uri}" in told
    assert os.strerror(errno.EBADF) in told
    assert closed("public-key", "--key", uri, "--json")[0] == 1
    for asked in (["--help"], ["--version"], ["csr", "-h"], ["audit", "show", "--help"]):
        status, told = closed(*asked)
        assert status == 1, asked
        assert os.strerror(errno.EBADF) in told
    status, told = closed()
    assert status == 2
    assert "Start with: d1-signer demo" in told
    file = tmp_path / "out"
    assert closed("public-key", "--key", uri, "-o", str(file))[0] == 0
    assert file.read_bytes()


def test_a_key_file_in_a_folder_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = run("generate-key", "--json", "--key", (tmp_path / "no" / "key.pem").as_uri())
    assert (result.status, result.document["code"]) == (2, "secret_source")
    assert "Check that its folder is there" in result.document["hint"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_folder_for_a_token(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    folder = tmp_path / "hsm"
    if there:
        folder.mkdir()
    write = softhsm._write_private

    def full(path: Path, text: str) -> None:
        write(path, text[:10])
        if path.name == "pin":
            raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(softhsm, "_write_private", full)
    result = run("softhsm", "--folder", str(folder))
    assert (result.status, result.out) == (1, "")
    assert f"{folder} cannot hold a token: {FULL}." in result.err
    assert f"Make room on the file system of {tmp_path}." in result.err
    assert folder.exists() == there
    monkeypatch.undo()
    assert run("softhsm", "--folder", str(folder)).status == 0  # it is new, or empty, still


def test_a_folder_in_which_softhsm_makes_no_token_is_left_empty(run: Run, tmp_path: Path) -> None:
    result = run("softhsm", "--folder", str(tmp_path / "hsm"), "--label", "long" * 9)
    assert result.status == 2
    assert "softhsm2-util failed" in result.err
    assert [*tmp_path.iterdir()] == []


def _can_mount() -> bool:
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and (
        subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


_ON_A_FULL_DISK = """
set -e
mount -t tmpfs -o size=64k tmpfs "$1"
cd "$1"
cat /dev/zero > filler 2> /dev/null || true
shift
status=0
"$@" || status=$?
ls -A
exit $status
"""
_WRITE = [
    ("generate-key", "--key", "DISK/new.pem"),
    ("public-key", "--key", "KEY", "--format", "jwks", "-o", "out"),
    ("csr", "--key", "KEY", "--subject", "CN=bank", "-o", "out"),
    ("custody", "--key", "KEY", "--bundle", "out"),
    ("custody", "--key", "KEY", "--html", "out"),
    ("softhsm", "--folder", "hsm"),
]


def _run_on_a_full_disk(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    disk, key = tmp_path / "disk", (tmp_path / "key.pem").as_uri()
    disk.mkdir()
    generate_key(key)
    words = [word.replace("DISK", disk.as_uri()).replace("KEY", key) for word in arguments]
    inside = ["sh", "-c", _ON_A_FULL_DISK, "sh", str(disk), *COMMAND, *words]
    done = subprocess.run(
        ["unshare", "-rm", *inside], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "filler\n"), done.stderr
    assert f"{FULL}." in done.stderr
    assert f"Make room on the file system of {disk}" in done.stderr
    assert "defect" not in done.stderr


if _can_mount():  # elsewhere, what the tests above make of the system's error stands for it

    @pytest.mark.parametrize("arguments", _WRITE, ids=" ".join)
    def test_a_disk_that_is_full_indeed(tmp_path: Path, arguments: tuple[str, ...]) -> None:
        _run_on_a_full_disk(tmp_path, arguments)

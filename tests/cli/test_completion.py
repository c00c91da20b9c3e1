# SPDX-License-Identifier: Apache-2.0
"""Completion, as the shell asks for it and as a person sees it in bash."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d1_signer.signing.registry import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
(IN_BASHRC,) = re.findall(r"`(.*)` in `~/.bashrc`", PAGE)
PROGRAM = Path(sys.executable).with_name("d1-signer")


def completions(words: str) -> list[str]:
    """What the command answers; the last word is completed."""
    done = subprocess.run(
        [PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            **os.environ,
            "_D1_SIGNER_COMPLETE": "bash_complete",
            "COMP_WORDS": f"d1-signer {words}",
            "COMP_CWORD": str(1 + words.count(" ")),
        },
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "words",
    [
        "check --client-cert /p",
        "check --client-key /p",
        "token --ca-file /p",
        "public-key -o /p",
        "custody --bundle /p",
        "custody --client-key /p",
        "custody verify /p",
        "custody verify --anchors /p",
        "custody diff one /p",
        "audit verify /p",
        "audit verify --since /p",
        "audit stamp --ca-file /p",
        "audit reconcile --openbao /p",
        "sandbox -- /p",
        "softhsm -- make /p",
    ],
)
def test_files_are_completed_by_the_shell(words: str) -> None:
    assert completions(words) == ["file,/p"]


@pytest.mark.parametrize("words", ["check --audit-trail /p", "audit seal --audit-trail /p"])
def test_folders_are_completed_by_the_shell(words: str) -> None:
    assert completions(words) == ["dir,/p"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("soft", ["plain,softhsm"]),
        ("audit ve", ["plain,verify"]),
        ("custody ver", ["plain,verify"]),
        ("sandbox --fault html", ["plain,html-400"]),
        ("softhsm --fol", ["plain,--folder"]),
    ],
)
def test_names_are_completed(words: str, expected: list[str]) -> None:
    assert completions(words) == expected


def in_parts(line: str) -> str:
    """As bash has the words of a line: broken at colons and equals signs, each on a line."""
    return "\n".join(re.findall(r"[:=]+|[^\s:=]+", line))


def completed_in_bash(line: str) -> list[str]:
    words = in_parts(f"d1-signer {line}")
    environment = {
        **os.environ,
        "_D1_SIGNER_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count("\n") + line.endswith(" ")),
    }
    done = subprocess.run(
        [PROGRAM], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.stderr == ""
    return [found.removeprefix("plain,") for found in done.stdout.split()]


def test_key_uris_begin_with_all_schemes() -> None:
    found = completed_in_bash("check --key ")
    assert {uri.partition(":")[0] for uri in found} == {*BUILT_IN}
    for option in ("check --audit-key ", "csr --key ", "audit seal --audit-key ", "check --key="):
        assert completed_in_bash(option) == found
    assert completed_in_bash("check --key p") == ["pkcs11:"]
    assert completed_in_bash("check --key file") == ["file:///"]


@pytest.mark.parametrize("option", ["check --key ", "check --key=", "check --kid a:b=c --key "])
def test_files_of_key_uris(tmp_path: Path, option: str) -> None:
    (tmp_path / "key one.pem").touch()
    (tmp_path / "key-two").mkdir()
    (tmp_path / ".key-three.pem").touch()
    folder = f"//{tmp_path}/"
    # Bash has kept what stands in front of the last colon.
    assert completed_in_bash(f"{option}file:") == ["///"]
    found = [f"{folder}key%20one.pem", f"{folder}key-two/"]
    assert completed_in_bash(f"{option}file:{folder}") == found
    assert completed_in_bash(f"{option}file:{folder}key%20") == found[:1]
    assert completed_in_bash(f"{option}file:{folder}.k") == [f"{folder}.key-three.pem"]
    assert completed_in_bash(f"{option}file:{folder}nowhere/") == []
    assert completed_in_bash(f"{option}pkcs11:token") == []
    # Other shells have the whole word.
    zsh = {"_D1_SIGNER_COMPLETE": "zsh_complete", "COMP_CWORD": "3"}
    words = {"COMP_WORDS": f"d1-signer check --key file:{folder}key%20"}
    told = subprocess.check_output([PROGRAM], text=True, env={**os.environ, **zsh, **words})
    assert told.splitlines()[:2] == ["plain", f"file:{found[0]}"]


def test_in_bash(tmp_path: Path) -> None:
    """The line of docs/cli.md, and a person who types the beginning of a path and a tab."""
    (tmp_path / "certificate-of-the-bank.pem").touch()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "signing-key.pem").touch()
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "PS1": "> "},
        start_new_session=True,
    ) as shell:
        os.close(theirs)
        shown = ""

        def wait_for(text: str) -> None:
            nonlocal shown
            deadline = time.monotonic() + 60
            while text not in shown:
                assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], (
                    shown
                )
                shown += os.read(ours, 4096).decode()

        os.write(ours, f'{IN_BASHRC}; echo rea""dy\n'.encode())
        wait_for("ready")
        os.write(ours, b"d1-signer check --client-cert certi\t")
        wait_for("certificate-of-the-bank.pem")
        os.write(ours, b"\x15d1-signer softh\t")
        wait_for("softhsm")
        # Each is gone on with, without a blank between them.
        os.write(ours, b"\x15d1-signer check --key fil\t")
        wait_for("file:///")
        os.write(ours, f"{str(tmp_path)[1:]}/ke\t".encode())
        wait_for("/keys/")
        os.write(ours, b"sig\t")
        wait_for("/keys/signing-key.pem ")
        os.write(ours, b"\x15d1-signer check --key=pk\t")
        wait_for("--key=pkcs11:")
        os.write(ours, b"\x15exit\n")
        shell.wait(timeout=60)
    os.close(ours)

# SPDX-License-Identifier: Apache-2.0
"""The ways to try it without D1, as docs/cli.md shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cli.md").read_text()
SECTION = PAGE.partition("## Try it without D1")[2].partition("## ")[0]
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
WHOLE, TOKEN, FAULTS = BLOCKS


def ran(script: str, tmp_path: Path) -> str:
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_check_in_softhsm_and_the_sandbox(tmp_path: Path) -> None:
    told = ran(WHOLE, tmp_path)
    assert "  ok       login " in told
    assert told.endswith("\nAll steps passed.\n")


def test_a_first_token(tmp_path: Path) -> None:
    assert "Bearer" in ran(TOKEN, tmp_path)


@pytest.mark.parametrize("line", FAULTS.splitlines())
def test_trouble_for_a_client(line: str, tmp_path: Path) -> None:
    told = ran(f"{line} -- d1-signer token --json", tmp_path)
    assert '"token_type": "Bearer"' in told

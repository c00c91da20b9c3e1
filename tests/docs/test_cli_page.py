# SPDX-License-Identifier: Apache-2.0
"""The walk through the command line without D1, as docs/cli.md shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_walk_without_d1_works_as_typed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    section = page.partition("## Try it without D1")[2]
    (walk,) = re.findall(
        r"^```sh\n(d1-signer generate-key\n.*?)^```$", section, re.DOTALL | re.MULTILINE
    )
    ran = subprocess.run(
        [str(ROOT / "softhsm" / "with-token"), "bash", "-eumc", walk],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "failed" not in ran.stdout
    assert "access-token" in ran.stdout

# SPDX-License-Identifier: Apache-2.0
"""`make audit` finds what an advisory is about, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "demo.txt"


def locked(name: str) -> str:
    for line in LOCK.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.removeprefix(f"{name}==").split()[0]
    raise AssertionError(name)


def audit(folder: Path, *advisories: dict[str, object]) -> subprocess.CompletedProcess[str]:
    for number, advisory in enumerate(advisories):
        (folder / f"{number}.json").write_text(json.dumps(advisory))
    command = [sys.executable, "scripts/audit", "--advisories", str(folder), str(LOCK)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=55
    )


def advisory(name: str, **about: object) -> dict[str, object]:
    package = {"name": name, "ecosystem": "PyPI"}
    return {
        "id": f"PYSEC-0-{name}",
        "schema_version": "1.6.0",
        "affected": [{"package": package} | about],
    }


@pytest.mark.parametrize("form", ["versions", "range", "last"])
def test_an_advisory_about_a_locked_release_is_found(tmp_path: Path, form: str) -> None:
    version = locked("urllib3")
    events: list[dict[str, str]] = [{"introduced": "0"}]
    events += [{"last_affected": version}] if form == "last" else [{"fixed": f"{version}.1"}]
    ranges = [{"type": "ECOSYSTEM", "events": events}]
    about: dict[str, object] = {"versions": [version]} if form == "versions" else {"ranges": ranges}
    ran = audit(tmp_path, advisory("urllib3", **about))
    assert ran.returncode == 1
    assert "PYSEC-0-urllib3" in ran.stdout


def test_what_is_mended_or_about_others_is_not_found(tmp_path: Path) -> None:
    fixed: list[dict[str, str]] = [{"introduced": "0"}, {"fixed": locked("requests")}]
    ran = audit(
        tmp_path,
        advisory("requests", ranges=[{"type": "ECOSYSTEM", "events": fixed}]),
        advisory("not-locked", versions=["1.0"]),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No known vulnerabilities found" in ran.stderr


def test_no_advisories_are_no_clean_bill(tmp_path: Path) -> None:
    ran = audit(tmp_path)
    assert ran.returncode == 1
    assert "No advisory" in ran.stderr

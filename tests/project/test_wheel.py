# SPDX-License-Identifier: Apache-2.0
"""The wheel that users get: built, looked into, and imported from."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_holds_the_package_its_types_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(information).decode())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in package} == {"d1_signer"}
    assert "d1_signer/py.typed" in names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "d1_signer").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == tracked


def test_source_distribution_holds_what_make_needs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=50)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    recipes = re.findall(r"[\w.-]+/[\w./-]+", (ROOT / "Makefile").read_text())
    needed = {name for name in recipes if (ROOT / name).is_file() and not name.startswith(".venv")}
    assert {"scripts/system-packages", "requirements/dev.txt"} <= needed
    others = {"Makefile", "LICENSE", ".ci/run", "softhsm/with-token", "tests/conftest.py"}
    assert needed | others <= names


def test_core_needs_three_libraries_and_what_they_bring(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        information = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(information).decode())
    required = metadata.get_all("Requires-Dist") or []
    core = sorted(line.partition(">")[0] for line in required if "extra ==" not in line)
    assert core == ["asn1crypto", "certifi", "cffi", "cryptography", "requests", "urllib3"]


def test_package_imports_from_the_wheel(wheel: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import d1_signer, d1_signer.es256\n"
        "print(d1_signer.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=wheel.parent,
    )
    assert done.stdout.startswith(str(wheel))

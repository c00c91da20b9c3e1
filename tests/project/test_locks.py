# SPDX-License-Identifier: Apache-2.0
"""The locks: complete, hashed, in agreement, and without an address of an index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(path.name for path in REQUIREMENTS.glob("*.txt"))
PIN = re.compile(r"^([a-z0-9.-]+)==([^ ;]+)(?: ; .+)?$")


def entries(lock: str) -> list[str]:
    """Return the logical lines of a lock, comments left out."""
    lines = (REQUIREMENTS / lock).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return text.replace("\\\n", " ").strip().splitlines()


def pins(lock: str) -> set[tuple[str, str]]:
    found = set()
    for entry in entries(lock):
        match = PIN.match(entry.partition(" --hash=")[0].strip())
        assert match, f"{lock}: not an exact version: {entry[:80]}"
        found.add((match[1], match[2]))
    return found


def declared() -> dict[str, list[Requirement]]:
    """Return the requirements of pyproject.toml by the lock that must satisfy them."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = document["project"], document["dependency-groups"]
    extras = project["optional-dependencies"]

    def read(texts: list[object]) -> list[Requirement]:
        return [Requirement(text) for text in texts if isinstance(text, str)]

    library = read(project["dependencies"])
    core = library + read(groups["build"])
    docs = read(groups["docs"])
    optional = [
        requirement
        for name in extras
        if name not in {"all", "test"}
        for requirement in read(extras[name])
    ]
    tools = [requirement for requirement in read(extras["test"]) if requirement.name == "pytest"]
    return {
        "demo.txt": core + [r for name in ("cli", "pkcs11", "sandbox") for r in read(extras[name])],
        "docs.txt": core + optional + tools + docs,
        "dev.txt": core + optional + tools + docs + read(groups["dev"]),
        "bench.txt": core + optional + tools + docs + read(groups["dev"]) + read(groups["bench"]),
        "bench-no-deps.txt": read(groups["bench-no-deps"]),
        "lock.txt": read(groups["lock"]),
        "lowest.txt": library + optional + read(groups["lowest"]),
    }


def test_every_lock_is_known() -> None:
    assert set(LOCKS) == set(declared())


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_address(lock: str) -> None:
    text = (REQUIREMENTS / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|index-url|find-links|trusted-host", text)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_has_a_sha256(lock: str) -> None:
    for entry in entries(lock):
        assert re.search(r" --hash=sha256:[0-9a-f]{64}\b", entry), entry[:80]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_satisfies_what_is_declared(lock: str) -> None:
    locked = {name: Version(version) for name, version in pins(lock)}
    for requirement in declared()[lock]:
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in {lock}: run `make lock`"
        assert requirement.specifier.contains(locked[name]), f"{requirement}: run `make lock`"


def test_the_lowest_releases_are_those_that_are_declared() -> None:
    locked = {name: Version(version) for name, version in pins("lowest.txt")}
    for requirement in declared()["lowest.txt"]:
        ((bound, lowest),) = ((s.operator, Version(s.version)) for s in requirement.specifier)
        assert bound == ">="
        # A bound names no more digits than the release that it means.
        release = locked[canonicalize_name(requirement.name)].release
        assert release[: len(lowest.release)] == lowest.release, requirement
        assert not any(release[len(lowest.release) :]), requirement


def test_locks_agree() -> None:
    assert pins("docs.txt") <= pins("dev.txt")
    assert pins("demo.txt") <= pins("dev.txt") <= pins("bench.txt")


def test_extra_all_holds_every_extra() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = document["project"]["optional-dependencies"]
    (everything,) = (Requirement(text) for text in extras["all"])
    assert everything.name == document["project"]["name"]
    assert everything.extras == set(extras) - {"all", "test"}


def test_locks_are_installed_from_wheels_with_their_hashes_only() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    matrix = (ROOT / "scripts" / "matrix").read_text(encoding="utf-8")
    assert re.search(
        r"^PIP_INSTALL := .*pip install .*--only-binary :all:$", makefile, re.MULTILINE
    )
    assert re.search(r"^ *local pip=\([^)]*--only-binary :all:\)$", matrix, re.MULTILINE)
    installing = re.findall(r"^\t.*(?:PIP_INSTALL|pip install).*$", makefile, re.MULTILINE)
    installing += re.findall(r".*\$\{pip\[@\]\}.*", matrix)
    assert len(installing) == 9
    for line in installing:
        itself = "--no-deps --no-build-isolation --editable" in line
        assert itself != ("--require-hashes" in line), line
    by_hand = [line for line in installing if "pip install" in line]
    assert all("--only-binary :all:" in line for line in by_hand)
    assert "--only-binary :all:" in (ROOT / "scripts" / "lock").read_text(encoding="utf-8")

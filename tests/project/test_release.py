# SPDX-License-Identifier: Apache-2.0
"""A release: made twice it is the same, complete, and verified by what docs/releases.md says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
EXTRAS = list(PROJECT["project"]["optional-dependencies"])
_INCLUDED = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
HOME = "https://git.bank.example/d1_signer"
AT_HOME = f"--repository {HOME}"
_AT = "2026-11-27T12:00:00Z"


def shell(command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def committed(folder: Path) -> Path:
    """The tree as it is now, as a commit that is the same wherever it is made."""
    for pattern in [*_INCLUDED, "/pyproject.toml", "/.gitignore"]:
        for path in ROOT.glob(pattern.removeprefix("/")):
            ignored = shutil.ignore_patterns("__pycache__")
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=ignored, symlinks=True)
            else:
                shutil.copy(path, folder / path.name)
    made = shell(
        "git init -q && git add -A && git -c user.name=x -c user.email=x@y commit -qm x",
        folder,
        GIT_AUTHOR_DATE=_AT,
        GIT_COMMITTER_DATE=_AT,
        GIT_CONFIG_GLOBAL="/dev/null",
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two keys of ssh-keygen, and the file that says whose the first one is."""
    folder = tmp_path_factory.mktemp("keys")
    make = "ssh-keygen -q -t ed25519 -N '' -C x -f"
    allowed = 'echo "d1-signer namespaces=\\"d1-signer-release\\" $(cat mine.pub)" >allowed_signers'
    made = shell(f"{make} mine && {make} other && {allowed}", folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    source = committed(tmp_path_factory.mktemp("first"))
    made = shell(
        f"umask 022; {sys.executable} scripts/release dist --key {keys / 'mine'} {AT_HOME}",
        source,
        TZ="UTC",
        LC_ALL="C",
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return source / "dist"


def test_made_twice_it_is_the_same(release: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = committed(tmp_path_factory.mktemp("second") / "deeper in another folder")
    (source / "d1_signer" / "left_over.py").write_text("not committed")
    # What only this copy says of itself.
    (source / "build.py").write_text("raise SystemExit('not what builds')")
    (source / ".git/info").mkdir(exist_ok=True)
    (source / ".git/info/attributes").write_text("d1_signer/frames.py export-ignore")
    other = "$(git -c user.name=x -c user.email=x@y commit-tree -m other HEAD:d1_signer)"
    configured = shell(f"git config core.autocrlf true && git replace HEAD {other}", source)
    assert configured.returncode == 0, configured.stderr
    made = shell(
        f"umask 077; {sys.executable} scripts/release '../the release' {AT_HOME}",
        source,
        TZ="Asia/Kathmandu",
        LC_ALL="C.UTF-8",
        PYTHONHASHSEED="7",
        SOURCE_DATE_EPOCH="7",
        D1_SIGNER_REPOSITORY="https://elsewhere.example",
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "Not signed" in made.stderr
    names = {path.name for path in release.iterdir()} - {"SHA256SUMS.sig"}
    again = source.parent / "the release"
    assert {path.name for path in again.iterdir()} == names
    for name in sorted(names):
        assert (again / name).read_bytes() == (release / name).read_bytes(), name


def test_it_is_complete(release: Path) -> None:
    bills = [f"d1_signer-{VERSION}{suffix}.cdx.json" for suffix in ["", *(f"-{e}" for e in EXTRAS)]]
    wheel, sdist = f"d1_signer-{VERSION}-py3-none-any.whl", f"d1_signer-{VERSION}.tar.gz"
    summed = {wheel, sdist, f"d1_signer-{VERSION}.intoto.json", *bills}
    assert {path.name for path in release.iterdir()} == summed | {"SHA256SUMS", "SHA256SUMS.sig"}
    lines = [line.split("  ") for line in (release / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == summed
    for told, name in lines:
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == told


def documented(kind: str) -> str:
    """The commands of docs/releases.md."""
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- {kind} -->\n+```sh\n(.*?)```", page, re.DOTALL)
    return str(found)


def verified(release: Path, keys: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    if not folder.exists():
        shutil.copytree(release, folder)
    shutil.copy(keys / "allowed_signers", folder)
    return shell(documented("verify"), folder)


def test_verified_as_the_documents_say(release: Path, keys: Path, tmp_path: Path) -> None:
    done = verified(release, keys, tmp_path / "got")
    assert done.returncode == 0, done.stderr
    assert 'Good "d1-signer-release" signature for d1-signer' in done.stdout


@pytest.mark.parametrize("what", ["wheel", "bill", "sums", "signer", "namespace", "no signature"])
def test_what_was_altered_is_not(release: Path, keys: Path, tmp_path: Path, what: str) -> None:
    got = tmp_path / "got"
    shutil.copytree(release, got)
    altered = {"wheel": "*.whl", "bill": "*-aws.cdx.json", "sums": "SHA256SUMS"}
    if what in altered:
        (path,) = got.glob(altered[what])
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        (got / "SHA256SUMS.sig").unlink()
    if what in {"signer", "namespace"}:
        key = keys / ("other" if what == "signer" else "mine")
        space = "d1-signer-release" if what == "signer" else "git"
        made = shell(f"ssh-keygen -Y sign -q -f {key} -n {space} SHA256SUMS", got)
        assert made.returncode == 0, made.stderr
    assert verified(release, keys, got).returncode != 0


def bills(release: Path) -> dict[str, dict[str, Any]]:
    return {
        extra: json.loads((release / f"d1_signer-{VERSION}{suffix}.cdx.json").read_bytes())
        for extra, suffix in [("", ""), *((extra, f"-{extra}") for extra in EXTRAS)]
    }


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_bill_of_materials(release: Path, extra: str) -> None:
    bill = bills(release)[extra]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    lock = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    components = {one["name"]: one for one in bill["components"]}
    for name, one in components.items():
        (entry,) = re.findall(rf"(?m)^{re.escape(name)}==.*(?:\n    --hash.*)+", lock)
        assert entry.startswith(f"{name}=={one['version']} ")
        hashes = {told["content"] for told in one["externalReferences"][0]["hashes"]}
        assert hashes == set(re.findall(r"sha256:(\w+)", entry))
    needs = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    root = bill["metadata"]["component"]["purl"]
    assert needs.keys() == {root, *(one["purl"] for one in bill["components"])}
    reached, todo = set(), [root]
    while todo:
        ref = todo.pop()
        if ref not in reached:
            reached.add(ref)
            todo += needs[ref]
    assert reached == needs.keys()


def test_bills_hold_what_the_wheel_requires(release: Path) -> None:
    (wheel,) = release.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    names = {
        extra: {one["name"] for one in bill["components"]} for extra, bill in bills(release).items()
    }
    for extra, found in names.items():
        direct = {
            canonicalize_name(one.name)
            for one in required
            if one.marker is None or one.marker.evaluate({"extra": extra})
        } - {"d1-signer"}
        assert direct <= found, extra
        assert names[""] <= found, extra
        # No service needs what its tests need.
        assert extra == "test" or found <= names["all"], extra
    assert names["vault"] == names[""]
    assert "botocore" in names["aws"]
    assert "grpcio" in names["gcp"]
    assert names["sandbox"] <= names["test"]
    assert not {"botocore", "grpcio", "pytest"} & names["pkcs11"]


def test_a_validator_would_refuse() -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str('{"bomFormat": "CycloneDX", "specVersion": "1.6", "x": 1}')


def test_provenance(release: Path) -> None:
    statement = json.loads((release / f"d1_signer-{VERSION}.intoto.json").read_bytes())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    told = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert f"d1_signer-{VERSION}-py3-none-any.whl" in told
    for name, value in told.items():
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == value
    definition = statement["predicate"]["buildDefinition"]
    head = shell("git rev-parse HEAD", release).stdout.strip()
    source = definition["externalParameters"]["source"]
    assert source == {"uri": f"git+{HOME}", "digest": {"gitCommit": head}}
    lock = definition["resolvedDependencies"][1]
    content = (ROOT / "requirements" / "dev.txt").read_bytes()
    assert lock["digest"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert statement["predicate"]["runDetails"]["builder"]["id"].startswith("urn:")


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_package_index_shows_links_that_lead_to_the_releases_files(
    release: Path, kind: str
) -> None:
    metadata = metadata_of(next(release.glob(kind)))
    files = f"{HOME}/blob/v{VERSION}/"
    links = links_of(metadata)
    here = {link.removeprefix(files) for link in links if link.startswith(files)}
    assert {"SECURITY.md", "docs/pkcs11", "docs/cloud/aws.md"} <= here
    assert all((ROOT / link.partition("#")[0]).exists() for link in here)
    assert all(link.startswith("https://") for link in links)
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert urls["Source"] == HOME
    for name in ("Documentation", "Changelog", "Security"):
        assert (ROOT / urls[name].removeprefix(files)).exists()


def test_no_link_leads_nowhere_where_nobody_says_where_the_code_is(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert all(link.startswith("https://") for link in links_of(metadata))
    assert "[Onboarding" not in str(metadata.get_payload())
    assert "Onboarding · Runbook · Tokens" in str(metadata.get_payload())
    (line,) = metadata.get_all("Project-URL", [])
    assert line == "D1 API by Thales, https://docs.payments.thalescloud.io"


def metadata_of(distribution: Path) -> Message:
    """What an index reads of it."""
    if distribution.suffix == ".whl":
        with zipfile.ZipFile(distribution) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            return Parser().parsestr(archive.read(name).decode())
    with tarfile.open(distribution) as archive:
        (name,) = (n for n in archive.getnames() if n.count("/") == 1 and n.endswith("/PKG-INFO"))
        content = archive.extractfile(name)
        assert content is not None
        return Parser().parsestr(content.read().decode())


def links_of(metadata: Message) -> set[str]:
    """Where the links of the page lead, as a reader of Markdown has it."""
    page = MarkdownIt("commonmark").enable("table").render(str(metadata.get_payload()))
    return set(re.findall(r'(?:href|src)="([^"]*)"', page))

# SPDX-License-Identifier: Apache-2.0
"""A backend of somebody else's: its distribution is built, installed, found and tried."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from d1_signer import errors
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from tests.conformance.interop import PrivateKeyInterop

EXAMPLE = Path(__file__).parents[1] / "plugin_example"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution installed, from a wheel as users get it."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, work / "source", ignore=shutil.ignore_patterns("__pycache__"))
    _run("-m", "hatchling", "build", "-t", "wheel", "-d", str(work / "dist"), cwd=work / "source")
    (wheel,) = (work / "dist").glob("*.whl")
    site = work / "site"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    _run("-m", "pip", "install", *options, "--target", str(site), str(wheel), cwd=work)
    return site


def _run(*arguments: str, cwd: Path) -> None:
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "d1_signer_openssl", raising=False)
    return site


class TestPlugin(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def signer(self, installed: Path, tmp_path: Path) -> Signer:
        assert installed.exists()
        uri = f"openssl://{tmp_path}/key.pem"
        assert generate_key(uri).uri == uri
        return open_signer(uri)


def test_plugin_is_found_by_its_entry_point_alone(installed: Path, tmp_path: Path) -> None:
    (point,) = entry_points(group="d1_signer.backends", name="openssl")
    assert Path(str(point.load().__file__)).is_relative_to(installed)
    uri = f"openssl://{tmp_path}/key.pem"
    generate_key(uri)
    with pytest.raises(errors.KeyExistsError):
        generate_key(uri)
    with open_signer(f"{uri}#bank-2026") as signer:
        assert signer.kid == "bank-2026"
    with pytest.raises(errors.ConfigurationError, match="passphrase"):
        open_signer(uri, passphrase="x")


def test_without_the_plugin_the_known_schemes_are_listed() -> None:
    with pytest.raises(errors.KeyUriError) as refused:
        open_signer("openssl:///key.pem")
    for scheme in ("awskms:", "file:", "gcpkms:", "hashivault:", "pkcs11:"):
        assert scheme in refused.value.hint
    assert "openssl:" not in refused.value.hint


@pytest.mark.usefixtures("installed")
def test_the_plugins_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(errors.KeyNotFoundError):
        open_signer(f"openssl://{tmp_path}/missing.pem")
    file = tmp_path / "no-key.pem"
    file.write_text("no key")
    with pytest.raises(errors.InvalidKeyError):
        open_signer(f"openssl://{file}")
    generate_key(f"openssl://{tmp_path}/key.pem")
    with open_signer(f"openssl://{tmp_path}/key.pem") as signer:
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m", timeout=0.0)
        # The key under the signer is replaced: verification notices.
        (tmp_path / "key.pem").unlink()
        generate_key(f"openssl://{tmp_path}/key.pem")
        with pytest.raises(errors.InvalidSignatureError):
            signer.sign(b"m")


def test_two_plugins_for_one_scheme_are_refused(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "another-1.0.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (second / "entry_points.txt").write_text(
        "[d1_signer.backends]\nopenssl = another\nbroken = not_there\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed.exists()
    with pytest.raises(errors.ConfigurationError, match="More than one"):
        open_signer("openssl:///key.pem")
    with pytest.raises(errors.ConfigurationError, match="not_there"):
        open_signer("broken:///key.pem")


def test_the_example_uses_public_names_only() -> None:
    (source,) = (EXAMPLE / "src").rglob("__init__.py")
    imported = {
        node.module or ""
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    assert {name for name in imported if name.startswith("d1_signer")} == {"d1_signer"}

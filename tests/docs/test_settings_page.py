# SPDX-License-Identifier: Apache-2.0
"""docs/settings.md, run as it stands: its file, its Python and its commands, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d1_signer import TokenFetcher, generate_key, open_signer
from d1_signer.sandbox import Sandbox
from d1_signer.testing import make_softhsm_token
from tests.docs.reading import section
from tests.servers.redis_server import RedisServer
from tests.token.test_fetcher import until

pytestmark = pytest.mark.timeout(300)  # several processes, one after another

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
PASSWORD = "of-the-user-d1"


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(text)


def secret(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        with server.admin() as admin:
            admin.acl_setuser(
                "d1", enabled=True, passwords=f"+{PASSWORD}", keys="*", commands=["+@all"]
            )
        yield server


@pytest.fixture
def folder(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """What the page has in /etc/d1; the file differs in nothing but where things are here."""
    (tmp_path / "hsm").mkdir()
    token = make_softhsm_token(tmp_path / "hsm", label="bank")
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.configuration))
    secret(tmp_path / "pin", token.pin)
    secret(tmp_path / "redis-password", PASSWORD)
    secret(tmp_path / "store-key", os.urandom(32).hex())
    with Sandbox(issuer_id="my-issuer") as d1:
        for year in ("2027", "2026"):
            uri = token.key_uri(f"d1-{year}")
            generate_key(uri)
            with open_signer(uri) as signer:
                d1.register_key(f"bank-{year}", signer.public_key.jwk())
        secret(tmp_path / "client.pem", Path(d1.client_certificate).read_text())
        secret(tmp_path / "client.key", Path(d1.client_key).read_text())
        text = block("toml")
        for old, new in {
            '"production"': f'"{d1.base_url}"\nca_file = "{d1.ca_file}"',
            "/usr/lib/softhsm/libsofthsm2.so": token.module_path,
            "rediss://redis.bank.example:6379/0": redis_server.url,
            "/etc/d1": str(tmp_path),
        }.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "production.toml").write_text(text)
        yield tmp_path


def test_the_service_reads_the_file_as_printed(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(block("python").replace("/etc/d1", str(folder)), names)  # noqa: S102 (the page's own)
    fetcher = names["fetcher"]
    assert isinstance(fetcher, TokenFetcher)
    with fetcher:
        until(lambda: shared(fetcher), seconds=60)
        status = fetcher.status()
    assert [member.kid for member in status.members] == ["bank-2027", "bank-2026"]
    assert status.settings is not None
    assert status.settings.keys_away == ()


def shared(fetcher: TokenFetcher) -> bool:
    """Whether a new token went to the store, which has half a second for it, whatever else runs."""
    fetcher.invalidate(fetcher.token())
    return bool(fetcher.token().value) and fetcher.status().store == "working"


def typed(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", script.replace("/etc/d1", str(folder))],
        env={name: text for name, text in os.environ.items() if not name.startswith("D1_")}
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def ran(folder: Path, script: str) -> str:
    """What is printed; a store that was too slow for a busy machine is asked again."""
    done = typed(folder, script)
    for _ in range(10):
        if "store_unavailable" in done.stderr:
            done = typed(folder, script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_read_the_file_as_printed(folder: Path) -> None:
    told = ran(folder, block("sh"))
    assert "All steps passed." in told
    assert "kid bank-2027" in told
    assert "Bearer" in told


def test_the_status_of_a_fleet_as_the_other_page_prints_it(folder: Path) -> None:
    page = section((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), "The status of a fleet")
    (screen,) = re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (wait,) = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    command, *printed = screen.removeprefix("$ ").splitlines()
    with TokenFetcher.from_settings(folder / "production.toml") as fetcher:
        until(
            lambda: shared(fetcher) and "bank-2027, bank-2026" in ran(folder, command), seconds=100
        )
        ran(folder, wait)
        told = ran(folder, command).splitlines()
        # A change that no process has: what is waited for is not there yet.
        file = folder / "production.toml"
        changed = file.read_text().replace("total = 20", "total = 21")
        assert changed != file.read_text()
        file.write_text(changed)
        assert "AS THE FILE" in ran(folder, f"! {command}")
    assert len(told) == len(printed)
    for line, shown in zip(told, printed, strict=True):
        assert columns(line)[0] == columns(shown)[0] or f":{os.getpid()}" in line
        assert len(columns(line)) == len(columns(shown)), line
    row = -3  # then comes what that means
    assert columns(told[row])[2] == columns(printed[row])[2] == "yes"


def columns(line: str) -> list[str]:
    return re.split(r" {2,}", line)

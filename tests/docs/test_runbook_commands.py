# SPDX-License-Identifier: Apache-2.0
"""Each command of the runbook, typed as it is printed where a service runs that is well."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from d1_signer import TokenFetcher, generate_key
from tests.docs.reading import ROOT
from tests.docs.test_settings_page import PASSWORD, folder, ran, redis_server, shared
from tests.token.test_fetcher import until

__all__ = ["folder", "redis_server"]  # fixtures

pytestmark = pytest.mark.timeout(300)  # several processes, one after another

PAGE = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
OURS = sorted(
    {*re.findall(r"`(d1-signer [^`]+)`", PAGE), *re.findall(r"^d1-signer .*$", PAGE, re.MULTILINE)}
)


class Host:
    """Where the service runs: its file of settings, and a trail with its verifier key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = {
            "D1_CONFIG": str(folder / "production.toml"),
            "D1_AUDIT_TRAIL": str(folder / "trail"),
            "D1_AUDIT_ORIGIN": "bank.example/d1",
            "D1_AUDIT_KEY": generate_key((folder / "seal.pem").as_uri()).uri,
        }
        self._exports = "".join(
            f"export {name}={shlex.quote(text)}\n" for name, text in settings.items()
        )
        with TokenFetcher.from_settings(folder / "production.toml") as fetcher:
            fetcher.token()
        self.type("d1-signer token")
        (folder / "vkey.txt").write_text(
            json.loads(self.type("d1-signer audit seal --json"))["verifier_key"] + "\n"
        )

    def type(self, line: str) -> str:
        script = re.sub(r"\bFILE\b", str(self.folder / "production.toml"), line)
        script = re.sub(r"\bFOLDER\b", str(self.folder / "trail"), script)
        return ran(self.folder, f"cd {shlex.quote(str(self.folder))}; {self._exports}{script}")


def test_each_of_ours_works_as_printed(folder: Path) -> None:
    host = Host(folder)
    with TokenFetcher.from_settings(folder / "production.toml") as fetcher:
        renewal: Any = fetcher._renewal
        members = renewal.announcer._register.members
        until(lambda: shared(fetcher) and bool(members(renewal._name)), seconds=100)
        told = {line: host.type(line) for line in OURS if "COMMAND" not in line}
    assert len(told) >= 10
    assert "bank-2027" in told["d1-signer assertion"]
    jwks = json.loads(told["d1-signer public-key --format jwks"])
    assert [key["kid"] for key in jwks["keys"]] == ["bank-2027", "bank-2026"]
    (verified,) = (text for line, text in told.items() if "audit verify" in line)
    assert "Whole: no findings." in verified
    for line, text in told.items():
        if line.startswith("d1-signer check"):
            assert "All steps passed." in text, line
            assert "valid until" in text, line


def test_those_of_the_system_work_as_printed(folder: Path) -> None:
    """But the look-up of Thales' name, which needs the network, and what needs a service."""
    host = Host(folder)
    for line in ("df -h FOLDER", "date -u"):
        assert f"`{line}`" in PAGE
        assert host.type(line)
    assert "`ls -lL`" in PAGE
    assert host.type("ls -lL pin").startswith("-rw-------")
    (ping,) = re.findall(r"`(redis-cli [^`]*)`", PAGE)
    text = (folder / "production.toml").read_text()
    (socket,) = re.findall(r'url = "unix://(.*)"', text)
    assert " -u rediss://HOST:6379 --user NAME --askpass " in ping
    here = ping.replace("-u rediss://HOST:6379", f"-s {socket}").replace("NAME", "d1")
    assert "PONG" in host.type(f"echo {PASSWORD} | {here}")

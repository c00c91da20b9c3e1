# SPDX-License-Identifier: Apache-2.0
"""docs/tls.md, run as it stands; only what Thales does stands in between."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer import TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.transport import handshake
from tests.token.conftest import fetcher, make_fetcher, pem_uri, sandbox, signer

__all__ = ["fetcher", "make_fetcher", "pem_uri", "sandbox", "signer"]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tls.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def marked(name: str) -> str:
    (block,) = re.findall(
        rf"<!-- {name} -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )
    return str(block)


BANK_URI = re.compile(r"'pkcs11:token=bank;object=([\w-]+)\?[^']*'")
SOFTHSM_URI = r'"${D1_SIGNER_KEY%%;*};object=\1?${D1_SIGNER_KEY#*\\?}"'
# What Thales does: it gets the request and the public key of assertions, and sends a certificate.
_TO_AND_FRO = """
d1-signer public-key --format jwk -o assertions.jwk
cp client.csr assertions.jwk to-thales/
until [ -s from-thales/client.pem ]; do sleep 0.05; done
cp from-thales/client.pem client.pem
"""


def test_the_whole_way_works_as_printed(tmp_path: Path) -> None:
    first, second = blocks("sh")
    assert first.count("D1_ENVIRONMENT=staging") == 1
    first = BANK_URI.sub(SOFTHSM_URI, first)
    (tmp_path / "to-thales").mkdir()
    (tmp_path / "from-thales").mkdir()
    (tmp_path / "example.py").write_text(marked("python"))
    script = f"{first}\n{_TO_AND_FRO}\n{second}\npython -W error example.py"
    with Sandbox(issuer_id="my-issuer") as d1:
        script = script.replace("D1_ENVIRONMENT=staging", f"D1_ENVIRONMENT={d1.base_url}")
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "D1_CA_FILE": str(d1.ca_file),
        }
        with subprocess.Popen(
            [sys.executable, "-m", "d1_signer", "softhsm", "--", "bash", "-euc", script],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            serve_as_thales(d1, tmp_path, process)
            told, _ = process.communicate(timeout=50)
        assert process.returncode == 0, told
        requests = [each for each in d1.requests if each.status == 200]
    assert told.splitlines()[-1] == "200"
    assert "access-token" in told
    assert len(requests) == 3


def serve_as_thales(d1: Sandbox, folder: Path, process: subprocess.Popen[str]) -> None:
    jwk = folder / "to-thales" / "assertions.jwk"
    request = folder / "to-thales" / "client.csr"
    while not (request.exists() and jwk.exists() and jwk.read_text().endswith("}\n")):
        if process.poll() is not None:
            return
    key = json.loads(jwk.read_text())
    d1.register_key("bank-2026", {name: key[name] for name in ("kty", "crv", "x", "y")})
    certificate = d1.sign_client_request(request.read_bytes())
    (folder / "from-thales" / "new").write_bytes(certificate.read_bytes())
    (folder / "from-thales" / "new").rename(folder / "from-thales" / "client.pem")


def test_the_releases_that_are_named_are_those_that_are_taken() -> None:
    named = re.search(r"CPython ((?:3\.\d+(?:, | and )?)+)", PAGE)
    assert named
    told = {(3, int(minor)) for minor in re.findall(r"3\.(\d+)", named[1])}
    assert told == handshake._RELEASES


@pytest.mark.parametrize("purpose", [handshake.PURPOSE])
def test_the_purpose_that_is_named_is_the_handshakes(purpose: str) -> None:
    assert f'Use("{purpose}", …)' in PAGE


def test_the_example_of_asyncio_runs(fetcher: TokenFetcher) -> None:
    names: dict[str, object] = {}
    exec(marked("asyncio"), names)  # noqa: S102 (the page's own)
    ping = names["ping"]
    assert callable(ping)
    with fetcher.session() as session:
        url = f"{fetcher.environment.banking_url}/ping"
        assert asyncio.run(ping(session, url)) == 200

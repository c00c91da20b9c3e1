# SPDX-License-Identifier: Apache-2.0
"""docs/onboarding.md, run as printed against the sandbox; only what Thales does stands between."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d1_signer import es256
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken
from tests.docs.reading import ROOT, rows, section

PAGE = (ROOT / "docs" / "onboarding.md").read_text(encoding="utf-8")
ISSUER = "my-issuer"
KID = "bank-staging-2026"
BANK_URI = re.compile(r"'pkcs11:token=bank;object=([\w-]+)\?[^']*'")
Shell = Callable[..., subprocess.CompletedProcess[str]]


def printed(name: str) -> str:
    (block,) = re.findall(rf"<!-- {name} -->\n```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(block)


@pytest.fixture
def d1() -> Iterator[Sandbox]:
    with Sandbox(ISSUER) as sandbox:
        yield sandbox


@pytest.fixture
def shell(softhsm_token: SoftHsmToken, d1: Sandbox, tmp_path: Path) -> Shell:
    """One shell for all blocks: each begins with the variables that the one before has left."""
    kept = tmp_path.parent / f"{tmp_path.name}.env"
    start = {name: value for name, value in os.environ.items() if not name.startswith("D1_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **softhsm_token.variables(),
        "D1_CA_FILE": str(d1.ca_file),
    }

    def run(block: str) -> subprocess.CompletedProcess[str]:
        block = BANK_URI.sub(lambda uri: f"'{softhsm_token.key_uri(uri[1])}'", block)
        assert block.count("D1_ENVIRONMENT=staging") in {0, 1}
        block = block.replace("D1_ENVIRONMENT=staging", f"D1_ENVIRONMENT={d1.base_url}")
        before = f". {kept}\n" if kept.exists() else ""
        return subprocess.run(
            ["bash", "-euc", f"{before}{block}\nexport -p >{kept}"],
            cwd=tmp_path,
            env=start,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )

    return run


def worked(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def sign(d1: Sandbox, request: Path, certificate: Path) -> None:
    certificate.write_bytes(d1.sign_client_request(request.read_bytes()).read_bytes())


@pytest.mark.timeout(240)  # a dozen processes, one after another
def test_the_whole_way_works_as_printed(shell: Shell, d1: Sandbox, tmp_path: Path) -> None:
    worked(shell(printed("softhsm")))
    sent = worked(shell(printed("send")))
    assert "the name that Thales prescribes" in sent
    assert len(re.findall(r"^[0-9a-f]{64}  \S+$", sent, re.MULTILINE)) == 2
    written = [each.read_text() for each in tmp_path.iterdir() if each.is_file()]
    assert "PRIVATE" not in "".join(written)

    key = es256.PublicKey.from_pem((tmp_path / "bank-staging-2026.pem").read_text())
    sign(d1, tmp_path / "client-staging.csr", tmp_path / "client-staging.pem")

    # Thales has not registered the key yet: the gate is closed, and names the step.
    early = shell(printed("prove"))
    assert early.returncode == 1
    assert "Failed: access-token" in early.stdout + early.stderr

    d1.register_key(KID, key.jwk())
    told = worked(shell(printed("prove")))
    assert "failed" not in told
    assert "skipped" not in told

    worked(shell(printed("renew")))
    sign(d1, tmp_path / "client-staging-2027.csr", tmp_path / "client-staging-2027.pem")
    told = worked(shell(printed("renewed")))
    assert "access-token" in told
    assert d1.counters.tokens_issued == 2


def test_the_keys_are_named_apart_whatever_the_object_was_called(shell: Shell) -> None:
    """Two names that come to one URI would be one key for both."""
    show = '\nprintf "%s\\n" "$D1_SIGNER_KEY" "$D1_CLIENT_KEY"'
    for called in ("d1-key", "d1", "anything"):
        begin = f'D1_SIGNER_KEY="${{D1_SIGNER_KEY/object=d1-key/object={called}}}"\n'
        here = worked(shell(f"({begin}{printed('softhsm')}{show})")).splitlines()
        assert [re.findall("object=([^?]*)", uri) for uri in here] == [
            ["d1-staging-2026"],
            ["tls-staging-2026"],
        ]
        assert worked(shell(f"({printed('keys')}{show})")).splitlines() == here


@pytest.mark.timeout(240)
def test_a_certificate_of_another_request_does_not_pass(
    shell: Shell, d1: Sandbox, tmp_path: Path
) -> None:
    worked(shell(printed("keys")))
    worked(shell(printed("send")))
    (tmp_path / "client-staging.pem").write_bytes(d1.client_certificate.read_bytes())
    refused = shell(printed("prove"))
    assert refused.returncode == 1
    assert "client-certificate" in refused.stdout.partition("failed")[2]


def test_the_steps_that_are_explained_are_those_that_are_required() -> None:
    explained = [
        row[0].strip("`") for row in rows(section(PAGE, "What comes back, and the proof"), 3)
    ]
    assert explained == re.findall(r"--require ([a-z-]+)", printed("prove"))


def test_both_keys_have_other_names_in_each_environment() -> None:
    named = set(re.findall(r"`((?:d1|tls)-(?:staging|production)-20\d\d)`", PAGE))
    assert named >= {"d1-production-2026", "tls-production-2026"}

# SPDX-License-Identifier: Apache-2.0
"""Snippets for a shell that no other test takes from their page, run as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from cryptography import x509

from d1_signer import AuditTrail, Use, generate_key
from d1_signer.attestation import read_anchors
from d1_signer.sandbox import Sandbox
from tests.audit.trails import ORIGIN, sealing_signer, verifier_key, watched_signer
from tests.docs.reading import ROOT, snippets
from tests.servers import aws, vault
from tests.servers.certificates import self_signed

BIN = Path(sys.executable).parent
# Installed already; a test has no network.
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PROLOGUE = "pip() { :; }\n"


@dataclass
class Shell:
    """A folder, and settings of a key that a sandbox knows."""

    folder: Path
    d1: Sandbox
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, block: str, status: int = 0) -> str:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", PROLOGUE + block],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    key = generate_key((tmp_path / "key.pem").as_uri())
    with Sandbox("my-issuer") as d1:
        d1.register_key("bank-2026", key.public_key.jwk())
        kept = {name: text for name, text in os.environ.items() if not name.startswith("D1_")}
        yield Shell(
            tmp_path,
            d1,
            kept
            | {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "D1_SIGNER_KEY": f"{key.uri}#bank-2026",
                "D1_ISSUER_ID": "my-issuer",
                "D1_ENVIRONMENT": d1.base_url,
                "D1_CLIENT_CERT": str(d1.client_certificate),
                "D1_CLIENT_KEY": str(d1.client_key),
                "D1_CA_FILE": str(d1.ca_file),
            },
        )


def as_it_is(shell: Shell, block: str) -> None:
    told = shell.run(block)
    assert "failed" not in told
    assert "ok" in told


def targets_of_make(shell: Shell, block: str) -> None:
    """What make would run: each of them takes minutes, and runs this test."""
    lines = block.splitlines()
    for line in lines:
        command, target = line.split()[:2]
        assert command == "make"
        would = shell.run(f"make --dry-run -C {ROOT} {target}")
        assert len(would.splitlines()) > 2
    assert len(lines) > 1


def curl(shell: Shell, block: str) -> None:
    shell.variables["URL"] = "https://d1.example/banking"
    words = shell.run(f"curl() {{ printf '%s\\n' \"$@\"; }}\n{block}").splitlines()
    assert words[:4:2] == ["--cert", "--key"]
    assert re.fullmatch(r"Authorization: Bearer \S+", words[5])
    assert words[6] == shell.variables["URL"]


def bundles(shell: Shell, block: str) -> None:
    shell.run("d1-signer custody --bundle newer.json --challenge later")
    told = shell.run(block)
    assert "holds" in told
    assert (shell.folder / "report.html").exists()


def screen_of_the_sandbox(shell: Shell, block: str) -> None:
    prompt, *printed = block.splitlines()
    command = prompt.removeprefix("$ ").split()
    variables = {name: text for name, text in shell.variables.items() if name != "D1_ISSUER_ID"}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        shown = [serving.stdout.readline().rstrip() for _ in printed]
        serving.terminate()
        serving.wait(timeout=50)

    def shape(line: str) -> str:
        return re.sub(r"127\.0\.0\.1:\d+|sandbox-\w+", "…", line)

    assert [shape(line) for line in shown] == [shape(line) for line in printed]


def screen_of_check(shell: Shell, block: str) -> None:
    """Another key's steps come first; from the signature on it is the screen of the page."""
    shell.d1.forget_key("bank-2026")
    command = block.splitlines()[0].removeprefix("$ ")

    def steps(text: str) -> list[tuple[str, ...]]:
        found = re.findall(r"^  (ok|failed|skipped) +([a-z-]+)", text, re.MULTILINE)
        return found[[name for _, name in found].index("key") :]

    shown = shell.run(command, status=1)
    assert steps(shown) == steps(block)
    assert "'invalid_grant'" in shown
    assert "correlation_id: " in shown


def client_key(shell: Shell, block: str) -> None:
    shell.run(block.replace("/etc/d1", str(shell.folder)))
    request = x509.load_pem_x509_csr((shell.folder / "client.csr").read_bytes())
    assert request.is_signature_valid


def on_aws(shell: Shell, block: str) -> None:
    (shell.folder / "aws").mkdir()
    with aws.aws_kms(shell.folder / "aws") as endpoint:
        shell.variables = {
            name: text for name, text in shell.variables.items() if not name.startswith("D1_")
        } | aws.ENVIRONMENT
        region = f"region={aws.REGION}"
        assert block.count(region) == 3
        block = block.replace(region, f"{region}&endpoint={endpoint.url}")
        assert "BEGIN PUBLIC KEY" in shell.run(block)


def on_vault(shell: Shell, block: str) -> None:
    """A server without the engine, which is enabled and then used as the page says."""
    use, enable = (
        each.text
        for each in snippets()
        if each.page == "docs/cloud/vault.md" and each.language == "sh"
    )
    assert block == use
    (shell.folder / "vault").mkdir()
    with vault.vault(shell.folder / "vault") as running:
        running.api("DELETE", "sys/mounts/transit")
        shell.variables = {
            name: text for name, text in shell.variables.items() if not name.startswith("D1_")
        } | {
            "VAULT_TOKEN": vault.ROOT_TOKEN,
            "VAULT_ADDR": running.tls_url,
            "VAULT_CACERT": str(running.ca_file),
            "HOME": str(shell.folder),
        }
        shell.run(enable)
        block = use.replace("https://vault.example.com:8200", running.tls_url)
        assert "BEGIN PUBLIC KEY" in shell.run(
            block.replace("/etc/d1/vault-ca.pem", str(running.ca_file))
        )


def policy(shell: Shell, block: str) -> None:
    """What it allows is all that signing needs, of this key alone."""
    (shell.folder / "vault").mkdir()
    with vault.vault(shell.folder / "vault") as running:
        running.make_key("d1")
        running.make_key("another")
        running.api("PUT", "sys/policies/acl/printed", policy=block)
        shell.variables = {
            name: text for name, text in shell.variables.items() if not name.startswith("D1_")
        } | {
            "VAULT_TOKEN": running.make_token("printed"),
            "VAULT_ADDR": running.tls_url,
            "VAULT_CACERT": str(running.ca_file),
            "HOME": str(shell.folder),
        }
        told = shell.run("d1-signer check --key hashivault://d1")
        assert re.search(r"^  ok +signature ", told, re.MULTILINE)
        told = shell.run("d1-signer check --key hashivault://another", status=1)
        assert "access_denied" in told


def on_a_trail(shell: Shell, block: str) -> None:
    place = shell.folder / "trail"
    use = Use(purpose="d1-assertion", references=(("jti", "5f0c"), ("trace_id", TRACE)))
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        with watched_signer(trail) as signer:
            signer.sign(b"x", use=use)
        trail.seal()
    key = str(verifier_key())
    (shell.folder / "vkey.txt").write_text(key + "\n")
    (shell.folder / "checkpoints-2026-11-27").touch()
    jq = "" if shutil.which("jq") else "jq() { cat; }\n"
    others = 'ssh() { shift; bash -c "$*"; }\n' + jq
    for old, new in {
        "/var/lib/d1/audit": str(place),
        "bank.example/d1+1b2c3d4e+Ajk…": key,
        "5f0c…": "5f0c",
    }.items():
        block = block.replace(old, new)
    told = shell.run(others + block)
    if TRACE in block:
        assert TRACE in told
    elif "--json" in block:
        assert len(re.findall(r'"?[0-9a-f]{64}', told)) >= 1
        assert (shell.folder / "trail.html").exists()
    else:
        assert "Whole: no findings." in told


def anchor(shell: Shell, block: str) -> None:
    certificate, _ = self_signed(shell.folder)
    Path(certificate).rename(shell.folder / "root.pem")
    digest = shell.run(block).split()[0]
    line = f"{digest} formats=tpm2 hardware=yes A root of the tests"
    (shell.folder / "anchors.txt").write_text(line + "\n")
    assert len(read_anchors((shell.folder / "anchors.txt").read_text())) == 1


def with_softhsm(shell: Shell, block: str) -> None:
    """In a folder that has the scripts, as the root of the repository does."""
    (shell.folder / "softhsm").symlink_to(ROOT / "softhsm")
    (shell.folder / "test_it.py").write_text("def test_it() -> None: ...\n")
    shell.variables = {
        name: text for name, text in shell.variables.items() if not name.startswith("D1_")
    }
    for folder in ("/tmp/mine", "/tmp/my-token"):  # noqa: S108 (the page's own)
        block = block.replace(folder, str(shell.folder / "made"))
    told = shell.run(block)
    assert "failed" not in told
    assert "pkcs11:" in told


def actions_of_github(shell: Shell, block: str) -> None:
    """Each step is a shell of its own, which hands variables on by a file."""
    (shell.folder / "softhsm").symlink_to(ROOT / "softhsm")
    (shell.folder / "test_it.py").write_text("def test_it() -> None: ...\n")
    handed_on = shell.folder / "github.env"
    handed_on.touch()
    shell.variables = {
        name: text for name, text in shell.variables.items() if not name.startswith("D1_")
    } | {"RUNNER_TEMP": str(shell.folder), "GITHUB_ENV": str(handed_on)}
    install, *steps = [step["run"] for step in yaml.safe_load(block)]
    assert "softhsm2" in install
    for step in steps:
        lines = handed_on.read_text().splitlines()
        shell.variables |= dict(line.split("=", 1) for line in lines)
        shell.run(step)


Way = Callable[[Shell, str], None]
# The beginning of a snippet's key, and how it is run.
RUN: dict[str, Way] = {
    "README.md: make demo": targets_of_make,
    "CONTRIBUTING.md: make test": targets_of_make,
    "docs/runbook.md: d1-signer check": as_it_is,
    "docs/cli.md: d1-signer check --require": as_it_is,
    "docs/cli.md: curl": curl,
    "docs/cli.md: d1-signer custody --bundle": bundles,
    "docs/cli.md: $ d1-signer sandbox": screen_of_the_sandbox,
    "docs/cli.md: $ d1-signer check": screen_of_check,
    "docs/cli.md: d1-signer generate-key --key file": client_key,
    "docs/cloud/aws.md: pip": on_aws,
    "docs/cloud/vault.md: pip": on_vault,
    "docs/cloud/vault.md: path ": policy,
    "d1_signer/backends/vault/__init__.py: path ": policy,
    "docs/audit/README.md: d1-signer audit verify": on_a_trail,
    "docs/audit/README.md: d1-signer audit show /var/lib/d1/audit --jti": on_a_trail,
    "docs/audit/README.md: d1-signer audit show /var/lib/d1/audit --json": on_a_trail,
    "docs/audit/README.md: cat /var": on_a_trail,
    "docs/custody/attestation.md: openssl x509": anchor,
    "docs/pkcs11/softhsm.md: eval": with_softhsm,
    "softhsm/README.md: d1-signer softhsm -- sh": with_softhsm,
    "softhsm/README.md: exports=": with_softhsm,
    "softhsm/README.md: - run:": actions_of_github,
}


@pytest.mark.timeout(300)  # several processes, one after another
@pytest.mark.parametrize("first", RUN)
def test_it_runs(first: str, shell: Shell) -> None:
    (snippet,) = (each for each in snippets() if each.key.startswith(first))
    RUN[first](shell, snippet.text)

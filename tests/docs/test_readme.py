# SPDX-License-Identifier: Apache-2.0
"""What the README says, run as it stands; only paths, URLs and the token's label are put in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer import Signer, generate_key, open_signer
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
TLS_KEY_URI = re.compile(r"pkcs11:token=bank;object=d1-tls\?[^\"'#]*")
HSM_CERTIFICATE = """
with TokenFetcher(
    signer,
    issuer_id="my-issuer",
    environment={base_url!r},
    client_certificate=certificate,
    ca_file={ca_file!r},
) as hsm_fetcher:
    print(bool(hsm_fetcher.token().value))
"""
KEY_URI = re.compile(r"pkcs11:token=bank;object=d1\?[^\"'#]*")
LINK = re.compile(r"\]\(([^)#]+)\)")


def request_of(signer: Signer) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "client")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(signer.as_private_key(), SHA256()).public_bytes(Encoding.PEM)


def settings_file(folder: Path, sandbox: Sandbox, uri: str) -> Path:
    file = folder / "production.toml"
    lines = {
        "environment": sandbox.base_url,
        "issuer_id": "my-issuer",
        "key": f"{uri}#bank-2026",
        "client_cert": str(sandbox.client_certificate),
        "client_key": str(sandbox.client_key),
        "ca_file": str(sandbox.ca_file),
    }
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    return file


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def sandbox() -> Sandbox:
    return Sandbox(issuer_id="my-issuer")


def test_the_python_examples_run_in_the_order_of_the_page(
    softhsm_token: SoftHsmToken, sandbox: Sandbox, tmp_path: Path
) -> None:
    generate_key(softhsm_token.uri)
    tls_uri = softhsm_token.uri.replace("object=d1", "object=d1-tls")
    generate_key(tls_uri)
    with sandbox, open_signer(softhsm_token.uri) as signer, open_signer(tls_uri) as tls_signer:
        sandbox.register_key("bank-2026", signer.public_key.jwk())
        certificate = sandbox.sign_client_request(request_of(tls_signer))
        code = "\n".join(blocks("python"))
        assert code.count("Environment.STAGING") == 1
        for old, new in {
            "environment=Environment.STAGING,": f"environment={sandbox.base_url!r}, "
            f"ca_file={str(sandbox.ca_file)!r},",
            "/etc/d1/client-hsm.pem": str(certificate),
            "/etc/d1/client.pem": str(sandbox.client_certificate),
            "/etc/d1/client.key": str(sandbox.client_key),
            "/home/me/d1-dev.pem": str(tmp_path / "dev.pem"),
            "/etc/d1/production.toml": str(settings_file(tmp_path, sandbox, softhsm_token.uri)),
        }.items():
            assert old in code
            code = code.replace(old, new)
        script = tmp_path / "readme.py"
        code = TLS_KEY_URI.sub(lambda _: tls_uri, KEY_URI.sub(lambda _: softhsm_token.uri, code))
        # The certificate that the page makes is used as the page uses the other one.
        code += HSM_CERTIFICATE.format(base_url=sandbox.base_url, ca_file=str(sandbox.ca_file))
        script.write_text(code)
        ran = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env=os.environ | {"SOFTHSM2_CONF": str(softhsm_token.configuration)},
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert ran.returncode == 0, ran.stderr
    status, token, *_, exportable, hsm = ran.stdout.splitlines()
    assert hsm == "True"
    assert status == "200"
    assert re.fullmatch(r"\d+\.\d+ \S.*", token)
    assert exportable == "False"
    assert ran.stderr == ""


def test_the_commands_run_in_the_order_of_the_page(
    softhsm_token: SoftHsmToken,
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("sh") if "d1-signer check" in block)
    block = block.replace("file:///etc/d1/client.key", (tmp_path / "client.key").as_uri())
    commands = KEY_URI.sub(lambda _: softhsm_token.uri, block).splitlines()
    assert [line.split()[0] for line in commands] == ["export", *["d1-signer"] * 7]
    with sandbox:
        env = environment(softhsm_token, sandbox)
        told = run([*commands[:3], "d1-signer public-key --format jwks -o jwks.json"], env)
        assert "bank-2026" in told
        (key,) = json.loads((tmp_path / "jwks.json").read_text())["keys"]
        sandbox.register_key(key["kid"], {name: key[name] for name in ("kty", "crv", "x", "y")})
        told = run([commands[0], *commands[3:]], env)
    assert "BEGIN CERTIFICATE REQUEST" in told
    assert "CKA_NEVER_EXTRACTABLE" in told
    assert sandbox.counters.tokens_issued >= 1


def environment(token: SoftHsmToken, sandbox: Sandbox) -> dict[str, str]:
    return os.environ | {
        "SOFTHSM2_CONF": str(token.configuration),
        "PATH": PATH,
        "D1_ISSUER_ID": "my-issuer",
        "D1_ENVIRONMENT": sandbox.base_url,
        "D1_CLIENT_CERT": str(sandbox.client_certificate),
        "D1_CLIENT_KEY": str(sandbox.client_key),
        "D1_CA_FILE": str(sandbox.ca_file),
    }


def run(lines: list[str], env: dict[str, str]) -> str:
    ran = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_first_commands_run_as_typed(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("sh") if "\nd1-signer demo " in block)
    install, *commands = block.splitlines()
    assert install.startswith("pip install ")
    told = run(commands, os.environ | {"PATH": PATH, "TMPDIR": str(tmp_path)})
    assert "made inside the HSM" in told
    assert "Bearer" in told


def test_every_command_of_make_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


PAGES = [
    *sorted(ROOT.glob("docs/**/*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "softhsm/README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [target for target in targets if not (page.parent / target).exists()] == []

# SPDX-License-Identifier: Apache-2.0
"""The pages on cloud keys say what is so, and their commands work."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.credentials
import botocore.handlers
import botocore.session
import botocore.tokens
import google.api_core
import google.auth
import google.cloud.kms_v1
import google.oauth2
import pytest
import requests
from google.auth import environment_vars

from d1_signer import errors
from d1_signer.backends.vault.failures import Phase
from d1_signer.es256 import PublicKey
from tests.servers import aws, gcp, vault
from tests.servers.certificates import self_signed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    *(DOCS / "cloud" / f"{service}.md" for service in ("aws", "gcp", "vault")),
    DOCS / "backends.md",
]
CODES = {
    error.code
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.D1SignerError)
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_error_codes_are_those_that_exist(page: Path) -> None:
    table = page.read_text().partition("## What the errors mean")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    assert named <= CODES
    assert len(named) >= 10 or page.stem == "backends"


@pytest.mark.parametrize("page", ["aws", "gcp", "vault"])
def test_phases_have_the_same_names_on_each_page(page: str) -> None:
    text = (DOCS / "cloud" / f"{page}.md").read_text()
    names = re.search(r"`error.details` \w+ `phase` \(([^)]*)\)", text)
    assert names is not None
    assert re.findall("`([a-z-]+)`", names.group(1)) == [phase.value for phase in Phase]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_policy_for_aws_is_json_with_the_permissions_that_are_used() -> None:
    text = (DOCS / "cloud" / "aws.md").read_text()
    policy = json.loads(text.partition("```json\n")[2].partition("```")[0])
    actions = [statement["Action"] for statement in policy["Statement"]]
    assert actions == [["kms:DescribeKey", "kms:GetPublicKey"], "kms:Sign"]


def _d1_signer(*arguments: str, **environment: str) -> str:
    return _run(str(Path(sys.executable).parent / "d1-signer"), *arguments, **environment)


def _run(*command: str, **environment: str) -> str:
    ran = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vault.Vault]:
    with vault.vault(tmp_path_factory.mktemp("vault")) as running:
        yield running


def test_commands_of_the_vault_page(bao: vault.Vault, tmp_path: Path) -> None:
    environment = {
        "VAULT_ADDR": bao.tls_url,
        "VAULT_CACERT": str(bao.ca_file),
        "VAULT_TOKEN": vault.ROOT_TOKEN,
        "HOME": str(tmp_path),
    }
    made = _d1_signer("generate-key", "--key", "hashivault://d1", **environment)
    assert "hashivault://d1?version=1" in made
    key = ("--key", "hashivault://d1?version=1")
    pem = _d1_signer("public-key", *key, "--format", "pem", **environment)
    told = bao.api("GET", "transit/keys/d1")["data"]["keys"]["1"]["public_key"]
    assert PublicKey.from_pem(pem) == PublicKey.from_pem(told)
    custody = json.loads(_d1_signer("custody", *key, "--json", **environment))
    assert '"exportable": false' in json.dumps(custody)


def test_commands_of_the_aws_page(tmp_path: Path) -> None:
    with aws.aws_kms(tmp_path) as endpoint:
        uri = f"awskms:///alias/d1?region={aws.REGION}&endpoint={endpoint.url}"
        _d1_signer("generate-key", "--key", uri, **aws.ENVIRONMENT)
        pem = _d1_signer("public-key", "--key", uri, "--format", "pem", **aws.ENVIRONMENT)
        der = endpoint.client().get_public_key(KeyId="alias/d1")["PublicKey"]
        assert PublicKey.from_pem(pem).der() == der


def test_commands_of_the_gcp_page(tmp_path: Path) -> None:
    certificate, private = self_signed(tmp_path)
    # The command as it is, for an authority that is not a public one.
    trusting = (
        "import sys, certifi; path = sys.argv.pop(1); certifi.where = lambda: path;"
        " from d1_signer.cli import main; main()"
    )
    command = (sys.executable, "-c", trusting, str(certificate))
    environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(gcp.service_account(tmp_path))}
    with gcp.cloud_kms(certificate, private) as server:
        key, query = f"gcpkms://{gcp.RING}/cryptoKeys/doc", f"?endpoint=localhost:{server.tls_port}"
        made = _run(*command, "generate-key", "--key", key + query, **environment)
        uri = f"{key}/cryptoKeyVersions/1{query}"
        assert uri in made
        pem = _run(*command, "public-key", "--key", uri, "--format", "pem", **environment)
        told = server.client().get_public_key(name=f"{key}/cryptoKeyVersions/1"[9:])
        assert PublicKey.from_pem(pem) == PublicKey.from_pem(told.pem)


def _nodes_of(package: ModuleType) -> Iterator[ast.AST]:
    assert package.__file__
    for module in Path(package.__file__).parent.rglob("*.py"):
        yield from ast.walk(ast.parse(module.read_text(encoding="utf-8")))


def _asked_for(node: ast.AST) -> list[ast.expr]:
    """What is looked up in the environment by an expression, whatever its name looks like."""
    if isinstance(node, ast.Call) and re.search(r"environ\.\w+$|getenv$", ast.unparse(node.func)):
        return node.args[:1]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        return [node.slice]
    if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
        return [node.left]
    return []


def _strings_of(package: ModuleType, pattern: str) -> set[str]:
    """The names that a package looks up, and its strings that look like names of variables."""
    found = set()
    for node in _nodes_of(package):
        found |= {each.value for each in _asked_for(node) if isinstance(each, ast.Constant)}
        if isinstance(node, ast.Constant) and re.fullmatch(pattern, str(node.value)):
            found.add(node.value)
    return {name for name in found if isinstance(name, str)}


def _made_names_of(package: ModuleType) -> set[str]:
    """What stands before the first brace of f-strings that make names of variables."""
    begins = [node.values[0] for node in _nodes_of(package) if isinstance(node, ast.JoinedStr)]
    texts = {str(node.value) for node in begins if isinstance(node, ast.Constant)}
    return {text for text in texts if re.fullmatch("_?(AWS|BOTO|GOOGLE|GCE)_[A-Z0-9_]*_", text)}


@pytest.mark.parametrize(
    ("library", "package", "pattern"),
    [
        ("boto3", boto3, "(AWS|BOTO|BOTOCORE)_[A-Z0-9_]+"),
        ("boto3", botocore, "(AWS|BOTO|BOTOCORE)_[A-Z0-9_]*[A-Z0-9]|SSLKEYLOGFILE|.*_CA_BUNDLE"),
        ("google-auth", google.auth, "(GCE|GOOGLE|CLOUDSDK|AWS)_[A-Z_]+"),
        ("google-auth", google.oauth2, "(GCE|GOOGLE|CLOUDSDK|AWS)_[A-Z_]+"),
        ("google-auth", google.api_core, "GOOGLE_[A-Z_]+"),
        ("google-auth", google.cloud.kms_v1, "GOOGLE_[A-Z_]+"),
        ("google-auth", requests, "[A-Z]+_CA_BUNDLE|NETRC"),
    ],
)
def test_security_names_every_variable_that_the_libraries_read(
    library: str, package: ModuleType, pattern: str
) -> None:
    read = _strings_of(package, pattern)
    assert read - _listed(library) == set()


def test_security_names_every_variable_of_google_auth() -> None:
    named = {value for name, value in vars(environment_vars).items() if name.isupper()}
    assert len(named) > 20
    assert named - _listed("google-auth") == set()


@pytest.mark.parametrize("package", [boto3, botocore, google.auth, google.oauth2, google.api_core])
def test_security_names_every_variable_whose_name_is_made(package: ModuleType) -> None:
    made = _made_names_of(package)
    assert (package is botocore) is bool(made)
    if package is botocore:
        assert made == {"AWS_ENDPOINT_URL_", "AWS_BEARER_TOKEN_"}
    services = {*_services_of_credentials(), "kms"}
    signing = {botocore.session.Session().get_service_model(name).signing_name for name in services}
    named = {"AWS_BEARER_TOKEN_": signing}
    names = {begin + each for begin in made for each in named.get(begin, services)}
    assert {name.upper().replace("-", "_") for name in names} - _listed("boto3") == set()


def test_a_bearer_token_of_the_environment_is_for_none_of_the_services_that_are_asked() -> None:
    assert botocore.handlers.get_bearer_auth_supported_services() == {"bedrock"}


def test_security_names_the_endpoints_of_the_services_that_give_credentials() -> None:
    names = {
        f"AWS_ENDPOINT_URL_{name.upper().replace('-', '_')}" for name in _services_of_credentials()
    }
    assert names - _listed("boto3") == set()


def _services_of_credentials() -> set[str]:
    asked = {
        node.args[0].value
        for module in (botocore.credentials, botocore.tokens)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
        and re.fullmatch("[a-z-]+", node.args[0].value)
        and "client" in ast.unparse(node.func)
    }
    assert {"sts", "sso"} <= asked
    return asked


def _listed(library: str) -> set[str]:
    rows = (DOCS.parent / "SECURITY.md").read_text().splitlines()
    rows = [row for row in rows if row.startswith(f"| {library} | ")]
    return set(re.findall(r"`(\w+)`", "".join(rows)))

# SPDX-License-Identifier: Apache-2.0
"""A policy that is not met, in every backend: no signature; and what each report is about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d1_signer import generate_key
from d1_signer.testing import make_softhsm_token
from tests.servers import aws, gcp, vault
from tests.servers.certificates import self_signed

# What each of them cannot show, and what its report names.
_SHORT = {
    "pem": "hardware",
    "pkcs11": "hardware",
    "aws": "fips",
    "gcp": "fips",
    "vault": "hardware",
}
_ABOUT = {
    "pem": {"mode"},
    "pkcs11": {"module path", "module SHA-256", "library version"},
    "aws": {"account", "region"},
    "gcp": {"protectionLevel"},
    "vault": {"address", "namespace", "cluster id", "server version"},
}


@pytest.fixture(scope="module", params=[*_SHORT])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """Name of a backend, and the variables with which a command reaches a key of it."""
    name, folder = request.param, tmp_path_factory.mktemp("place")
    if name == "pem":
        yield name, {"D1_SIGNER_KEY": generate_key((folder / "key.pem").as_uri()).uri}
    elif name == "pkcs11":
        token = make_softhsm_token(folder)
        variables = {"SOFTHSM2_CONF": str(token.configuration), "D1_SIGNER_KEY": token.uri}
        assert _command("generate-key", variables)[0] == 0
        yield name, variables
    elif name == "aws":
        with aws.aws_kms(folder) as running:
            uri = f"awskms:///{running.make_key().rpartition('/')[2]}?endpoint={running.url}"
            yield name, {**aws.ENVIRONMENT, "D1_SIGNER_KEY": uri}
    elif name == "gcp":
        certificate, key = self_signed(folder)
        with gcp.cloud_kms(certificate, key) as server:
            endpoint = f"endpoint=localhost:{server.tls_port}&ca_file={certificate}"
            yield (
                name,
                {
                    "GOOGLE_APPLICATION_CREDENTIALS": str(gcp.service_account(folder)),
                    "D1_SIGNER_KEY": f"gcpkms://{gcp.VERSION}?{endpoint}",
                },
            )
    else:
        with vault.vault(folder) as bao:
            bao.make_key("d1")
            yield (
                name,
                {
                    "VAULT_ADDR": bao.url,
                    "VAULT_TOKEN": vault.ROOT_TOKEN,
                    "D1_SIGNER_KEY": "hashivault://d1",
                },
            )


def _command(line: str, variables: dict[str, str], cwd: Path | None = None) -> tuple[int, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "d1_signer.cli", *line.split(), "--json"],
        env={**os.environ, **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.stdout, ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def test_a_policy_that_is_not_met_means_no_signature(
    place: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    name, variables = place
    for words in (_SHORT[name], "attested"):
        status, told = _command(
            f"custody --require {words} --bundle {tmp_path}/bundle.json", variables
        )
        assert (status, bool(told["keys"][0]["unmet"])) == (1, True), told
        assert not [*tmp_path.iterdir()]
        if words == "attested":
            continue
        policy = {**variables, "D1_CUSTODY_POLICY": words}
        for line in ("assertion --issuer-id i --no-audience", "csr --subject CN=a --key"):
            more = f" {variables['D1_SIGNER_KEY']}" if line.endswith("--key") else ""
            given = {**policy, "D1_SIGNER_KEY": ""} if more else policy
            status, told = _command(line + more, given)
            assert (status, told["code"]) == (1, "custody"), told


def test_the_report_names_what_it_is_about(
    place: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    name, variables = place
    status, told = _command(f"custody --bundle {tmp_path}/bundle.json --challenge c", variables)
    assert status == 0, told
    (key,) = told["keys"]
    facts = {fact["name"]: fact["value"] for fact in key["facts"]}
    assert facts.keys() >= _ABOUT[name]
    missing = {fact for fact in _ABOUT[name] - {"namespace"} if facts[fact] is None}
    assert not missing
    assert key["made_by"] == told["made_by"]
    assert {fact["assurance"] for fact in key["facts"]} == {"claimed"}
    status, told = _command(f"custody verify {tmp_path}/bundle.json --challenge c", {})
    assert (status, told["holds"]) == (0, True)
    assert all(
        answer["by"][:8] in {"", "claimed "} for answer in told["keys"][0]["answers"].values()
    )

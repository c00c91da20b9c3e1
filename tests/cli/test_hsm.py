# SPDX-License-Identifier: Apache-2.0
"""The command on SoftHSM, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken
from tests.cli.conftest import ISSUER, Result, run_process
from tests.cli.test_process import AtTerminal

PKCS11_STEPS = ["module", "token", "login", "key"]
_HINTS = {
    "module": "module-path",
    "token": "Name the token",
    "login": "The token counts each wrong PIN and locks itself after some: correct the PIN at its "
    "source before this is run again or started anew.",
    "key": "Check object and id",
}


@pytest.fixture
def uri(softhsm_token: SoftHsmToken) -> str:
    made = run_process("generate-key", "--json", D1_SIGNER_KEY=softhsm_token.uri)
    assert made.status == 0, made.out
    assert softhsm_token.pin not in made.out + made.err
    return softhsm_token.uri + "#hsm-2026"


def settings_for(sandbox: Sandbox, uri: str, certificate: Path, key: str) -> dict[str, str]:
    return {
        "D1_SIGNER_KEY": uri,
        "D1_ISSUER_ID": ISSUER,
        "D1_ENVIRONMENT": sandbox.base_url,
        "D1_CLIENT_CERT": str(certificate),
        "D1_CLIENT_KEY": key,
        "D1_CA_FILE": str(sandbox.ca_file),
    }


def key_steps(result: Result) -> dict[str, str]:
    steps = result.document["steps"]
    return {step["step"]: step["status"] for step in steps if step["step"] in PKCS11_STEPS}


def test_generated_key_is_found_by_what_was_printed(softhsm_token: SoftHsmToken) -> None:
    made = run_process("generate-key", "--json", D1_SIGNER_KEY=softhsm_token.uri).document
    opened = run_process("public-key", "--json", "--key", made["uri"]).document
    assert opened["public_key"] == made["public_key"]
    again = run_process("generate-key", "--json", D1_SIGNER_KEY=softhsm_token.uri)
    assert (again.status, again.document["code"]) == (1, "key_exists")


def test_check_says_whether_custody_was_judged(uri: str) -> None:
    for policy, judged in (("generated-in-place", True), ("", False)):
        told = run_process("check", "--key", uri, D1_CUSTODY_POLICY=policy)
        assert told.status == 0, told.out
        assert "exportable: no (claimed), generated in place: yes (claimed), hardware" in told.out
        assert ("not judged" not in told.out) == judged


def test_custody_tells_where_the_key_lives(uri: str) -> None:
    result = run_process("custody", "--json", "--key", uri)
    report = result.document["keys"][0]
    assert (report["backend"], report["kid"]) == ("pkcs11", "hsm-2026")
    assert (report["exportable"], report["generated_in_place"]) == (False, True)
    facts = {fact["name"]: fact["value"] for fact in report["facts"]}
    assert facts["CKA_SENSITIVE"] is True
    assert facts["CKA_EXTRACTABLE"] is False
    assert facts["CKA_LOCAL"] is True


def test_the_key_of_assertions_makes_no_signing_request(
    uri: str, softhsm_token: SoftHsmToken
) -> None:
    options = uri.partition("?")[2].partition("#")[0]
    other = f"pkcs11:object=d1;token={softhsm_token.label}?{options}"
    refused = run_process("csr", "--key", other, "--subject", "CN=bank", D1_SIGNER_KEY=uri)
    assert refused.status == 2
    assert "signs assertions" in refused.err


def test_a_signing_request_from_the_hsm(uri: str) -> None:
    made = run_process("csr", "--key", uri, "--subject", "CN=bank")
    request = x509.load_pem_x509_csr(made.out.encode())
    assert request.is_signature_valid
    public = run_process("public-key", "--key", uri).out
    assert request.public_key() == load_pem_public_key(public.encode())


def test_from_the_hsm_to_a_token(uri: str, softhsm_token: SoftHsmToken) -> None:
    jwk = run_process("public-key", "--format", "jwk", "--key", uri).out
    with Sandbox(ISSUER) as sandbox:
        sandbox.register_key("hsm-2026", json.loads(jwk))
        settings = settings_for(sandbox, uri, sandbox.client_certificate, str(sandbox.client_key))
        signed = run_process("assertion", "--show-assertion", "--no-audience", **settings).out
        token = run_process("token", "--json", "-vv", **settings)
        checked = run_process("check", "-vv", **settings)
    claims = jwt.decode(signed.strip(), jwt.PyJWK.from_json(jwk).key, algorithms=["ES256"])
    assert claims["iss"] == ISSUER
    assert token.document["token_type"] == "Bearer"
    assert checked.out.endswith("\nAll steps passed.\n")
    for result in (token, checked):
        assert softhsm_token.pin not in result.out + result.err


def test_a_client_key_in_the_hsm(uri: str, softhsm_token: SoftHsmToken) -> None:
    jwk = run_process("public-key", "--format", "jwk", "--key", uri).out
    client = softhsm_token.uri.replace("object=d1", "object=d1-tls")
    assert run_process("generate-key", "--key", client).status == 0
    request = run_process("csr", "--key", client, "--subject", "CN=bank").out
    with Sandbox(ISSUER) as sandbox:
        sandbox.register_key("hsm-2026", json.loads(jwk))
        certificate = sandbox.sign_client_request(request.encode())
        settings = settings_for(sandbox, uri, certificate, client)
        token = run_process("token", "--json", "--timeout", "25", "-vv", **settings)
        checked = run_process("check", **settings)
    assert token.document["token_type"] == "Bearer", token.err
    assert checked.out.endswith("\nAll steps passed.\n")
    assert softhsm_token.pin not in token.out + token.err


@pytest.mark.parametrize("source", ["file:/nowhere/pin", "env:UNSET_PIN"])
@pytest.mark.parametrize("isolated", [False, True])
def test_ok_is_not_said_of_a_token_that_nobody_looked_for(
    softhsm_token: SoftHsmToken, source: str, *, isolated: bool
) -> None:
    # The PIN is read first.
    uri = softhsm_token.uri.replace(softhsm_token.label, "nowhere").replace(
        f"file:{softhsm_token.pin_file}", source
    )
    options = ["--option", "isolation=process"] if isolated else []
    result = run_process("check", "--json", *options, "--key", uri)
    steps = key_steps(result)
    assert (result.status, steps["token"], steps["login"]) == (1, "skipped", "failed")


def test_check_passes_each_step(uri: str) -> None:
    result = run_process("check", "--json", "--key", uri)
    assert result.status == 0
    assert key_steps(result) == dict.fromkeys(PKCS11_STEPS, "ok")


@pytest.mark.parametrize("step", PKCS11_STEPS)
def test_check_says_at_which_step_it_stops(
    uri: str, softhsm_token: SoftHsmToken, tmp_path: Path, step: str
) -> None:
    if step == "module":
        uri = uri.replace(softhsm_token.module_path, "/none/libsofthsm2.so")
    elif step == "token":
        uri = uri.replace(f"token={softhsm_token.label}", "token=another")
    elif step == "login":
        wrong = tmp_path / "wrong-pin"
        wrong.touch(mode=0o600)
        wrong.write_text("0000")
        uri = uri.replace(str(softhsm_token.pin_file), str(wrong))
    else:
        uri = uri.replace("object=d1", "object=other")
    result = run_process("check", "--json", "--key", uri)
    assert result.status == 1
    assert result.document["stopped_at"]["step"] == step
    hint = result.document["stopped_at"]["error"]["hint"]
    assert _HINTS[step] in hint
    at = PKCS11_STEPS.index(step)
    states = ["ok"] * at + ["failed"] + ["skipped"] * (len(PKCS11_STEPS) - at - 1)
    assert key_steps(result) == dict(zip(PKCS11_STEPS, states, strict=True))


def test_a_pin_in_the_variable_is_taken_with_a_warning(
    uri: str, softhsm_token: SoftHsmToken
) -> None:
    source = f"pin-source=file:{softhsm_token.pin_file}"
    with_pin = uri.replace(source, f"pin-value={softhsm_token.pin}")
    assert with_pin != uri
    result = run_process("custody", D1_SIGNER_KEY=with_pin)
    assert result.status == 0, result.err
    assert "Warning: " in result.err
    assert softhsm_token.pin not in result.out + result.err


@pytest.mark.parametrize("options", [(), ("--option", "isolation=process")])
def test_pin_at_the_prompt(uri: str, softhsm_token: SoftHsmToken, options: tuple[str, ...]) -> None:
    prompting = uri.replace(f"file:{softhsm_token.pin_file}", "prompt")
    terminal = AtTerminal("public-key", "--key", prompting, *options)
    terminal.wait_for(f"PIN for {uri.partition('?')[0]}: ")
    terminal.type(softhsm_token.pin + "\n")
    status, out = terminal.end()
    assert status == 0, terminal.shown
    assert out.startswith("-----BEGIN PUBLIC KEY-----")
    assert softhsm_token.pin not in out + terminal.shown

# SPDX-License-Identifier: Apache-2.0
"""Tokens and assertions: what they say is shown, what they are only when asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jwt
import pytest
import requests
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import ECKey

from d1_signer import generate_key
from d1_signer.cli._output import printable
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.testing import SoftHsmToken
from tests.cli.conftest import ISSUER, Run, bearer_values, run_process


def public_jwk(run: Run) -> dict[str, str | list[str]]:
    document = run("public-key", "--format", "jwk", "--json").document["public_key"]
    assert isinstance(document, dict)
    return document


def test_token_for_people_is_masked(run: Run, settings: dict[str, str]) -> None:
    result = run("token", **settings)
    assert result.status == 0
    assert result.err == ""
    lines = dict(line.split("  ", 1) for line in result.out.splitlines())
    assert lines["Access token"] == "**** (--show-token prints it)"
    assert lines["Scope"].strip() == "d1-api:account:full d1-api:consumer:read"
    assert "UTC (in 900 s)" in lines["Expires"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--kid", ""], "The kid is empty"),
        (["--kid", "a\tb"], "The kid is empty"),
        (["--issuer-id", " "], "The issuer id is empty"),
        (["--audience", ""], "The audience is empty"),
        (["--proxy-credentials-source", "file:/no"], "Credentials for a proxy are given"),
    ],
)
def test_a_wrong_setting_is_told_before_a_key_is_opened(
    run: Run, settings: dict[str, str], tmp_path: Path, wrong: list[str], told: str
) -> None:
    result = run("token", *wrong, **settings | {"D1_SIGNER_KEY": (tmp_path / "no.pem").as_uri()})
    assert (result.status, result.out) == (2, "")
    assert told in result.err


def test_token_for_machines_is_masked(run: Run, settings: dict[str, str]) -> None:
    document = run("token", "--json", **settings).document
    assert set(document) == {"token_type", "scope", "expires_at", "expires_in", "environment"}
    assert document["expires_at"] == pytest.approx(time.time() + 900, abs=20)
    assert document["expires_in"] == pytest.approx(900, abs=20)
    assert document["environment"] == settings["D1_ENVIRONMENT"]


@pytest.mark.parametrize("json_form", [False, True])
def test_shown_token_works(
    run: Run, sandbox: Sandbox, settings: dict[str, str], *, json_form: bool
) -> None:
    result = run("token", "--show-token", *["--json"] * json_form, **settings)
    assert result.err == ""
    token = result.document["access_token"] if json_form else result.out.removesuffix("\n")
    answer = requests.get(
        f"{sandbox.banking_url}/ping",
        headers={"Authorization": f"Bearer {token}"},
        cert=(str(sandbox.client_certificate), str(sandbox.client_key)),
        verify=str(sandbox.ca_file),
        timeout=10,
    )
    assert answer.status_code == 200


def test_nothing_secret_in_any_output_of_a_process(
    sandbox: Sandbox, settings: dict[str, str]
) -> None:
    outputs = [run_process("token", "-vv", **settings)]
    sandbox.misbehave(Fault.HOSTILE_ECHO)
    outputs += [run_process("token", "-vv", *more, **settings) for more in ([], ["--json"])]
    sandbox.misbehave(None)
    outputs.append(run_process("check", "-vv", **settings))
    assert [result.status for result in outputs] == [0, 1, 1, 0]
    assert "INFO d1_signer.token token.renewed" in outputs[0].err
    values = bearer_values(sandbox)
    assert len(values) == 6  # four assertions, two tokens
    for result in outputs:
        told = result.out + result.err
        assert not [value for value in values if value in told or value[-40:] in told]


def test_refusal_for_people_and_machines(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    settings["D1_ISSUER_ID"] = "somebody-else"
    result = run("token", **settings)
    assert result.status == 1
    assert result.out == ""
    error, hint, facts = result.err.splitlines()
    assert error.startswith("Error: D1 refused the assertion (HTTP 400): 'invalid_grant'")
    assert "Check the issuer id" in hint
    assert "code: token_refused, status: 400" in facts
    # What Thales finds the request by in its own log.
    assert f"correlation_id: {sandbox.requests[-1].correlation_id}" in facts
    machine = run("token", "--json")
    assert machine.document["details"]["correlation_id"] == sandbox.requests[-1].correlation_id
    assert (machine.status, machine.err) == (1, "")
    assert machine.document["code"] == "token_refused"
    assert machine.document["retryable"] is False
    assert machine.document["details"]["error"] == "invalid_grant"


def test_a_key_that_cannot_be_opened_is_passed_over(
    run: Run, sandbox: Sandbox, settings: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "rsa.pem"
    broken.touch(mode=0o600)
    broken.write_text("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n")
    settings["D1_SIGNER_KEY"] = f"{broken.as_uri()} {settings['D1_SIGNER_KEY']}"
    result = run("token", "--json", **settings)
    assert result.status == 0
    assert "a key is passed over" in result.err
    assert sandbox.requests[-1].header["kid"] == "bank-2026"
    only_broken = run("token", "--json", "--key", broken.as_uri())
    assert only_broken.status == 1
    assert only_broken.document["code"] == "invalid_key"


def test_a_key_whose_file_or_passphrase_cannot_be_read_is_passed_over(
    run: Run, sandbox: Sandbox, settings: dict[str, str], tmp_path: Path
) -> None:
    missing, locked = tmp_path / "missing.pem", tmp_path / "locked.pem"
    generate_key(locked.as_uri(), passphrase_source=lambda: "a passphrase")
    unreadable = f"{missing.as_uri()} {locked.as_uri()}?passphrase-source=env:NOT_SET"
    settings["D1_SIGNER_KEY"] = f"{unreadable} {settings['D1_SIGNER_KEY']}"
    result = run("token", "--json", **settings)
    assert result.status == 0
    assert result.err.count("a key is passed over") == 2
    assert sandbox.requests[-1].header["kid"] == "bank-2026"
    assert run("assertion", "--json").document["header"]["kid"] == "bank-2026"
    none_left = run("token", "--json", D1_SIGNER_KEY=unreadable)
    assert none_left.status == 2
    assert none_left.document["code"] == "secret_source"


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: ""} for name in ("D1_ISSUER_ID", "D1_ENVIRONMENT", "D1_CLIENT_KEY")),
        *({name: "/nowhere.pem"} for name in ("D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE")),
        {"D1_ENVIRONMENT": "stagging"},
        {"D1_SIGNER_OPTIONS": "no_such_option=1"},
    ],
    ids=str,
)
def test_a_setting_that_is_missing_or_wrong_is_told_before_a_pin_is_read(
    run: Run, settings: dict[str, str], softhsm_token: SoftHsmToken, wrong: dict[str, str]
) -> None:
    pin = softhsm_token.pin_file.with_name("no-pin")
    key = softhsm_token.uri.replace(str(softhsm_token.pin_file), str(pin))
    settings = {**settings, "D1_SIGNER_KEY": key}
    assert "The PIN file cannot be read" in run("token", "--json", **settings).out
    result = run("token", "--json", **{**settings, **wrong})
    assert result.status == 2
    assert "PIN" not in result.out


def test_assertion_says_what_it_is_and_is_masked(run: Run, settings: dict[str, str]) -> None:
    document = run("assertion", "--json", **settings).document
    assert document["header"] == {"alg": "ES256", "kid": "bank-2026", "typ": "JWT"}
    claims = document["claims"]
    assert set(document) == {"header", "claims"}
    assert (claims["iss"], claims["sub"]) == (ISSUER, ISSUER)
    assert claims["aud"] == settings["D1_ENVIRONMENT"] + "/oauth2/token"
    assert claims["exp"] == pytest.approx(time.time() + 300, abs=20)
    text = run("assertion").out
    assert "kid  bank-2026" in text
    assert f"iss  {ISSUER}" in text


def test_shown_assertion_is_verified_by_others(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    result = run("assertion", "--show-assertion", "--lifetime", "60", **settings)
    signed = result.out.removesuffix("\n")
    assert "grants an access token to whoever has it" in result.err
    assert sandbox.counters.connections == 0
    jwk = public_jwk(run)
    audience = settings["D1_ENVIRONMENT"] + "/oauth2/token"
    claims = jwt.decode(
        signed, jwt.PyJWK.from_json(json.dumps(jwk)).key, algorithms=["ES256"], audience=audience
    )
    decoded = joserfc_jwt.decode(signed, ECKey.import_key(jwk), algorithms=["ES256"])
    assert decoded.claims == claims
    assert decoded.header == {"alg": "ES256", "kid": "bank-2026", "typ": "JWT"}
    assert claims["exp"] == pytest.approx(time.time() + 60, abs=20)
    machine = run("assertion", "--show-assertion", "--json")
    assert machine.document["assertion"].count(".") == 2
    assert machine.err == ""


def test_audience_is_replaced_or_left_out(run: Run, settings: dict[str, str]) -> None:
    del settings["D1_ENVIRONMENT"]
    replaced = run("assertion", "--json", "--audience", "urn:d1", **settings).document
    assert replaced["claims"]["aud"] == "urn:d1"
    assert "aud" not in run("assertion", "--json", "--no-audience").document["claims"]


def test_token_without_audience(run: Run, sandbox: Sandbox, settings: dict[str, str]) -> None:
    assert run("token", "--no-audience", **settings).status == 0
    assert "aud" not in sandbox.requests[-1].claims
    assert run("token", "--audience", "urn:other", "--json").document["code"] == "token_refused"


@pytest.mark.parametrize("lifetime", ["0", "901", "x"])
def test_lifetime_has_its_bounds(run: Run, lifetime: str) -> None:
    assert run("assertion", "--lifetime", lifetime).status == 2


def test_control_characters_are_not_sent_to_the_terminal(run: Run) -> None:
    result = run("assertion", "--key", "file:///none%1B%5B2J.pem")
    assert result.status == 2
    assert "\x1b" not in result.err
    assert printable("none\x1b[2J\u202e.pem") == r"none\x1b[2J\u202e.pem"

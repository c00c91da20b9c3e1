# SPDX-License-Identifier: Apache-2.0
"""A private key itself where its URI or its path belongs: refused, named, and never printed."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from tests.cli.conftest import ISSUER, Result, run_process

KEY = ec.generate_private_key(ec.SECP256R1())
D = KEY.private_numbers().private_value.to_bytes(32, "big")


def exported(
    encoding: Encoding,
    form: PrivateFormat = PrivateFormat.PKCS8,
    encryption: KeySerializationEncryption | None = None,
) -> bytes:
    return KEY.private_bytes(encoding, form, encryption or NoEncryption())


def base64_of(form: PrivateFormat) -> str:
    return base64.b64encode(exported(Encoding.DER, form)).decode()


PEM = exported(Encoding.PEM).decode()
FORMS = {
    "PKCS#8": PEM,
    "SEC 1": exported(Encoding.PEM, PrivateFormat.TraditionalOpenSSL).decode(),
    "encrypted": exported(Encoding.PEM, encryption=BestAvailableEncryption(b"x" * 8)).decode(),
    "PEM in one line": PEM.replace("\n", "\\n"),
    "base64 PKCS#8": base64_of(PrivateFormat.PKCS8),
    "base64 SEC 1": base64_of(PrivateFormat.TraditionalOpenSSL),
    "number in hexadecimal": D.hex(),
    "DER in hexadecimal": exported(Encoding.DER).hex(),
    "JWKs": json.dumps([{"kty": "EC", "d": base64.urlsafe_b64encode(D).decode().rstrip("=")}]),
    "JWK": json.dumps({"kty": "EC", "d": base64.urlsafe_b64encode(D).decode().rstrip("=")}),
}


def assert_not_told(form: str, result: Result) -> None:
    """Not even a part of it: every 16 characters in a row are looked for."""
    told = result.out + result.err
    words = [word for word in re.split(r"[^A-Za-z0-9+/=_-]+", form) if len(word) >= 16]
    parts = {word[at : at + 16] for word in words for at in range(len(word) - 15)}
    assert parts
    assert not [part for part in parts if part in told]


@pytest.fixture
def variables(key_uri: str) -> dict[str, str]:
    """Enough for every command to go as far as to read certificates."""
    return {
        "D1_SIGNER_KEY": key_uri,
        "D1_ISSUER_ID": ISSUER,
        "D1_ENVIRONMENT": "https://127.0.0.1:9",
        "D1_CLIENT_CERT": "/none/client.pem",
        "D1_CLIENT_KEY": "/none/client.key",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("variable", "command"),
    [
        ("D1_SIGNER_KEY", ("check",)),
        ("D1_SIGNER_KEY", ("token", "--json")),
        ("D1_CLIENT_KEY", ("token", "-vv")),
    ],
)
def test_in_a_variable(
    variables: dict[str, str], form: str, variable: str, command: tuple[str, ...]
) -> None:
    result = run_process(*command, **{**variables, variable: FORMS[form]})
    assert_not_told(FORMS[form], result)
    assert result.status == 2
    told = result.document["message"] if "--json" in command else result.err
    assert f"{variable} holds " in told
    assert "a key itself" in told


@pytest.mark.parametrize("variable", ["D1_CLIENT_CERT", "D1_CA_FILE", "D1_ENVIRONMENT"])
@pytest.mark.parametrize("command", ["check", "token"])
def test_in_another_variable(variables: dict[str, str], variable: str, command: str) -> None:
    result = run_process(command, **{**variables, variable: PEM})
    assert_not_told(PEM, result)
    assert result.status == 2


@pytest.mark.parametrize("command", ["custody", "public-key", "generate-key", "sandbox"])
def test_in_commands_of_the_key_alone(command: str) -> None:
    result = run_process(command, "-vv", D1_SIGNER_KEY=PEM)
    assert_not_told(PEM, result)
    assert result.status == 2


def quoted(flag: str, form: str) -> list[str]:
    return [flag, form]


def unquoted(flag: str, form: str) -> list[str]:
    return [flag, *form.split()]


@pytest.mark.parametrize("given", [quoted, unquoted])
@pytest.mark.parametrize("flag", ["--key", "--client-key", "--ca-file"])
@pytest.mark.parametrize("form", ["PKCS#8", "JWK"])
def test_on_the_command_line(
    variables: dict[str, str], given: Callable[[str, str], list[str]], flag: str, form: str
) -> None:
    result = run_process("token", *given(flag, FORMS[form]), **variables)
    assert_not_told(FORMS[form], result)
    assert result.status == 2


@pytest.mark.parametrize(
    "uri",
    [f"file:///{base64_of(PrivateFormat.PKCS8)}", f"user:{D.hex()}"],
    ids=["known scheme", "unknown scheme"],
)
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_behind_a_scheme(variables: dict[str, str], uri: str, more: tuple[str, ...]) -> None:
    result = run_process("check", *more, **{**variables, "D1_SIGNER_KEY": uri})
    assert_not_told(uri.partition(":")[2], result)
    assert result.status in {1, 2}


def test_the_second_of_two(variables: dict[str, str], key_uri: str) -> None:
    result = run_process("token", **{**variables, "D1_SIGNER_KEY": f"{key_uri} {PEM}"})
    assert_not_told(PEM, result)
    assert "D1_SIGNER_KEY holds a key itself and not its URI." in result.err


def test_a_word_that_is_no_uri() -> None:
    result = run_process("custody", "--json", D1_SIGNER_KEY="a-pass-word-of-somebody")
    assert_not_told("a-pass-word-of-somebody", result)
    assert result.status == 2
    assert result.document["code"] == "key_uri"
    assert "pkcs11:" in result.document["hint"]

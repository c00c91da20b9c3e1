# SPDX-License-Identifier: Apache-2.0
"""``--config`` and ``D1_CONFIG``: the file that a service follows, for every command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from d1_signer.cli._app import cli
from d1_signer.sandbox import Sandbox
from tests.cli.conftest import ISSUER, Run
from tests.leaks.known import known

PIN = known("7391-never-shown")

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tables: str = "", **lines: object) -> str:
        file = tmp_path / "d1.toml"
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
        file.write_text(text + tables)
        return str(file)

    return write


@pytest.fixture
def lines(settings: dict[str, str]) -> dict[str, str]:
    """What the sandbox needs, by the names of the file."""
    return {
        "key": settings["D1_SIGNER_KEY"],
        "issuer_id": ISSUER,
        "environment": settings["D1_ENVIRONMENT"],
        "client_cert": settings["D1_CLIENT_CERT"],
        "client_key": settings["D1_CLIENT_KEY"],
        "ca_file": settings["D1_CA_FILE"],
    }


def leaves(command: click.Command, name: str = "") -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {name: command}
    context = click.Context(command)
    found: dict[str, click.Command] = {}
    for each in command.list_commands(context):
        below = command.get_command(context, each)
        assert below is not None
        found |= leaves(below, f"{name} {each}".strip())
    return found


def test_every_command_that_takes_settings_takes_the_file() -> None:
    """But those of the trail that read their arguments alone."""
    for name, command in leaves(cli).items():
        flags = {flag for parameter in command.params for flag in parameter.opts}
        variables = {str(p.envvar) for p in command.params if getattr(p, "envvar", None)}
        assert ("--config" in flags) is bool(variables), name


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_token_and_a_check_by_the_file_alone(
    run: Run, write: Write, lines: dict[str, str], sandbox: Sandbox, *, by_variable: bool
) -> None:
    file = write(**lines)
    for command in (["token", "--json"], ["check", "--json", "--require", "access-token"]):
        if by_variable:
            assert run(*command, D1_CONFIG=file).status == 0
        else:
            assert run(*command, "--config", file).status == 0
    assert sandbox.counters.tokens_issued == 2


def test_variables_win_over_the_file_and_flags_over_both(
    run: Run, write: Write, key_uri: str, other_uri: str
) -> None:
    unnamed = key_uri.partition("#")[0]
    file = write(key=[key_uri], kid="of-the-file")

    def kid(*flags: str, **variables: str) -> str:
        result = run("custody", "--json", "--config", file, *flags, **variables)
        assert result.status == 0, result.out
        return str(result.document["keys"][0]["kid"])

    assert kid() == kid("--key", unnamed) == "of-the-file"
    assert kid("--key", key_uri) == "bank-2026"
    # It is the name of the file's key, and of no other.
    assert kid("--key", other_uri) == kid(D1_SIGNER_KEY=other_uri) == "next-2027"
    assert kid(D1_SIGNER_KID="of-the-variable") == "of-the-variable"
    assert kid("--kid", "of-the-flag") == "of-the-flag"
    assert kid("--key", other_uri, "--kid", "next-2027") == "next-2027"


def test_the_kid_of_the_variable_is_that_of_the_files_key(
    run: Run, write: Write, key_uri: str, other_uri: str
) -> None:
    """Where no D1_SIGNER_KEY says which one it names."""
    variables = {"D1_CONFIG": write(key=[key_uri], kid="of-the-file"), "D1_SIGNER_KID": "variable"}

    def kid(*flags: str) -> str:
        result = run("public-key", "--json", *flags, **variables)
        assert result.status == 0, result.out
        (told,) = result.document["keys"]
        return "thumbprint" if told["kid"] == told["thumbprint"] else str(told["kid"])

    assert kid() == kid("--key", key_uri.partition("#")[0]) == "variable"
    assert kid("--key", key_uri) == "bank-2026"
    assert kid("--key", other_uri.partition("#")[0]) == "thumbprint"


def test_a_kid_in_a_file_without_a_key_is_that_of_the_key(
    run: Run, write: Write, key_uri: str
) -> None:
    variables = {"D1_CONFIG": write(kid="of-the-file"), "D1_SIGNER_KEY": key_uri.partition("#")[0]}
    assert run("public-key", "--json", **variables).document["keys"][0]["kid"] == "of-the-file"
    variables["D1_SIGNER_KEY"] = key_uri
    assert run("public-key", "--json", **variables).document["keys"][0]["kid"] == "bank-2026"


def test_options_are_joined_name_by_name(
    run: Run, write: Write, tmp_path: Path, key_uri: str
) -> None:
    file = write('[option]\npassphrase_source = "env:OF_THE_FILE"\n', key=key_uri.partition("#")[0])
    flags = ["custody", "--json", "--config", file]
    assert "variable that is not set" in run(*flags).document["message"]
    flag = f"passphrase_source=file:{tmp_path}/absent"
    assert f"{tmp_path}/absent" in run(*flags, "--option", flag).document["message"]
    variable = f"passphrase_source=file:{tmp_path}/other"
    shown = run(*flags, D1_SIGNER_OPTIONS=variable).document["message"]
    assert f"{tmp_path}/other" in shown
    refused = run(*flags, "--option", "bogus=1")
    assert refused.status == 2
    assert "bogus" in refused.out
    wrong = write("[option]\nbogus = 1\n", key=key_uri)
    assert "bogus" in run("custody", "--json", "--config", wrong).out


def test_options_of_the_file_are_those_of_its_keys_and_of_no_other(
    run: Run, write: Write, tmp_path: Path, other_uri: str
) -> None:
    """Not even in the same run: the PIN would be counted as a wrong one in another HSM."""
    its_own = "pkcs11:token=bank;object=d1#bank-2026"
    pin = "[option]\nmodule_path = '/none/of-the-file.so'\npin_source = 'file:/none/pin'\n"
    variables = {"D1_CONFIG": write(pin, key=its_own)}
    made = ["generate-key", "--key", (tmp_path / "new.pem").as_uri()]
    assert run(*made, **variables).status == 0
    assert run("csr", "--key", other_uri, "--subject", "CN=bank").status == 0
    for command in ("public-key", "check", "custody"):
        result = run(command, "--key", other_uri)
        assert result.status == 0, result.err

    def read_of(*uris: str) -> list[str]:
        flags = [flag for uri in uris for flag in ("--key", uri)]
        shown = run("public-key", "--format", "jwks", *flags).err
        return re.findall(r"pkcs11:\S*?token=(\w+)\S*: .*of-the-file\.so", shown)

    foreign = its_own.replace("bank", "foreign")
    assert read_of(other_uri, its_own, foreign) == ["bank"]
    # It is the same key without its kid, or with another one.
    assert read_of(other_uri, its_own.partition("#")[0]) == ["bank"]


def test_options_of_the_file_are_held_against_all_of_its_keys(
    run: Run, write: Write, key_uri: str
) -> None:
    both = ["pkcs11:token=bank;object=d1", key_uri]
    file = write("[option]\nmodule_path = '/none/module.so'\n", key=both)
    assert run("custody", "--config", file, "--key", key_uri).status == 0
    file = write("[option]\nbogus = 1\n", key=both)
    refused = run("custody", "--config", file, "--key", key_uri)
    assert refused.status == 2
    assert "option bogus" in refused.err
    assert "[option]" in refused.err


def test_audience_of_the_file_and_its_absence_by_flag(
    run: Run, write: Write, lines: dict[str, str]
) -> None:
    def claims(file: str, *flags: str) -> dict[str, object]:
        found: dict[str, object] = run("assertion", "--json", "--config", file, *flags).document[
            "claims"
        ]
        return found

    named = write(**lines, audience="https://d1.example")
    assert claims(named)["aud"] == "https://d1.example"
    assert "aud" not in claims(named, "--no-audience")
    assert claims(named, "--audience", "other")["aud"] == "other"
    none = write(**lines, no_audience=True)
    assert "aud" not in claims(none)
    assert claims(none, "--audience", "other")["aud"] == "other"
    assert run("assertion", "--audience", "a", "--no-audience", "--config", none).status == 2


def test_limits_of_the_file_are_those_of_the_token(
    run: Run, write: Write, lines: dict[str, str], sandbox: Sandbox
) -> None:
    sandbox.misbehave("status-503")
    result = run("token", "--json", "--config", write("[limits]\ntotal = 0.5\n", **lines))
    assert result.document["code"] in {"token_unavailable", "token_timeout"}
    assert sandbox.counters.token_requests <= 3


def test_the_custody_policy_of_the_file(
    run: Run, write: Write, lines: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(**lines, custody_policy=["hardware"])
    result = run("token", "--json", "--config", file)
    assert (result.status, result.document["code"]) == (1, "custody")
    result = run("custody", "--json", "--config", file)
    assert (result.status, result.document["policy"]) == (1, ["hardware"])
    monkeypatch.setenv("D1_CUSTODY_POLICY", "generated-in-place")
    result = run("custody", "--json", "--config", file)
    assert result.document["policy"] == ["generated-in-place"]


def test_the_trail_of_the_file(
    run: Run, write: Write, lines: dict[str, str], tmp_path: Path
) -> None:
    trail = tmp_path / "trail"
    file = write(**lines, audit_trail=str(trail), audit_origin="bank.example/d1")
    assert run("token", "--json", "--config", file).status == 0
    assert list(trail.rglob("*.jsonl"))


def test_a_csr_is_not_made_of_the_key_that_signs(
    run: Run, write: Write, key_uri: str, other_uri: str
) -> None:
    file = write(key=key_uri)
    assert run("csr", "--config", file, "--subject", "CN=x").status == 2
    refused = run("csr", "--config", file, "--key", key_uri, "--subject", "CN=x")
    assert refused.status == 2
    assert "signs assertions" in refused.err
    assert run("csr", "--config", file, "--key", other_uri, "--subject", "CN=bank").status == 0


def test_what_the_file_names_is_never_overwritten(
    run: Run, write: Write, lines: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "store-key").write_text("0" * 64)
    file = write(f'[store]\nkey_source = "file:{tmp_path}/store-key"\n', **lines)
    for target in (file, str(tmp_path / "store-key"), lines["ca_file"], lines["client_key"]):
        before = Path(target).read_bytes()
        result = run("public-key", "--config", file, "-o", target, "--force")
        assert result.status == 2, result.err
        assert Path(target).read_bytes() == before


def test_a_file_that_cannot_be_used(run: Run, write: Write, tmp_path: Path) -> None:
    wrong: tuple[tuple[Callable[[], str], str], ...] = (
        (lambda: str(tmp_path / "absent"), "No such file"),
        (lambda: write(enviroment="staging"), "Did you mean environment?"),
        (lambda: write(pin=PIN), "No secret stands in settings"),
    )
    for make, told in wrong:
        file = make()
        result = run("token", "--config", file)
        assert result.status == 2
        assert told in result.err
        as_json = run("token", "--json", D1_CONFIG=file)
        assert as_json.document["code"] == "configuration"


def test_wrong_values_are_told_by_their_name_in_the_file(run: Run, write: Write) -> None:
    assert "key is no text" in run("token", "--config", write(key=5)).err
    assert run("token", "--help", "--config", "/absent").status == 0

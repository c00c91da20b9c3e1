# SPDX-License-Identifier: Apache-2.0
"""``--option``, ``D1_SIGNER_OPTIONS`` and ``--timeout``: what reaches a backend, and what not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from d1_signer import generate_key
from d1_signer.es256 import PublicKey
from d1_signer.signing import registry
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.cli import open_ended, recording
from tests.cli.conftest import Run
from tests.leaks.known import known

SECRET = known("7391-never-shown")
PASSPHRASE = known("a passphrase, never shown")
ALL = {
    "token": [],
    "assertion": ["--issuer-id", "x", "--no-audience"],
    "public-key": [],
    "csr": ["--subject", "CN=bank"],
    "check": [],
    "custody": [],
}


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, module in (("recording", recording), ("open-ended", open_ended)):
        monkeypatch.setitem(registry.BUILT_IN, scheme, module.__name__)
        module.given.clear()


@pytest.fixture
def uri(key_uri: str) -> str:
    return key_uri.replace("file", "recording")


@pytest.fixture
def pem_file(run: Run, key_uri: str, tmp_path: Path) -> Path:
    path = tmp_path / "a key's pem"
    run("public-key", "--key", key_uri, "-o", str(path))
    return path


def given() -> dict[str, Any]:
    return recording.given[-1]


@pytest.mark.parametrize("command", ALL)
def test_every_command_that_opens_a_key_takes_them(
    run: Run, settings: dict[str, str], uri: str, command: str
) -> None:
    del settings["D1_SIGNER_KEY"]
    arguments = [command, *ALL[command], "--key", uri, "--option", "count=7"]
    result = run(*arguments, "--option", "flag=true", "--timeout", "2.5", **settings)
    assert result.status == 0, result.err
    assert (given()["count"], given()["flag"], given()["timeout"]) == (7, True, 2.5)
    assert run(*arguments[:-2], D1_SIGNER_OPTIONS="count=8").status == 0
    assert given()["count"] == 8


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("flag=true", True),
        ("flag=false", False),
        ("count=12", 12),
        ("count=0x80000001", 0x80000001),
        ("seconds=2", 2.0),
        ("seconds=.5", 0.5),
        ("text=a=b c", "a=b c"),
        ("text=", ""),
        ("text=5", "5"),
        ("anything=5", "5"),
        ("source=file:/none", "file:/none"),
        ("source=env:NAME", "env:NAME"),
        ("source=prompt", "prompt"),
    ],
)
def test_a_text_is_read_by_the_type_that_the_backend_declares(
    run: Run, uri: str, option: str, value: object
) -> None:
    assert run("custody", "--key", uri, "--option", option).status == 0
    found = given()[option.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "option",
    [
        "flag=yes",
        "flag=True",
        "flag=1",
        "flag=",
        "count=",
        "count=1.5",
        "count=0x",
        "count=1_0",
        "count= 1",
        "count=" + "9" * 5000,
        "seconds=soon",
        "seconds=nan",
        "seconds=1e999",
        f"source={SECRET}",
        f"source=FILE:{SECRET}",
        f"client={SECRET}",
        f"hook={SECRET}",
        f"key={SECRET}",
        "key=/none/such.pem",
        "key=/dev/zero",
        "key=",
        "key=a\0b",
    ],
)
@pytest.mark.parametrize("json", [False, True])
def test_a_value_that_cannot_be_read_is_wrong_usage(
    run: Run, uri: str, option: str, *, json: bool
) -> None:
    result = run("check", *["--json"] * json, "--key", uri, "--option", option)
    assert result.status == 2
    told = result.document["message"] if json else result.err
    assert f"The option {option.partition('=')[0]}" in told
    assert SECRET not in result.out + result.err
    assert recording.given == []


def test_a_public_key_comes_from_its_file(run: Run, uri: str, pem_file: Path) -> None:
    for text in (str(pem_file), pem_file.as_uri(), f"file:{pem_file}"):
        assert run("custody", "--key", uri, "--option", f"key={text}").status == 0
        assert given()["key"] == PublicKey.from_pem(pem_file.read_text())


def test_a_file_without_a_public_key_on_p256(run: Run, uri: str, tmp_path: Path) -> None:
    path = tmp_path / "no-key.pem"
    path.write_text("no key")
    result = run("check", "--key", uri, "--option", f"key={path}")
    assert result.status == 2
    assert f"names a file without a public key on P-256 in PEM: {path}." in result.err
    os.mkfifo(tmp_path / "fifo")
    fifo = run("check", "--key", uri, "--option", f"key={tmp_path / 'fifo'}")
    assert (fifo.status, "names no regular file" in fifo.err) == (2, True)


def test_what_the_backend_refuses_is_wrong_usage_of_check_too(run: Run, uri: str) -> None:
    d1 = ("--issuer-id", "bank", "--environment", "http://127.0.0.1:1")
    for command, more in (("check", ()), ("custody", ()), ("token", d1)):
        result = run(command, "--json", "--key", uri, "--option", "count=-1", *more)
        assert (result.status, result.document["message"]) == (2, "count is below 0.")


@pytest.mark.parametrize("command", [*ALL, "generate-key", "sandbox"])
@pytest.mark.parametrize(
    "option", ["no_such_option=1", "max-count=1", "kid=1", "uri=1", "verify=false"]
)
def test_an_option_that_no_backend_knows_is_wrong_usage(
    run: Run, uri: str, command: str, option: str
) -> None:
    arguments = [command, *ALL.get(command, []), "--json", "--key", uri]
    for result in (
        run(*arguments, "--option", option),
        run(*arguments, D1_SIGNER_OPTIONS=option),
    ):
        assert (result.status, result.document["code"]) == (2, "usage")
        assert option.partition("=")[0] in result.document["message"]
        assert "count" in result.document["message"]
    assert recording.given == []


def test_of_several_keys_one_must_know_it(run: Run, uri: str, key_uri: str, other_uri: str) -> None:
    known = run("custody", "--key", other_uri, "--key", uri, "--option", "count=3")
    assert (known.status, given()["count"]) == (0, 3)
    unknown = run("custody", "--key", key_uri, "--key", other_uri, "--option", "count=3")
    assert unknown.status == 2
    assert "Known: attestation, attestation_anchors, passphrase_source." in unknown.err


def test_the_key_uri_is_what_is_wrong_where_nothing_serves_it(run: Run) -> None:
    result = run("custody", "--json", "--key", "nothing:x", "--option", "count=3")
    assert (result.status, result.document["code"]) == (2, "key_uri")


def test_a_backend_that_takes_any_option_gets_text(run: Run, key_uri: str) -> None:
    uri = key_uri.replace("file", "open-ended")
    arguments = ("custody", "--key", uri, "--timeout", "3")
    assert run(*arguments, "--option", "first=true", "--option", "second=x").status == 0
    assert open_ended.given == [{"first": "true", "second": "x"}]
    assert run(*arguments, "--option", "kid=other").status == 2  # open_signer's own


def test_the_variable_is_split_as_a_shell_does(run: Run, uri: str) -> None:
    options = (
        """text="configdir='sql:/etc/nss' flags=readOnly" count=2\n 'source=env:A B' flag=true"""
    )
    assert run("custody", "--key", uri, D1_SIGNER_OPTIONS=options).status == 0
    assert given()["text"] == "configdir='sql:/etc/nss' flags=readOnly"
    assert (given()["count"], given()["source"], given()["flag"]) == (2, "env:A B", True)
    assert run("custody", "--key", uri, D1_SIGNER_OPTIONS="").status == 0
    for broken in (f"text='{SECRET}", f"{SECRET}", f"text=a {SECRET}", "flag=true flag=true"):
        for more in ((), ("--option", "count=1")):
            result = run("custody", "--key", uri, *more, D1_SIGNER_OPTIONS=broken)
            assert result.status == 2
            assert "D1_SIGNER_OPTIONS" in result.err
            assert SECRET not in result.err


def test_a_flag_wins_over_the_variable_name_by_name(run: Run, uri: str) -> None:
    variable = {"D1_SIGNER_OPTIONS": "count=1 text=kept"}
    assert run("custody", "--key", uri, "--option", "count=2", **variable).status == 0
    assert (given()["count"], given()["text"]) == (2, "kept")
    twice = run("custody", "--key", uri, "--option", "count=2", "--option", "count=3")
    assert (twice.status, "twice" in twice.err) == (2, True)


def test_a_time_limit_is_for_those_that_have_one(run: Run, uri: str, key_uri: str) -> None:
    assert run("custody", "--key", key_uri, "--key", uri, "--timeout", "4").status == 0
    assert given()["timeout"] == 4.0
    assert run("custody", "--key", uri, "--timeout", "4", D1_SIGNER_OPTIONS="timeout=5").status == 0
    assert given()["timeout"] == 4.0
    run("custody", "--key", uri, "--timeout", "6", "--option", "timeout=5")
    assert given()["timeout"] == 6.0
    for wrong in ("0", "-1", "nan", "inf", "86401", "soon"):
        assert run("custody", "--key", uri, f"--timeout={wrong}").status == 2


def test_making_a_key_takes_what_matters_to_it(run: Run, tmp_path: Path) -> None:
    uri = (tmp_path / "made.pem").as_uri().replace("file", "recording")
    options = ("--option", "label=bank", "--option", "flag=true", "--option", "count=5")
    assert run("generate-key", "--key", uri, *options, "--timeout", "9").status == 0
    assert recording.given == [{"flag": True, "label": "bank"}]
    # What matters to the making alone may stand in the variable for the other commands too.
    assert run("custody", "--key", uri, D1_SIGNER_OPTIONS="label=bank count=5").status == 0
    assert given()["count"] == 5
    assert run("generate-key", "--key", uri, "--option", "flag=no").status == 2


def test_a_passphrase_by_its_source(run: Run, tmp_path: Path) -> None:
    uri = (tmp_path / "key.pem").as_uri()
    variables = {"PASSPHRASE": PASSPHRASE, "D1_SIGNER_OPTIONS": "passphrase_source=env:PASSPHRASE"}
    assert run("generate-key", "--key", uri, **variables).status == 0
    assert b"ENCRYPTED" in Path(tmp_path / "key.pem").read_bytes()
    for command, arguments in ALL.items():
        if command != "token":
            assert run(command, *arguments, "--key", uri).status == 0
    mistaken = run("check", "--key", uri, "--option", f"passphrase_source={PASSPHRASE}")
    assert mistaken.status == 2
    assert PASSPHRASE not in mistaken.out + mistaken.err


@pytest.mark.parametrize(
    "option",
    [
        SECRET,
        f"{SECRET}=",
        f"={SECRET}",
        "c2VjcmV0cGFzc3dvcmQ=",
        f"text=http://user:{SECRET}@proxy.example:3128",
        f"text=https://{SECRET}@vault.example",
        f"pin={SECRET}",
    ],
)
def test_a_secret_is_not_repeated(run: Run, uri: str, option: str) -> None:
    for arguments in (("--json",), ("-vv",)):
        result = run("check", *arguments, "--key", uri, "--option", option)
        assert result.status == 2
        assert SECRET not in result.out + result.err
        assert "c2Vj" not in result.out + result.err


def test_a_key_itself_is_not_taken(run: Run, uri: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    generate_key(path.as_uri())
    pem = path.read_text()
    body = "".join(pem.splitlines()[1:-1])
    for value in (pem, body, json.dumps({"kty": "EC", "d": SECRET})):
        for result in (
            run("custody", "--key", uri, "--option", f"text={value}"),
            run("custody", "--key", uri, "--option", f"key={value}"),
            run("custody", "--key", uri, D1_SIGNER_OPTIONS=f"text='{value}'"),
        ):
            assert result.status == 2
            assert "holds a key itself" in result.err
            assert body[:40] not in result.err
            assert SECRET not in result.err


@pytest.mark.parametrize("scheme", sorted(registry.BUILT_IN))
def test_every_option_of_our_backends_has_a_text_form(scheme: str) -> None:
    """But for the client objects: an option of a type that is not known here would be refused."""
    from d1_signer.signing import options

    for name in ("open_backend", "generate_key"):
        function = options._function(f"{scheme}:x", name)
        assert function is not None
        for option in registry.option_names(function):
            parameter = options._parameter(function, option)
            assert parameter is not None
            kind = options._type_of(function, parameter)
            readable = options.reader_for(kind) is not None
            assert readable is (option != "client"), f"{scheme}: {name}({option})"


def test_the_time_limit_holds_for_a_client_key_in_a_signer_too(
    run: Run, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    sign_digest = Signer.sign_digest

    def signing(self: Signer, digest: bytes, **options: Any) -> bytes:
        if options["use"] and options["use"].purpose == "tls-client-handshake":
            limits.append(options["timeout"])
        return sign_digest(self, digest, **options)

    monkeypatch.setattr(Signer, "sign_digest", signing)
    key = Path(settings["D1_CLIENT_KEY"]).as_uri().replace("file", "recording")
    settings["D1_CLIENT_KEY"] = key
    assert run("token", "--timeout", "9", **settings).status == 0
    assert (given()["timeout"], given()["count"], limits) == (9.0, 1, [9.0])
    limits.clear()
    assert run("token", **settings).status == 0
    assert (given()["timeout"], limits) == (10.0, [2.0])


def test_the_custody_policy_holds_for_a_client_key_in_a_signer_too(
    run: Run, settings: dict[str, str], softhsm_token: SoftHsmToken
) -> None:
    """The signing key meets it; a client key that is a file is no signer, and is not looked at."""
    assert run("generate-key", "--key", softhsm_token.uri).status == 0
    settings |= {"D1_SIGNER_KEY": softhsm_token.uri, "D1_CUSTODY_POLICY": "never-exportable"}
    signed = run("assertion", "--no-audience", **settings)
    assert signed.status == 0, signed.err
    settings["D1_CLIENT_KEY"] = (
        Path(settings["D1_CLIENT_KEY"]).as_uri().replace("file", "recording")
    )
    refused = run("token", "--json", **settings)
    assert (refused.status, refused.document["code"]) == (1, "custody")
    assert "never exportable" in refused.document["message"]


@pytest.mark.parametrize("arguments", [("custody", "--timeout"), ("sandbox", "--token-lifetime")])
def test_what_is_no_number_of_seconds(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "abc")
    assert result.status == 2
    assert "'abc' is not a number of seconds." in result.err

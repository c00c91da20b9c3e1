# SPDX-License-Identifier: Apache-2.0
"""Flags and the D1_* variables, and what no setting may be: a secret on the command line."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import click
import pytest

from d1_signer.cli._settings import Keys, with_keys
from d1_signer.sandbox import Sandbox
from tests.cli.conftest import ISSUER, Run
from tests.leaks.known import known
from tests.servers.connect_proxy import ConnectProxy

PIN = known("7391-never-shown")
MISTAKE = "a secret where its source should stand"


def test_every_variable_has_its_flag(
    run: Run, sandbox: Sandbox, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_variables = run("token", "--json", **settings)
    assert by_variables.status == 0
    flags = []
    for name, value in settings.items():
        monkeypatch.delenv(name)
        flag = name.removeprefix("D1_SIGNER_").removeprefix("D1_").lower().replace("_", "-")
        flags += [f"--{flag}", value]
    assert run("token", "--json", *flags).status == 0
    assert sandbox.counters.tokens_issued == 2


@pytest.mark.parametrize(
    ("command", "variable", "code"),
    [
        ("token", "D1_SIGNER_KEY", "configuration"),
        ("token", "D1_ISSUER_ID", "configuration"),
        ("token", "D1_ENVIRONMENT", "configuration"),
        ("assertion", "D1_ISSUER_ID", "configuration"),
        ("assertion", "D1_ENVIRONMENT", "configuration"),
        ("custody", "D1_SIGNER_KEY", "configuration"),
        ("generate-key", "D1_SIGNER_KEY", "configuration"),
        ("check", "D1_SIGNER_KEY", "configuration"),
    ],
)
def test_a_missing_setting_is_named(
    run: Run, settings: dict[str, str], command: str, variable: str, code: str
) -> None:
    del settings[variable]
    result = run(command, "--json", **settings)
    assert result.status == 2
    assert result.document["code"] == code
    assert variable in result.document["hint"]


def test_flags_win_over_variables(run: Run, key_uri: str, other_uri: str) -> None:
    result = run("custody", "--json", "--key", other_uri, "--kid", "flag", D1_SIGNER_KEY=key_uri)
    assert [report["kid"] for report in result.document["keys"]] == ["flag"]


def test_kid_variable_wins_over_the_fragment(run: Run, key_uri: str) -> None:
    result = run("custody", "--json", D1_SIGNER_KEY=key_uri, D1_SIGNER_KID="variable")
    assert result.document["keys"][0]["kid"] == "variable"


@pytest.mark.parametrize("command", ["custody", "token", "check", "sandbox"])
def test_one_kid_for_several_keys_is_refused(
    run: Run, key_uri: str, other_uri: str, command: str
) -> None:
    both = f"{key_uri} {other_uri}"
    result = run(command, D1_SIGNER_KEY=both, D1_SIGNER_KID="one")
    assert result.status == 2
    assert "One kid is given for several keys." in result.err


@pytest.mark.parametrize(
    "uri",
    [
        f"pkcs11:token=t;object=o?pin-value={PIN}",
        f"pkcs11:token=t;object=o?module-name=softhsm&PIN-VALUE={PIN}",
        f"pkcs11:token=t;object=o?pin%2Dvalue={PIN}",
        f"pkcs11:token=t;object=o;pin-value={PIN}",
    ],
)
@pytest.mark.parametrize("json", [False, True])
def test_a_pin_on_the_command_line_is_refused(run: Run, uri: str, *, json: bool) -> None:
    result = run("custody", "--key", uri, *["--json"] * json)
    assert result.status == 2
    assert PIN not in result.out + result.err
    told = result.document["message"] if json else result.err
    assert "pin-source=file:PATH" in told
    assert "in the shell's history now: change it." in told


def test_what_is_no_key_uri_is_shown_one(run: Run) -> None:
    result = run("custody", "--key", "bank")
    assert result.status == 2
    assert "--key is not a key URI: it has no scheme." in result.err
    assert "For example pkcs11:token=bank;object=d1\n" in result.err


@pytest.mark.parametrize(
    "proxy",
    [
        f"http://me:{PIN}@proxy.example:3128",
        f"me:{PIN}@127.0.0.1:9",
        f"//me:{PIN}@127.0.0.1:9",
        f"http://me:{PIN}%40127.0.0.1:9",
        f"http://127.0.0.1:9/{PIN}@x",
    ],
)
@pytest.mark.parametrize("json", [False, True])
def test_a_proxy_password_on_the_command_line_is_refused(
    run: Run, settings: dict[str, str], proxy: str, *, json: bool
) -> None:
    result = run("token", "--proxy", proxy, *["--json"] * json, **settings)
    assert result.status == 2
    assert PIN not in result.out + result.err
    told = result.document["message"] if json else result.err
    assert ("user name or password" if "@" in proxy else "http://HOST:PORT") in told


@pytest.mark.parametrize(
    "proxy",
    [
        "",
        "http://[",
        "http://[::1",
        "http://",
        "proxy.example:3128",
        "http://proxy.example",
        "http://proxy.example:port",
        "http://proxy.example:0",
        "http://proxy.example:65536",
        "http://proxy.example:\u0663128",
        "http://proxy.example:3128/path",
        "http://proxy.example:3128\n",
        "https://proxy.example:3128",
        "socks5h://proxy.example:1080",
    ],
)
def test_a_proxy_that_cannot_be_one_is_a_usage_error(
    run: Run, settings: dict[str, str], proxy: str
) -> None:
    result = run("token", "--proxy", proxy, "--json", **settings)
    assert result.status == 2
    assert result.document["code"] == "usage"
    assert "http://HOST:PORT" in result.document["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_proxy_is_asked(run: Run, settings: dict[str, str], host: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://{host}:{closed.getsockname()[1]}"
        result = run("check", "--proxy", proxy, "--json", **settings)
    assert result.document["stopped_at"]["step"] == "endpoint"
    assert (
        f"the proxy {proxy[7:]} failed: connection refused"
        in result.document["stopped_at"]["detail"]
    )


@pytest.mark.parametrize("command", ["token", "check"])
def test_a_proxy_is_given_its_credentials(
    run: Run, settings: dict[str, str], tmp_path: Path, command: str
) -> None:
    file = tmp_path / "proxy"
    file.touch(mode=0o600)
    with ConnectProxy(credentials=f"d1:{PIN}").running() as proxy:
        flags = ["--proxy", proxy.url, "--proxy-credentials-source", f"file:{file}"]
        file.write_text(f"d1:{PIN}\n")
        assert run(command, "--json", *flags, **settings).status == 0
        used = len(proxy.sent)
        assert used == (2 if command == "check" else 1)
        file.write_text("d1:another-pass-word\n")
        result = run(command, "--json", *flags, **settings)
        assert result.status == 1
        assert "it answers HTTP 407, it refuses the credentials" in result.out
        assert len(proxy.sent) == used + 1


@pytest.mark.parametrize("command", ["token", "check"])
@pytest.mark.parametrize(
    ("proxy", "source", "words"),
    [
        ("http://127.0.0.1:1", f"d1:{PIN}", "is not understood"),
        ("http://127.0.0.1:1", "env:D1_NOT_SET", "variable that is not set"),
        ("http://127.0.0.1:1", "env:D1_NO_COLON", "not of the form USER:PASSWORD"),
        (None, "env:D1_NO_COLON", "and no proxy"),
    ],
)
def test_credentials_that_cannot_be_used_are_told(
    run: Run, settings: dict[str, str], command: str, proxy: str | None, source: str, words: str
) -> None:
    flags = ["--proxy", proxy] if proxy else []
    result = run(
        *(command, "--json", *flags, "--proxy-credentials-source", source),
        **settings,
        D1_NO_COLON=PIN,
    )
    assert result.status != 0
    assert words in result.out
    assert PIN not in result.out + result.err


def encrypted_client(sandbox: Sandbox) -> dict[str, str]:
    certificate, key = sandbox.issue_client_certificate(passphrase=PIN.encode())
    return {"D1_CLIENT_CERT": str(certificate), "D1_CLIENT_KEY": str(key)}


def test_passphrase_of_the_client_key(
    run: Run, sandbox: Sandbox, settings: dict[str, str], tmp_path: Path
) -> None:
    settings |= encrypted_client(sandbox) | {"CLIENT_PASSPHRASE": PIN}
    file = tmp_path / "passphrase"
    file.touch(mode=0o600)
    file.write_text(PIN)
    flag = "--client-key-passphrase-source"
    assert run("token", flag, "env:CLIENT_PASSPHRASE", **settings).status == 0
    assert run("token", flag, f"file:{file}", "-vv").status == 0
    as_uri = Path(settings["D1_CLIENT_KEY"]).as_uri()  # the file that it names, no signer
    assert run("token", "--client-key", as_uri, flag, f"file:{file}").status == 0
    without = run("token", "--json")
    assert without.status == 2
    assert without.document["code"] == "secret_source"
    wrong = run("token", flag, "env:CLIENT_PASSPHRASE", "--json", CLIENT_PASSPHRASE="another one")
    assert wrong.document["code"] == "secret_source"
    unknown = run("token", flag, MISTAKE)
    assert unknown.status == 2
    assert MISTAKE not in unknown.out + unknown.err


@pytest.mark.parametrize("variable", ["D1_CLIENT_CERT", "D1_CLIENT_KEY"])
def test_half_a_client_certificate(run: Run, settings: dict[str, str], variable: str) -> None:
    del settings[variable]
    result = run("token", "--json", **settings)
    assert result.status == 2
    assert variable in result.document["hint"]


def test_thales_own_environments_need_a_client_certificate(run: Run, key_uri: str) -> None:
    settings = {"D1_SIGNER_KEY": key_uri, "D1_ISSUER_ID": ISSUER, "D1_ENVIRONMENT": "production"}
    result = run("token", "--json", **settings)
    assert result.status == 2
    assert "--proxy-adds-certificate" in result.document["hint"]


def test_audience_and_no_audience_exclude_each_other(run: Run) -> None:
    result = run("assertion", "--audience", "x", "--no-audience", "--json")
    assert result.status == 2
    assert result.document["code"] == "usage"


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        ("token", "KEY KID OPTIONS ISSUER_ID ENVIRONMENT CLIENT_CERT CLIENT_KEY CA_FILE"),
        ("check", "KEY KID OPTIONS ISSUER_ID ENVIRONMENT CLIENT_CERT CLIENT_KEY CA_FILE"),
        ("assertion", "KEY KID OPTIONS ISSUER_ID ENVIRONMENT"),
        ("public-key", "KEY KID OPTIONS"),
        ("generate-key", "KEY KID OPTIONS"),
        ("custody", "KEY KID OPTIONS"),
        ("sandbox", "KEY KID OPTIONS ISSUER_ID"),
        ("csr", "OPTIONS"),
    ],
)
def test_help_names_the_variables(run: Run, command: str, variables: str) -> None:
    result = run(command, "--help")
    assert result.status == 0
    words = result.out.split()
    for name in variables.split():
        full = f"D1_SIGNER_{name}" if name in {"KEY", "KID", "OPTIONS"} else f"D1_{name}"
        assert any(full in word for word in words)


def test_the_kid_of_the_variable_is_not_that_of_another_key(
    run: Run, key_uri: str, other_uri: str
) -> None:
    key, other = key_uri.partition("#")[0], other_uri.partition("#")[0]

    def kids(*arguments: str, of: str = key) -> list[str]:
        result = run(
            "public-key", "--json", *arguments, D1_SIGNER_KEY=of, D1_SIGNER_KID="bank-2026"
        )
        return [told["kid"] for told in result.document["keys"]]

    for same in ((), ("--key", key)):
        assert kids(*same) == kids(*same, of=f"{key}#old") == ["bank-2026"]
    assert kids("--key", other, of="") == ["bank-2026"]
    # A flag wins over a variable, also where the flag has the name in the URI.
    for of in (key, f"{key}#next", other, ""):
        assert kids("--key", f"{key}#next", of=of) == ["next"]
        assert kids("--key", f"{key}#next", "--kid", "given", of=of) == ["given"]
    thumbprint = run("public-key", "--json", "--key", other).document["keys"][0]["thumbprint"]
    assert kids("--key", other) == [thumbprint]
    assert kids("--key", f"{other}#next") == ["next"]
    assert kids("--key", other, "--kid", "given") == ["given"]
    both = ("--key", f"{other}#next", "--key", f"{key}#first")
    assert kids(*both, "--format", "jwks") == ["next", "first"]
    assert kids(*both, "--format", "jwks", of="") == ["next", "first"]


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ("hashivault://d1?version=1", "hashivault://d1?version=2"),
        ("hashivault://d1?mount=a", "hashivault://d1?mount=b"),
        ("hashivault://d1?namespace=a", "hashivault://d1"),
        ("pkcs11:token=t;object=o?module-path=/a.so", "pkcs11:token=t;object=o?module-path=/b.so"),
        ("pkcs11:token=t;object=o", "pkcs11:token=t;object=o;type=private?module-name=b"),
        ("file:///a?passphrase-source=env:A", "file:///a?passphrase-source=env:B"),
    ],
)
def test_a_key_that_its_query_tells_apart_is_another_one(
    monkeypatch: pytest.MonkeyPatch, named: str, given: str
) -> None:
    found: list[Keys] = []

    @click.command
    @with_keys
    def command(keys: Keys) -> None:
        found.append(keys)

    monkeypatch.setenv("D1_SIGNER_KID", "bank-2026")
    monkeypatch.setenv("D1_SIGNER_KEY", named)
    for uri in (named, given):
        command.main(["--key", uri], standalone_mode=False)
    assert [keys.kid for keys in found] == ["bank-2026", None]


@pytest.mark.parametrize("command", ["public-key", "csr"])
def test_a_path_that_cannot_be_one_is_no_defect(run: Run, command: str) -> None:
    flags = ["--subject", "CN=bank"] if command == "csr" else []
    variables = {"D1_SIGNER_KEY": "file:///a", "D1_SIGNER_KID": "k"}
    for uri in ("file:///a%00b", "FILE:/a%00b#k"):
        result = run(command, *flags, "--key", uri, **variables)
        assert (result.status, result.out) == (2, "")
        assert "defect" not in result.err
    variables["D1_SIGNER_KEY"] = "file:///a%00b"
    assert "defect" not in run(command, *flags, "--key", "file:///a", **variables).err


@pytest.mark.parametrize("command", ["token", "public-key"])
def test_where_every_key_is_away_each_is_named(
    run: Run, settings: dict[str, str], tmp_path: Path, command: str
) -> None:
    uris = [f"{(tmp_path / name).as_uri()}#{name}" for name in ("first", "second")]
    del settings["D1_SIGNER_KEY"]
    options = [] if command == "token" else ["--format", "jwks"]
    named = [word for uri in uris for word in ("--key", uri)]
    result = run(command, *options, *named, **settings)
    assert (result.status, result.out) == (2, "")
    warnings = re.findall(r"^Warning: a key is passed over: (\S+): ", result.err, re.MULTILINE)
    assert warnings == [uri.partition("#")[0] for uri in uris]
    alone = run(command, *options, "--key", uris[0], **settings)
    assert (alone.status, "passed over" in alone.err) == (2, False)

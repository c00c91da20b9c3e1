# SPDX-License-Identifier: Apache-2.0
"""A file of settings, read: its names, what is refused, and that no value of it is repeated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from d1_signer import ConfigurationError, Limits, secret
from d1_signer.token.settings import Settings
from d1_signer.token.values import FIELDS, StoreSettings
from tests.leaks.known import known

SECRET = known("7391-never-shown")

EVERYTHING = """
environment = "staging"
issuer_id = "bank"
key = ["pkcs11:token=bank;object=d1?pin-source=file:/etc/d1/pin#bank-2027", "file:///etc/d1/k.pem"]
timeout = 5
client_cert = "/etc/d1/client.pem"
client_key = "pkcs11:token=bank;object=tls?pin-source=env:PIN"
client_key_passphrase_source = "file:/etc/d1/passphrase"
ca_file = "/etc/d1/ca.pem"
proxy = "http://proxy.bank.example:3128"
proxy_credentials_source = "env:PROXY_CREDENTIALS"
proxy_adds_certificate = false
audience = "https://d1.example/token"
request_format = "json"
custody_policy = ["hardware", "non-exportable"]
audit_trail = "/var/lib/d1/trail"
audit_origin = "bank.example/d1"
audit_key = "awskms:alias/audit"

[option]
user_type = 0x80000001
protected_authentication_path = true
max_sessions = 4
module_path = "/usr/lib/libvendor.so"

[limits]
total = 20
sign = 2.5

[store]
url = "rediss://redis.bank.example:6379/0"
username = "d1"
password_source = "file:/etc/d1/redis"
key_source = "file:/etc/d1/store-key"
ca_file = "/etc/d1/redis-ca.pem"
cluster = true
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "d1.toml"
    file.write_text(text)
    return file


def read(tmp_path: Path, text: str) -> Settings:
    return Settings.read(written(tmp_path, text))


def refused(tmp_path: Path, text: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "d1.toml") in caught.value.message
    assert SECRET not in f"{caught.value!r} {caught.value} {caught.value.details}"
    return caught.value


def test_everything_that_can_stand_there(tmp_path: Path) -> None:
    settings = read(tmp_path, EVERYTHING)
    assert settings.key[0].endswith("#bank-2027")
    assert len(settings.key) == 2
    assert settings.option == {
        "user_type": "2147483649",
        "protected_authentication_path": "true",
        "max_sessions": "4",
        "module_path": "/usr/lib/libvendor.so",
    }
    assert settings.limits == Limits(total=20, sign=2.5)
    assert settings.custody_policy == "hardware,non-exportable"
    assert settings.store == StoreSettings(
        url="rediss://redis.bank.example:6379/0",
        username="d1",
        password_source="file:/etc/d1/redis",
        key_source="file:/etc/d1/store-key",
        ca_file="/etc/d1/redis-ca.pem",
        cluster=True,
    )
    settings.require_complete()
    given = {each.name for each in dataclasses.fields(Settings) if each.name in EVERYTHING}
    assert given == {*FIELDS} - {"kid", "no_audience"} | {"audience"}


def test_names_and_fields_are_the_same() -> None:
    assert {each.name for each in dataclasses.fields(Settings)} - {"digest"} == {*FIELDS}


def test_one_key_may_stand_alone(tmp_path: Path) -> None:
    settings = read(tmp_path, 'key = "file:///k.pem"\nkid = "bank"\n')
    assert (settings.key, settings.kid) == (("file:///k.pem",), "bank")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('key = "file:///k"', 'key = ["file:///k"]'),
        ("timeout = 20", "timeout = 2e1"),
        ("", "proxy_adds_certificate = false"),
        ("", 'request_format = "form"\nlimits = {}\noption = {}'),
        ("limits = { total = 30 }", "limits = { sign = 10.0 }"),
        ('custody_policy = "hardware,fips"', 'custody_policy = ["hardware", "fips"]'),
        ("[option]\nuser_type = 16", '[option]\nuser_type = "16"'),
        ('[store]\nkey_source = "env:K"', '[store]\ncluster = false\nkey_source = "env:K"'),
    ],
)
def test_settings_that_are_equal_have_one_digest(tmp_path: Path, one: str, other: str) -> None:
    first, second = read(tmp_path, one), read(tmp_path, other)
    assert first == second
    assert first.digest == second.digest


def test_the_digest_is_of_what_it_says_and_not_of_how_it_is_written(tmp_path: Path) -> None:
    one = read(tmp_path, 'issuer_id = "bank"\nenvironment = "staging"\n[limits]\ntotal = 5\n')
    same = read(
        tmp_path, "# why\nenvironment=\"staging\"\nlimits = { total = 5 }\nissuer_id = 'bank'\n"
    )
    other = read(tmp_path, 'issuer_id = "bank"\nenvironment = "staging"\n[limits]\ntotal = 6\n')
    assert one.digest == same.digest != other.digest
    assert one == same != other
    assert len(one.digest) == 16


@pytest.mark.parametrize(
    ("text", "told", "near"),
    [
        ('enviroment = "staging"', "enviroment", "Did you mean environment?"),
        ('issuerid = "bank"', "issuerid", "Did you mean issuer_id?"),
        ('issuer-id = "bank"', "issuer-id", "Did you mean issuer_id?"),
        ('D1_CLIENT_CERT = "/c.pem"', "D1_CLIENT_CERT", "Did you mean client_cert?"),
        ('D1_SIGNER_KEY = "file:///k"', "D1_SIGNER_KEY", "Did you mean key?"),
        ("total = 5", "total", "Did you mean limits.total?"),
        ("[limit]\ntotal = 5", "limit", "Did you mean limits?"),
        ("[limits]\ntotl = 5", "totl in [limits]", "Did you mean limits.total?"),
        ('[store]\nkey_sourc = "file:/k"', "key_sourc", "Did you mean store.key_source?"),
        ("zzzz = 5", "zzzz", "Known here: environment, issuer_id, key"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    tmp_path: Path, text: str, told: str, near: str
) -> None:
    error = refused(tmp_path, text)
    assert f"the name {told}".lower() in error.message.lower()
    assert error.hint.startswith(near)


@pytest.mark.parametrize(
    "text",
    [
        f'pin = "{SECRET}"',
        f'password = "{SECRET}"',
        f'store_key = "{SECRET}"',
        f'client_key_passphrase = "{SECRET}"',
        f'[store]\npassword = "{SECRET}"',
        f'client_key_passphrase_source = "{SECRET}"',
        f'proxy_credentials_source = "user:{SECRET}"',
        f'[store]\nkey_source = "{SECRET}"',
        f'[store]\nkey_source = "file:/k"\npassword_source = "{SECRET}"',
        f'[option]\npin_source = "{SECRET}"',
        f'key = "pkcs11:token=t;object=o?pin-value={SECRET}"',
        f'key = ["file:///k", "pkcs11:token=t;object=o?pin%2Dvalue={SECRET}"]',
        f'client_key = "pkcs11:token=t?pin-value={SECRET}"',
        f'audit_key = "pkcs11:token=t?pin-value={SECRET}"',
        f'key = "hashivault://user:{SECRET}@host/transit/k"',
    ],
)
def test_a_secret_is_refused_and_what_to_do_instead_is_told(tmp_path: Path, text: str) -> None:
    assert "No secret stands in settings" in refused(tmp_path, text).hint


@pytest.mark.parametrize(
    "text",
    [
        f'proxy = "http://user:{SECRET}@proxy:3128"',
        f'[store]\nkey_source = "file:/k"\nurl = "rediss://:{SECRET}@redis:6379"',
        f'[store]\nkey_source = "file:/k"\nurl = "redis://redis?password={SECRET}"',
        f'environment = "https://user:{SECRET}@d1.example/authz"',
        f'key = "{SECRET}"',
        f'request_format = "{SECRET}"',
        f'custody_policy = "{SECRET}"',
        f'"{SECRET}" = 1',
        f"{SECRET} = 1",
        f"environment = {SECRET}",
        f'environment = "staging"\n{SECRET}',
        f'key = "-----BEGIN PRIVATE KEY-----{SECRET}"',
        f'client_key = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg{SECRET}"',
        f'[option]\n"{SECRET}" = {{}}',
        f'[option]\nproxy = "http://user:{SECRET}@proxy:3128"',
        f'audience = "https://user:{SECRET}@d1.example"',
        f'[store]\nkey_source = "file:/k"\nurl = "redis://:{SECRET}%40redis:6379"',
        f'[store]\nkey_source = "file:/k"\nurl = "redis://redis:{SECRET}"',
        f'[store]\nkey_source = "file:/k"\nurl = "unix://{SECRET}"',
        f'limits = "{SECRET}"',
        f'store = "{SECRET}"',
        f'issuer_id = ["{SECRET}"]',
        f'[limits]\ntotal = "{SECRET}"',
    ],
)
def test_what_cannot_be_used_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("environment = 5", "environment is no text"),
        ('environment = ""', "environment is empty"),
        ('environment = "nowhere"', "neither a name of Thales' environments nor a URL"),
        ("key = []", "key is empty"),
        ("key = [5]", "key is no text"),
        ('proxy_adds_certificate = "yes"', "proxy_adds_certificate is neither true nor false"),
        ("timeout = true", "timeout is no number of seconds"),
        ("timeout = -1", "timeout is not a number of seconds"),
        ("timeout = nan", "timeout is not a number of seconds"),
        ("[limits]\ntotal = 0", "limits.total is not a number of seconds"),
        ("limits = 5", "limits is no table"),
        ("option = 5", "option is no table"),
        ("[option]\nuser_type = inf", "option.user_type is no text"),
        pytest.param(f"[option]\nuser_type = {'9' * 4000}", "user_type is no text", id="digits"),
        pytest.param(f"timeout = 0x{'f' * 6000}", "timeout is not a number", id="hexadecimal"),
        ("[store]\nusername = 'd1'", "store has no key_source"),
        ('request_format = "xml"', "request_format is neither form nor json"),
        ("issuer_id = 2026-11-27", "issuer_id is no text"),
        ('issuer_id = "a\\u0000b"', "characters that cannot be printed"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, told: str) -> None:
    assert told in refused(tmp_path, text).message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('issuer_id = "b"\nkey = "file:///k"', "environment is missing"),
        ('environment = "staging"\nkey = "file:///k"', "issuer_id is missing"),
        ('environment = "staging"\nissuer_id = "b"', "key is missing"),
        ('client_cert = "/c"', "client_cert is given without client_key"),
        ('client_key = "/c"', "client_key is given without client_cert"),
        ('audit_key = "file:///k"', "audit_key is given without audit_trail"),
        ('audience = "a"\nno_audience = true', "no_audience too"),
    ],
)
def test_what_makes_no_fetcher(tmp_path: Path, text: str, told: str) -> None:
    whole = 'environment = "staging"\nissuer_id = "b"\nkey = "file:///k"\n'
    text = text if "missing" in told else whole + text
    with pytest.raises(ConfigurationError, match=told):
        read(tmp_path, text).require_complete()
    # Which file it is must be told: a service may have one for each environment.
    with pytest.raises(ConfigurationError, match=rf"d1\.toml cannot be used: .*{told}"):
        Settings.read(tmp_path / "d1.toml", complete=True)


def test_a_file_that_is_no_toml_tells_where(tmp_path: Path) -> None:
    assert "at line 2, column 13" in refused(tmp_path, 'kid = "a"\nissuer_id = bank\n').message
    refused(tmp_path, "a = " + "[" * 5000)
    (tmp_path / "d1.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="no TOML: it is not UTF-8"):
        Settings.read(tmp_path / "d1.toml")


@pytest.mark.parametrize(
    "text",
    [
        'kid = "a"\nkid = "b"\n',
        "[limits]\ntotal = 1\ntotal = 2\n",
        "[limits]\ntotal = 1\n[limits]\nsign = 2\n",
        'option.a = "x"\noption.a = "y"\n',
        "limits = {total = 1, total = 2}\n",
        "limits = {total = 1}\n[limits]\nsign = 1\n",
    ],
)
def test_what_stands_there_twice_is_told(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, text)
    assert "no TOML: at line " in error.message
    assert "twice" in error.hint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        Settings.read(tmp_path / "absent.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Settings.read(tmp_path)
    file = written(tmp_path, 'issuer_id = "bank"')
    file.chmod(0o646)
    with pytest.raises(ConfigurationError, match="can be written by every user") as caught:
        Settings.read(file)
    assert "chmod o-w" in caught.value.hint


def test_the_file_that_is_read_is_the_one_that_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may be in its place before it is looked at."""
    file = written(tmp_path, 'issuer_id = "bank"')
    file.chmod(0o646)
    opened = secret._open_without_blocking

    def and_replaced(path: str, flags: int) -> int:
        descriptor = opened(path, flags)
        fresh = file.with_suffix(".new")
        fresh.touch(0o600)
        fresh.replace(file)
        return descriptor

    monkeypatch.setattr(secret, "_open_without_blocking", and_replaced)
    with pytest.raises(ConfigurationError, match="can be written by every user"):
        Settings.read(file)
    assert Settings.read(file).issuer_id is None


def test_a_bom_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "d1.toml"
    file.write_bytes(b"\xef\xbb\xbf" + b'issuer_id = "bank"\r\n')
    assert Settings.read(file).issuer_id == "bank"

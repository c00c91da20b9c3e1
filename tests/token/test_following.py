# SPDX-License-Identifier: Apache-2.0
"""`TokenFetcher.from_settings`: what it opens, and what a change of the file does in place."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from d1_signer import (
    ConfigurationError,
    CustodyError,
    D1SignerError,
    FetcherClosedError,
    SecretSourceError,
    Signer,
    SignerClosedError,
    SignerUnavailable,
    TokenFetcher,
    TokenRefusedError,
    generate_key,
    open_signer,
)
from d1_signer.audit.trail import AuditTrail
from d1_signer.events import Event
from d1_signer.sandbox import Sandbox
from d1_signer.sandbox.softhsm import SoftHsmToken
from d1_signer.token import fetcher as fetcher_module, following, opening
from d1_signer.token.settings import Settings
from tests.servers.connect_proxy import ConnectProxy
from tests.servers.redis_server import RedisServer
from tests.token.conftest import ISSUER
from tests.token.following import SettingsFile
from tests.token.test_fetcher import until

Opener = Callable[..., TokenFetcher]


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(fetcher_module, "LOOK_INTERVAL", 0.0)


@pytest.fixture
def file(tmp_path: Path, sandbox: Sandbox) -> SettingsFile:
    file = SettingsFile(tmp_path, sandbox)
    file.keys("one")
    file.write()
    return file


@pytest.fixture
def opened(file: SettingsFile) -> Iterator[Opener]:
    with ExitStack() as stack:

        def opened(**options: Any) -> TokenFetcher:
            return stack.enter_context(TokenFetcher.from_settings(file.path, **options))

        yield opened


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def forget(fetcher: TokenFetcher) -> None:
    """Have the next call ask D1, with nothing of what `invalidate` concludes."""
    with fetcher._lock:
        fetcher._held, fetcher._not_before = None, float("-inf")
        fetcher._fresh = (float("-inf"), float("-inf"), fetcher._fresh[2])


def renewed(fetcher: TokenFetcher, sandbox: Sandbox) -> str:
    """The kid under which a new token is asked for."""
    forget(fetcher)
    fetcher.token()
    return str(sandbox.requests[-1].header["kid"])


def digest(fetcher: TokenFetcher) -> str:
    settings = fetcher.status().settings
    assert settings is not None
    return settings.digest


def messages(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [text for text in caplog.messages if text.startswith(event)]


# -- what is opened -------------------------------------------------------------------------------


def test_a_token_and_a_session_by_a_file_alone(opened: Opener, sandbox: Sandbox) -> None:
    events: list[Event] = []
    fetcher = opened(observers=[events.append])
    with fetcher.session() as session:
        assert session.get(f"{fetcher.environment.banking_url}/ping").status_code == 200
    assert sandbox.requests[-1].header["kid"] == "one"
    names = {type(event).__name__ for event in events}
    assert {"SignEvent", "RequestEvent", "RenewalEvent", "CertificateEvent"} <= names


def test_what_stands_in_the_file_is_used(file: SettingsFile, opened: Opener) -> None:
    file.lines |= {"audience": '"https://elsewhere.example"', "request_format": '"json"'}
    file.tables = "[limits]\ntotal = 7\nsign = 3\nconnect = 2\nread = 4\n"
    file.write()
    fetcher = opened()
    # The sandbox wants its own audience: it has seen ours.
    with pytest.raises(TokenRefusedError):
        fetcher.token(timeout=5)
    exchange = file.sandbox.exchanges[-1]
    assert json.loads(exchange.request_body)["grant_type"].endswith("jwt-bearer")
    assert (fetcher._limits.total, fetcher._limits.read) == (7, 4)


def test_the_status_tells_file_digest_and_certificate(opened: Opener, file: SettingsFile) -> None:
    status = opened().status()
    assert status.settings is not None
    assert status.settings.file == str(file.path)
    assert status.settings.digest == Settings.read(file.path).digest
    assert (status.settings.error, status.settings.keys_away) == (None, ())
    assert status.client_certificate is not None
    assert len(status.client_certificate.fingerprint) == 64
    assert json.loads(json.dumps(status.to_dict()))["settings"]["digest"]


def test_closing_it_closes_what_it_opened(opened: Opener) -> None:
    fetcher = opened()
    (member,) = fetcher._signers._members
    fetcher.close()
    with pytest.raises(SignerClosedError):
        member.signer(None).sign(b"x")
    with pytest.raises(FetcherClosedError):
        fetcher.reload()


NOT_OPENED: dict[str, Callable[[SettingsFile], None]] = {
    "a client key that is not there": lambda f: f.lines.update(client_key='"/absent.key"'),
    "two keys under one kid": lambda f: f.lines.update(
        key=f'["{f.key("one")}", "{f.key("two").replace("#two", "#one")}"]'
    ),
    "an authority that is none": lambda f: f.lines.update(ca_file='"/etc/hostname"'),
}


@pytest.mark.parametrize("change", NOT_OPENED.values(), ids=NOT_OPENED)
def test_what_cannot_be_opened_leaves_nothing_open(
    file: SettingsFile, monkeypatch: pytest.MonkeyPatch, change: Callable[[SettingsFile], None]
) -> None:
    trail = file.path.parent / "trail"
    file.lines["audit_trail"] = f'"{trail}"'
    change(file)
    file.write()
    go, made = hold_up(monkeypatch)
    go.set()
    with pytest.raises(D1SignerError):
        TokenFetcher.from_settings(file.path)
    assert made
    for signer in made:
        with pytest.raises(SignerClosedError):
            signer.sign(b"x")
    assert trail.is_dir()
    held = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [link for link in held if str(trail) in os.path.realpath(link)] == []
    with AuditTrail(trail, origin="bank.example/d1"):
        pass


@pytest.mark.usefixtures("looks_at_once")
def test_a_key_of_several_may_be_away_and_joins_when_it_is_back(
    file: SettingsFile,
    opened: Opener,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "_TRY_AGAIN", 0.0)
    file.keys("first", "one")
    file.write()
    first = file.path.parent / "first.pem"
    first.rename(first.with_suffix(".away"))
    fetcher = opened()
    assert renewed(fetcher, file.sandbox) == "one"
    status = fetcher.status().settings
    assert status is not None
    assert status.keys_away == (first.as_uri(),)
    assert messages(caplog, "settings.key_away")
    first.with_suffix(".away").rename(first)
    until(lambda: fetcher.status().settings.keys_away == (), seconds=20)  # type: ignore[union-attr]
    assert renewed(fetcher, file.sandbox) == "first"


def test_a_key_that_is_refused_at_the_start_is_not_away(
    file: SettingsFile,
    opened: Opener,
    softhsm_token: SoftHsmToken,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else it would be tried for ever, under a warning that speaks of a device."""
    generate_key(softhsm_token.uri)
    uri, pin = f"{softhsm_token.uri}#hsm", softhsm_token.pin_file

    def refused(*uris: str, policy: str | None = None) -> D1SignerError:
        file.lines["key"] = json.dumps(uris)
        file.lines.pop("custody_policy", None)
        if policy is not None:
            file.lines["custody_policy"] = f'"{policy}"'
        file.write()
        with pytest.raises(D1SignerError) as caught:
            opened()
        return caught.value

    here = file.key("one")
    assert refused(uri, here, policy="non-exportable").code == "custody"
    assert refused(here, softhsm_token.key_uri("d2") + "#d2").code == "key_not_found"
    pin.write_text("wrong-pin")
    assert refused(here, uri).code == "login"
    assert messages(caplog, "settings.key_away") == []
    pin.unlink()  # that is trouble of this one device, and another try may find it
    file.lines["key"] = json.dumps([here, uri])
    file.write()
    assert opened()._signers.kids == ("one",)
    (told,) = messages(caplog, "settings.key_away")
    assert " code=secret_source " in told


def test_a_key_that_is_away_may_be_so_after_a_change_that_was_refused(
    file: SettingsFile, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    file.keys("away", "one")
    file.write()
    good = file.text()
    away = file.path.parent / "away.pem"
    away.unlink()
    fetcher = opened()
    good_certificate = file.lines["client_cert"]
    for key in (file.key("one"), file.key("two")):
        file.lines |= {"key": f'"{key}"', "client_cert": '"/absent.pem"'}
        file.write()
        with pytest.raises(D1SignerError, match=r"/absent\.pem"):
            fetcher.reload()
        assert fetcher.status().settings.keys_away == (away.as_uri(),)  # type: ignore[union-attr]
        file.write(good)
        fetcher.reload()
    assert fetcher.status().settings.error is None  # type: ignore[union-attr]
    # Nor is a key away, where the change that names it so is not taken.
    file.lines |= {"key": f'"{file.key("one")}"', "client_cert": good_certificate}
    file.write()
    fetcher.reload()
    file.write(good)
    with pytest.raises(D1SignerError, match=r"/away\.pem"):
        fetcher.reload()
    assert len(messages(caplog, "settings.key_away")) == 1


def test_options_limits_of_a_key_and_custody_are_held(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.lines["custody_policy"] = '"hardware"'
    file.write()
    with pytest.raises(CustodyError, match="hardware"):
        opened()
    # What the environment says wins: an auditor's demand is not loosened by a file.
    monkeypatch.setenv("D1_CUSTODY_POLICY", "non-exportable")
    with pytest.raises(CustodyError) as caught:
        opened()
    assert caught.value.details["policy"] == "non-exportable"
    monkeypatch.delenv("D1_CUSTODY_POLICY")
    del file.lines["custody_policy"]
    file.tables = "[option]\nslot_id = 4\n"
    file.write()
    with pytest.raises(ConfigurationError, match="No backend of these keys knows the option"):
        opened()


def test_the_trail_records_what_its_keys_do(file: SettingsFile, opened: Opener) -> None:
    trail = file.path.parent / "trail"
    file.lines |= {"audit_trail": f'"{trail}"', "audit_origin": '"bank.example/d1"'}
    file.write()
    opened().token()
    records = "".join(each.read_text() for each in trail.rglob("*.jsonl"))
    assert '"jti"' in records


def test_a_store_by_url_and_one_in_code(file: SettingsFile, opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    key = tmp_path / "store-key"
    key.touch(0o600)
    key.write_text(os.urandom(32).hex())
    with RedisServer(tmp_path / "redis") as server:
        file.tables = f'[store]\nurl = "{server.url}"\nkey_source = "file:{key}"\n'
        file.write()
        opened().token()
        opened().token()
        assert file.sandbox.counters.token_requests == 1
    file.tables = f'[store]\nkey_source = "file:{key}"\n'
    file.write()
    with pytest.raises(ConfigurationError, match="no store"):
        opened()
    key.write_text("too short")
    file.tables = f'[store]\nurl = "unix:///s"\nkey_source = "file:{key}"\n'
    file.write()
    with pytest.raises(SecretSourceError, match="64 hexadecimal"):
        opened()


# -- what a change does ---------------------------------------------------------------------------


@pytest.mark.usefixtures("looks_at_once")
@pytest.mark.parametrize("how", ["token", "token_now", "status", "reload", "session"])
def test_keys_and_their_order_change_in_place(
    file: SettingsFile, opened: Opener, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "d1_signer.settings")
    fetcher = opened()
    session = fetcher.session()
    url = f"{fetcher.environment.banking_url}/ping"
    ways: dict[str, Callable[[], object]] = {
        "token": fetcher.token,
        "token_now": fetcher.token_now,
        "status": fetcher.status,
        "reload": fetcher.reload,
        "session": lambda: session.get(url),
    }
    assert renewed(fetcher, file.sandbox) == "one"
    for kids in (("one", "two"), ("two", "one"), ("two",), ("three", "two")):
        file.keys(*kids)
        file.write()

        def changed(kids: tuple[str, ...] = kids) -> bool:
            ways[how]()
            return fetcher._signers.kids == kids

        until(changed, seconds=20)
        assert renewed(fetcher, file.sandbox) == kids[0]
    session.close()
    until(lambda: len(messages(caplog, "settings.taken")) == 5, seconds=20)
    changed_names = [line.partition("changed=")[2] for line in messages(caplog, "settings.taken")]
    assert changed_names == ["", *["key"] * 4]
    told = messages(caplog, "settings.taken")
    assert all(f"issuer={ISSUER} " in line for line in told)
    shown = [found[1] for line in told if (found := re.search(r"kids=(\S+)", line))]
    assert shown == ["one", "one,two", "two,one", "two", "three,two"]


def test_a_signer_that_stays_keeps_its_state_and_one_that_goes_is_closed_later(
    file: SettingsFile, opened: Opener
) -> None:
    file.keys("one", "two")
    file.tables = "[limits]\ntotal = 0.2\n"
    file.write()
    fetcher = opened()
    one, two = fetcher._signers._members
    file.keys("two")
    file.write()
    fetcher.reload()
    assert fetcher._signers._members == (two,)
    one.signer(None).sign(b"a renewal that began before")
    threading.Event().wait(0.25)
    fetcher._following._next_look = 0.0  # type: ignore[union-attr]
    fetcher.status()
    with pytest.raises(SignerClosedError):
        one.signer(None).sign(b"x")


def test_a_key_that_is_put_back_is_not_opened_twice(file: SettingsFile, opened: Opener) -> None:
    file.keys("one", "two")
    file.write()
    fetcher = opened()
    one, two = (member.source for member in fetcher._signers._members)
    file.keys("two")
    file.write()
    fetcher.reload()
    file.keys("one", "two")
    file.certificate(file.sandbox.issue_client_certificate()[0], file.sandbox.client_key)
    file.write()
    with pytest.raises(ConfigurationError, match="does not belong"):
        fetcher.reload()
    assert [member.source for member in fetcher._signers._members] == [two]
    file.certificate(file.sandbox.client_certificate, file.sandbox.client_key)
    file.write()
    fetcher.reload()
    assert [member.source for member in fetcher._signers._members] == [one, two]
    # What is used again is not closed when those are that were left.
    fetcher._following._opening.close_left()  # type: ignore[union-attr]
    fetcher._signers.attempt(lambda signer: signer.sign(b"x"), without=frozenset({"two"}))
    assert fetcher._following._opening._left == []  # type: ignore[union-attr]


def test_certificate_limits_audience_and_format_change_in_place(
    file: SettingsFile, opened: Opener
) -> None:
    fetcher = opened()
    session = fetcher.session()
    url = f"{fetcher.environment.banking_url}/ping"
    assert session.get(url).status_code == 200
    before = fetcher.status()
    certificate, key = file.sandbox.issue_client_certificate()
    file.certificate(certificate, key)
    file.tables = "[limits]\ntotal = 9\nconnect = 3\nread = 6\n"
    file.lines["request_format"] = '"json"'
    file.write()
    fetcher.reload()
    after = fetcher.status()
    assert before.client_certificate != after.client_certificate
    assert before.settings.digest != after.settings.digest  # type: ignore[union-attr]
    # A session that was given out has the new certificate and limits, too.
    assert session.get(url).status_code == 200
    assert session.get_adapter(url).timeouts() == (3, 6)  # type: ignore[attr-defined]
    renewed(fetcher, file.sandbox)
    assert b'"grant_type"' in next(
        each.request_body for each in reversed(file.sandbox.exchanges) if "token" in each.path
    )
    file.lines["no_audience"] = "true"
    file.write()
    fetcher.reload()
    assert fetcher._renewal._profile.audience is None  # type: ignore[union-attr]
    session.close()


BROKEN = {
    "no TOML": 'environment = "stag',
    "half of it": 'environment = "staging"\n',
    "unknown name": "enviroment = 1\n",
    "empty": "",
}


@pytest.mark.usefixtures("looks_at_once")
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_keeps_the_last_good_with_one_warning(
    file: SettingsFile,
    opened: Opener,
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    caplog.set_level(logging.INFO, "d1_signer")
    fetcher = opened()
    good = digest(fetcher)
    file.write(text)
    until(lambda: fetcher.status().settings.error == "configuration", seconds=20)  # type: ignore[union-attr]
    for _ in range(3):
        assert renewed(fetcher, file.sandbox) == "one"
        with pytest.raises(ConfigurationError):
            fetcher.reload()
    (warning,) = messages(caplog, "settings.unusable")
    assert "code=configuration" in warning
    assert "The last good settings are used on." in warning
    assert digest(fetcher) == good
    assert fetcher.status().healthy
    file.keys("two")
    file.write()
    until(lambda: digest(fetcher) != good, seconds=20)
    assert fetcher.status().settings.error is None  # type: ignore[union-attr]
    assert renewed(fetcher, file.sandbox) == "two"


WRONG: dict[str, Callable[[SettingsFile], None]] = {
    "a key that is not there": lambda f: f.lines.update(key='"file:///absent.pem"'),
    "a second key that is not there": lambda f: f.lines.update(
        key=f'["{f.key("two")}", "file:///absent.pem"]'
    ),
    "two keys under one kid": lambda f: f.lines.update(
        key=f'["{f.key("two")}", "{f.key("three").replace("#three", "#two")}"]'
    ),
    "one key twice": lambda f: f.lines.update(key=f'["{f.key("two")}", "{f.key("two")}"]'),
    "a certificate that is not there": lambda f: f.lines.update(client_cert='"/absent.pem"'),
    "a certificate of another key": lambda f: f.lines.update(
        client_cert=f'"{f.sandbox.issue_client_certificate()[0]}"'
    ),
    "authorities that are none": lambda f: f.lines.update(ca_file='"/etc/hostname"'),
    "another environment": lambda f: f.lines.update(environment='"https://127.0.0.1:1/a"'),
    "another issuer": lambda f: f.lines.update(issuer_id='"other"'),
    "a proxy": lambda f: f.lines.update(proxy='"http://127.0.0.1:1"'),
    "an audience with a blank": lambda f: f.lines.update(audience='"https://d1.example "'),
    "a trail": lambda f: f.lines.update(audit_trail=f'"{f.path.parent / "trail"}"'),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_cannot_be_taken_is_taken_in_no_part(
    file: SettingsFile, opened: Opener, change: Callable[[SettingsFile], None]
) -> None:
    fetcher = opened()
    before, members = fetcher.status(), fetcher._signers._members
    file.keys("two", "one")
    file.tables = "[limits]\ntotal = 3\n"
    change(file)
    file.write()
    with pytest.raises(D1SignerError) as caught:
        fetcher.reload()
    after = fetcher.status()
    assert after.settings is not None
    assert after.settings.error == caught.value.code
    assert after.settings.digest == before.settings.digest  # type: ignore[union-attr]
    assert after.client_certificate == before.client_certificate
    assert fetcher._signers._members == members
    assert fetcher._limits.total == 30
    with fetcher.session() as session:
        assert session.get(f"{fetcher.environment.banking_url}/ping").status_code == 200
    assert renewed(fetcher, file.sandbox) == "one"


@pytest.mark.usefixtures("looks_at_once")
def test_a_file_that_goes_and_comes_back(
    file: SettingsFile,
    opened: Opener,
) -> None:
    fetcher = opened()
    file.path.rename(file.path.with_suffix(".away"))
    until(lambda: fetcher.status().settings.error is not None, seconds=20)  # type: ignore[union-attr]
    fetcher.token()
    file.path.with_suffix(".away").rename(file.path)
    until(lambda: fetcher.status().settings.error is None, seconds=20)  # type: ignore[union-attr]


@pytest.mark.usefixtures("looks_at_once")
def test_links_as_kubernetes_makes_them(
    file: SettingsFile,
    opened: Opener,
) -> None:
    folder = file.path.parent
    for kid in ("one", "two"):
        file.keys(kid)
        (folder / kid).mkdir()
        (folder / kid / "d1.toml").write_text(file.text())
    (folder / "..data").symlink_to("one")
    file.path.unlink()
    file.path.symlink_to("..data/d1.toml")
    fetcher = opened()
    assert renewed(fetcher, file.sandbox) == "one"
    (folder / "..new").symlink_to("two")
    (folder / "..new").replace(folder / "..data")
    until(lambda: fetcher.status().members[0].kid == "two", seconds=20)


@pytest.mark.usefixtures("looks_at_once")
def test_callers_never_wait_for_a_key_that_takes_long_to_open(
    file: SettingsFile,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetcher = opened()
    fetcher.token()
    go, real = threading.Event(), open_signer

    def slow(*args: Any, **options: Any) -> Any:
        assert go.wait(20)
        return real(*args, **options)

    file.keys("two")
    monkeypatch.setattr(opening, "open_signer", slow)
    file.write()
    until(
        lambda: fetcher.token().value != "" and "d1-signer-settings" in thread_names(), seconds=20
    )
    for _ in range(50):
        fetcher.token()
        fetcher.status()
    assert fetcher.status().members[0].kid == "one"
    go.set()
    until(lambda: fetcher.status().members[0].kid == "two", seconds=20)


def hold_up(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[Signer]]:
    """Have keys open only once the event is set; they are listed then."""
    go, real, made = threading.Event(), open_signer, list[Signer]()

    def slow(*args: Any, **options: Any) -> Signer:
        assert go.wait(40)
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(opening, "open_signer", slow)
    return go, made


def test_closing_while_a_key_is_being_opened_leaves_none_open(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_GRACE", 0.01)
    fetcher = opened()
    (before,) = fetcher._signers._members
    go, made = hold_up(monkeypatch)
    file.keys("two", "one")
    file.write()
    ended: list[D1SignerError] = []

    def reload() -> None:
        with pytest.raises(FetcherClosedError) as caught:
            fetcher.reload()
        ended.append(caught.value)

    thread = threading.Thread(target=reload)
    thread.start()
    until(fetcher._following._lock.locked, seconds=20)  # type: ignore[union-attr]
    fetcher.close()
    go.set()
    thread.join(20)
    assert len(ended) == 1
    assert made
    for signer in (*made, before.signer(None)):
        with pytest.raises(SignerClosedError):
            signer.sign(b"x")


def test_callers_never_wait_for_a_key_that_takes_long_to_close(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, closed = threading.Event(), list[str]()

    def hang(signer: Signer) -> None:
        assert go.wait(40)
        closed.append(signer.kid)
        raise SignerUnavailable("The device is away.")

    file.keys("two", "one")
    file.tables = "[limits]\ntotal = 0.01\n"
    file.write()
    fetcher = opened()
    file.key("three")
    file.keys("one")
    file.write()
    fetcher.reload()
    threading.Event().wait(0.02)
    monkeypatch.setattr(Signer, "close", hang)
    for _ in range(3):
        fetcher._following._next_look = 0.0  # type: ignore[union-attr]
        assert fetcher.status().members[0].kid == "one"
    # Nor does a device that hangs keep the next change away.
    file.keys("three", "one")
    file.write()
    fetcher.reload()
    assert fetcher.status().members[0].kid == "three"
    go.set()
    until(lambda: closed == ["two"], seconds=20)
    monkeypatch.undo()
    until(lambda: "d1-signer-closing" not in thread_names(), seconds=20)


def test_a_key_outlives_the_renewals_that_began_under_a_longer_limit(
    file: SettingsFile, opened: Opener
) -> None:
    file.keys("one", "two")
    file.tables = "[limits]\ntotal = 60\n"
    file.write()
    fetcher = opened()
    one = fetcher._signers._members[0]
    for kids, total in ((("one", "two"), 0.01), (("two",), 0.01)):
        file.keys(*kids)
        file.tables = f"[limits]\ntotal = {total}\n"
        file.write()
        fetcher.reload()
    threading.Event().wait(0.02)
    fetcher._following._next_look = 0.0  # type: ignore[union-attr]
    fetcher.status()
    assert "d1-signer-closing" not in thread_names()
    one.signer(None).sign(b"a renewal that began under the first limits")


@pytest.mark.usefixtures("looks_at_once")
def test_a_file_that_is_being_written_is_not_read_in_passing(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = opened()
    before = digest(fetcher)
    file.keys("two", "one")
    whole = file.text()
    monkeypatch.setattr(following, "_REST", 3600.0)
    file.path.write_text(whole.partition("client_cert")[0])  # valid, and without the rest
    for _ in range(5):
        fetcher.status()
        threading.Event().wait(0.02)
    assert "d1-signer-settings" not in thread_names()
    file.path.write_text(whole)
    monkeypatch.setattr(following, "_REST", 0.0)
    until(lambda: digest(fetcher) == Settings.read(file.path).digest != before, seconds=20)
    assert fetcher._following._error is None  # type: ignore[union-attr]


@pytest.mark.usefixtures("looks_at_once")
def test_a_change_that_the_file_system_does_not_tell_is_seen(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(path: Any) -> tuple[Any, ...]:  # both within one tick of its clock, of one length
        found = Path(path).stat()
        return found.st_dev, found.st_size, int(found.st_ctime) // 3600 * 10**9 * 3600

    def just_now(_: object) -> bool:
        return False

    def total() -> float:
        fetcher.status()
        return fetcher._limits.total

    file.tables = "[limits]\ntotal = 20\n"
    file.write()
    monkeypatch.setattr(following, "state_of", coarse)
    monkeypatch.setattr(following, "rests", just_now)
    fetcher = opened()
    file.tables = "[limits]\ntotal = 21\n"
    file.path.write_text(file.text())
    monkeypatch.setattr(following, "rests", lambda _: True)
    until(lambda: total() == 21, seconds=20)
    monkeypatch.setattr(following, "rests", just_now)
    fetcher.reload()
    file.tables = "[limits]\ntotal = 22\n"
    file.path.write_text(file.text())
    monkeypatch.setattr(following, "rests", lambda _: True)
    until(lambda: total() == 22, seconds=20)


@pytest.mark.parametrize(("seconds_ago", "rests"), [(0.0, False), (2.0, True), (-60.0, True)])
def test_when_a_file_rests(seconds_ago: float, *, rests: bool) -> None:
    """One of the future, after the clock was set, as well: else it would never be read."""
    changed_at = int((time.time() - seconds_ago) * 1e9)
    assert following.rests((1, 2, 3, changed_at, changed_at)) is rests
    assert following.rests(("FileNotFoundError",))


def test_the_file_is_found_where_the_process_goes_elsewhere(
    file: SettingsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.path.parent)
    with TokenFetcher.from_settings(file.path.name) as fetcher:
        monkeypatch.chdir("/")
        file.keys("two")
        file.write()
        fetcher.reload()
        assert fetcher.status().members[0].kid == "two"


def test_a_key_that_was_away_may_stay_so_and_any_other_must_be_there(
    file: SettingsFile, opened: Opener
) -> None:
    folder = file.path.parent

    def gone(kid: str) -> None:
        (folder / f"{kid}.pem").rename(folder / f"{kid}.away")

    for kid in ("a", "b", "c"):
        file.key(kid)
    gone("a")
    (folder / "a.pem").touch(0o600)  # for `keys`, which would make it
    file.keys("a", "b")
    (folder / "a.pem").unlink()
    file.write()
    fetcher = opened()

    def named(*kids: str) -> tuple[str, ...]:
        uris = [f'"{(folder / f"{kid}.pem").as_uri()}#{kid}"' for kid in kids]
        file.lines["key"] = f"[{', '.join(uris)}]"
        file.write()
        fetcher.reload()
        return fetcher._signers.kids

    assert named("b", "a") == ("b",)  # another order
    assert named("c", "a", "b") == ("c", "b")  # and a new key, which is there
    gone("b")
    # What is open is opened anew for another time limit, and must be there for that.
    file.lines["timeout"] = "7"
    with pytest.raises(D1SignerError, match=r"/b\.pem"):
        named("c", "a", "b")
    del file.lines["timeout"]
    with pytest.raises(D1SignerError, match=r"/d\.pem"):
        named("c", "a", "b", "d")
    assert named("b", "a", "c") == ("b", "c")


def test_a_policy_that_one_key_does_not_meet_is_refused_as_a_whole(
    file: SettingsFile, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.keys("one", "two")
    file.write()
    fetcher = opened()
    real = open_signer

    def judged(uri: str, **options: Any) -> Signer:
        if options["custody_policy"] is not None and uri.endswith("#one"):
            raise CustodyError("It is in a file.")
        return real(uri, **{**options, "custody_policy": None})

    monkeypatch.setattr(opening, "open_signer", judged)
    file.lines["custody_policy"] = '"hardware"'
    file.write()
    with pytest.raises(CustodyError):
        fetcher.reload()
    assert fetcher._signers.kids == ("one", "two")
    assert fetcher.status().settings.keys_away == ()  # type: ignore[union-attr]


@pytest.mark.usefixtures("looks_at_once")
def test_calls_of_many_threads_while_the_file_changes_all_the_time(
    file: SettingsFile,
    opened: Opener,
) -> None:
    fetcher = opened()
    url = f"{fetcher.environment.banking_url}/ping"
    over, failed = threading.Event(), []

    def work() -> None:
        with fetcher.session() as session:
            while not over.is_set():
                try:
                    assert session.get(url, timeout=20).status_code == 200
                    forget(fetcher)
                except BaseException as error:  # noqa: BLE001 (told below)
                    failed.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(6):
        file.keys(f"k{number}")
        file.certificate(*file.sandbox.issue_client_certificate())
        file.tables = f"[limits]\ntotal = {20 + number}\n"
        file.write()
        until(
            lambda number=number: fetcher.status().members[0].kid == f"k{number}",  # type: ignore[misc]
            seconds=30,
        )
    over.set()
    for thread in threads:
        thread.join(30)
    assert failed == []


# -- signals and forks ----------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys, time
from d1_signer import TokenFetcher

fetcher = TokenFetcher.from_settings(sys.argv[1])
fetcher.reload_on(signal.SIGHUP)
print("ready", flush=True)
for line in sys.stdin:
    # The main thread alone takes signals, and only between two lines of Python.
    until = time.monotonic() + 30
    while fetcher._signers.kids != (line.strip(),) and time.monotonic() < until:
        time.sleep(0.01)
    print(*fetcher._signers.kids, flush=True)
"""


def test_a_signal_is_enough_for_a_process_that_nobody_calls(file: SettingsFile) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, str(file.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for kid in ("two", "three"):
            file.keys(kid)
            file.write()
            process.send_signal(signal.SIGHUP)
            print(kid, file=process.stdin, flush=True)
            assert process.stdout.readline() == f"{kid}\n"
        file.write("broken")
        process.send_signal(signal.SIGHUP)
        print("three", file=process.stdin, flush=True)
        assert process.stdout.readline() == "three\n"
        process.stdin.close()
        assert process.wait(30) == 0


NOT_FOLLOWED = """
import signal, sys, threading
from d1_signer import D1SignerError, TokenFetcher

fetcher = TokenFetcher.from_settings(sys.argv[1])

def told(number):
    try:
        fetcher.reload_on(number)
    except D1SignerError as error:
        print(error.code, "main thread" in error.hint, error.__cause__, error.message)

thread = threading.Thread(target=told, args=(signal.SIGHUP,))
thread.start()
thread.join()
for number in (signal.SIGKILL, 0, -1, 4711, 2**80, "SIGHUP", None, 1.5):
    told(number)

def refuses(thread):
    raise RuntimeError("can't start new thread")

print(signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)

def threads():
    return [each.name for each in threading.enumerate() if "reload" in each.name]

print(threads())
start, threading.Thread.start = threading.Thread.start, refuses  # as at the limit of threads
try:
    fetcher.reload_on(signal.SIGHUP)
except D1SignerError as error:
    print(error.code, error.retryable)
threading.Thread.start = start
fetcher.reload_on(signal.SIGHUP)
print(threads())
"""


def test_what_cannot_be_followed_is_our_error_and_changes_nothing(file: SettingsFile) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", NOT_FOLLOWED, str(file.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    *told, handler, threads, unstarted, again = ran.stdout.splitlines()
    assert len(told) == 9
    assert unstarted == "token True"
    assert again == "['d1-signer-reload']"
    for line in told:
        assert line.startswith("invalid_input True None The signal cannot be followed: "), line
    assert (handler, threads) == ("True", "[]")


WOKEN = """
import os, signal, sys, time
from d1_signer import TokenFetcher

one, two = (TokenFetcher.from_settings(sys.argv[1]) for _ in "12")
others = []
signal.signal(signal.SIGHUP, lambda number, frame: others.append((number, frame is None)))
one.reload_on(signal.SIGHUP)
two.reload_on(signal.SIGHUP)

def woken(kid):
    os.kill(os.getpid(), signal.SIGHUP)
    until = time.monotonic() + 30
    while {one._signers.kids, two._signers.kids} != {(kid,)} and time.monotonic() < until:
        time.sleep(0.01)
    return {one._signers.kids, two._signers.kids} == {(kid,)}

child = os.fork()
if child == 0:
    os.rename(sys.argv[2], sys.argv[1])
    os._exit(0 if woken("two") else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), woken("two"), others, flush=True)
one.close()
os._exit(0)
"""


def test_a_signal_reaches_all_fetchers_children_of_a_fork_and_the_handler_before(
    file: SettingsFile,
) -> None:
    file.keys("two")
    other = file.path.with_suffix(".two")
    other.write_text(file.text())
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WOKEN, str(file.path), str(other)],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert ran.stdout.strip() == f"0 True [({signal.SIGHUP:d}, False)]", ran.stdout + ran.stderr


def test_a_file_that_is_put_back_is_told_with_no_change(
    file: SettingsFile, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "d1_signer.settings")
    fetcher = opened()
    file.keys("two", "one")
    file.write()
    fetcher.reload()
    file.write("broken")
    with pytest.raises(ConfigurationError):
        fetcher.reload()
    file.write()
    fetcher.reload()
    lines = [line.partition(" changed=")[2] for line in messages(caplog, "settings.taken")]
    assert lines == ["", "key", "none"]


TOLD = """
import logging, os, signal, sys, threading, time
from d1_signer import TokenFetcher

class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

lines, done = [], threading.Semaphore(0)
logging.getLogger("d1_signer.settings").addHandler(Lines())
fetcher = TokenFetcher.from_settings(sys.argv[1])
fetcher.reload_on(signal.SIGHUP)
reload = fetcher._tls.reload

def counted():
    try:
        reload()
    finally:
        done.release()

fetcher._tls.reload = counted  # with which each reload ends

def signalled():
    os.kill(os.getpid(), signal.SIGHUP)
    assert done.acquire(timeout=30)

os.rename(sys.argv[2], sys.argv[2] + ".away")
signalled()
end = time.monotonic() + 30
while not lines and time.monotonic() < end:
    time.sleep(0.01)
os.rename(sys.argv[2] + ".away", sys.argv[2])
with open(sys.argv[1], "w") as file:
    file.write("broken")
for _ in range(3):
    signalled()
print(*(line.partition(" message=")[0] for line in lines), sep="\\n")
"""


def test_a_signal_tells_what_the_file_does_not_tell_and_nothing_twice(file: SettingsFile) -> None:
    certificate, key = file.sandbox.issue_client_certificate()
    file.certificate(certificate, key)
    file.write()
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TOLD, str(file.path), str(certificate)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    failed, unusable = ran.stdout.splitlines()
    assert unusable == f"settings.unusable file={file.path} code=configuration"
    assert failed == "settings.reload_failed code=secret_source"


LET_GO = """
import gc, os, signal, sys, threading, time, weakref
from d1_signer import TokenFetcher

before = []
signal.signal(signal.SIGHUP, lambda number, frame: before.append(number))

def threads():
    return sum(each.name == "d1-signer-reload" for each in threading.enumerate())

def until(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return condition()

def followed(closed):
    fetcher = TokenFetcher.from_settings(sys.argv[1])
    fetcher.reload_on(signal.SIGHUP)
    fetcher.reload_on(signal.SIGHUP)
    if closed:
        fetcher.close()
    return fetcher

three = [followed(closed=False) for _ in range(3)]
print(threads(), end=" ")
three[0].close()
print(until(lambda: threads() == 2), end=" ")
three[0].reload_on(signal.SIGHUP)  # which is over at once
os.kill(os.getpid(), signal.SIGHUP)
print(until(lambda: threads() == 2), end=" ")
gone = [weakref.ref(each) for each in three]
del three
print(until(lambda: not any(each() for each in gone) and threads() == 0), end=" ")
# However many there were, the handler that was there is called once.
for _ in range(3):
    followed(closed=True)
os.kill(os.getpid(), signal.SIGHUP)
print(before, signal.getsignal(signal.SIGHUP)._before.__name__, until(lambda: threads() == 0))
"""


def test_a_signal_keeps_no_fetcher_and_no_thread_of_one_that_is_closed(file: SettingsFile) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LET_GO, str(file.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    hup = int(signal.SIGHUP)
    assert ran.stdout.strip() == f"3 True True True [{hup}, {hup}] <lambda> True", ran.stderr


def test_a_broken_file_keeps_nothing_else_from_a_reload(file: SettingsFile, opened: Opener) -> None:
    certificate, key = (file.path.parent / name for name in ("client.pem", "client.key"))

    def put() -> None:
        for path, fresh in zip(
            (certificate, key), file.sandbox.issue_client_certificate(), strict=True
        ):
            path.touch(0o600)
            path.write_bytes(fresh.read_bytes())

    put()
    file.certificate(certificate, key)
    file.write()
    fetcher = opened()
    before = fetcher.status().client_certificate
    put()
    file.write("broken")
    with pytest.raises(ConfigurationError, match="no TOML"):
        fetcher.reload()
    assert fetcher.status().client_certificate != before
    certificate.unlink()
    with pytest.raises(ConfigurationError, match="no TOML"):  # the first of the two
        fetcher.reload()
    file.write()
    with pytest.raises(SecretSourceError, match=r"client\.pem"):
        fetcher.reload()


def test_a_broken_file_keeps_no_proxy_from_being_asked_again(
    file: SettingsFile, opened: Opener
) -> None:
    credentials = file.path.parent / "proxy-credentials"
    credentials.touch(0o600)
    credentials.write_text("d1-service:correct horse:battery")
    with ConnectProxy(credentials="d1-service:correct horse:battery").running() as proxy:
        file.lines |= {
            "proxy": f'"{proxy.url}"',
            "proxy_credentials_source": f'"file:{credentials}"',
        }
        file.write()
        fetcher = opened(retry_interval=0.01)
        proxy.status = 407
        for _ in range(2):
            forget(fetcher)
            with pytest.raises(D1SignerError):
                fetcher.token()
        assert len(proxy.sent) == 1
        proxy.status = None
        file.write("broken")
        with pytest.raises(ConfigurationError, match="no TOML"):
            fetcher.reload()
        forget(fetcher)
        assert fetcher.token().value


FORKED = """
import os, sys, threading, time
from d1_signer import TokenFetcher

fetcher = TokenFetcher.from_settings(sys.argv[1])
fetcher.token()
taken = threading.Event()
def hold():
    with fetcher._following._lock:
        taken.set()
        threading.Event().wait(60)
threading.Thread(target=hold, daemon=True).start()
taken.wait()
child = os.fork()
if child == 0:
    os.rename(sys.argv[2], sys.argv[1])
    until = time.monotonic() + 30
    while fetcher.status().members[0].kid != "two" and time.monotonic() < until:
        time.sleep(0.01)
    fetcher.invalidate(fetcher.token())
    fetcher.token()
    os._exit(0 if fetcher.status().members[0].kid == "two" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def test_a_child_of_a_fork_follows_on_its_own(file: SettingsFile) -> None:
    file.keys("two")
    other = file.path.with_suffix(".two")
    other.write_text(file.text())
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(file.path), str(other)],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert ran.stdout.split() == ["0"], ran.stdout + ran.stderr


ASKED_WITHIN = """
import json, logging, signal, sys
from d1_signer import D1SignerError, TokenFetcher

asked = []
def ask(record=None, frame=None):
    asked.append(fetcher.status().to_dict())
    try:
        fetcher.token(timeout=0)
    except D1SignerError:
        pass
    return True

log = logging.getLogger("d1_signer")
log.setLevel(logging.INFO)
handler = logging.NullHandler()
handler.handle = ask
signal.signal(signal.SIGUSR1, ask)
for settings in sys.argv[1:]:
    with TokenFetcher.from_settings(settings, retry_interval=600) as fetcher:
        log.addHandler(handler)
        try:
            fetcher.token()
        except D1SignerError:
            pass
        for lock in (fetcher._lock, fetcher._signers._members[0]._lock):
            with lock:
                signal.raise_signal(signal.SIGUSR1)
        log.removeHandler(handler)
    print(len(asked), asked[-1]["token"], asked[-1]["failures"], flush=True)
    asked.clear()
"""


def test_handlers_of_the_log_and_of_signals_may_ask_for_status_and_token(
    file: SettingsFile,
) -> None:
    other = file.path.with_suffix(".other")
    other.write_text(file.text().replace(f'"{ISSUER}"', '"nobody"'))
    ran = subprocess.run(
        [sys.executable, "-c", ASKED_WITHIN, str(file.path), str(other)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # One line of the log for the renewal, and a signal within each of two locks.
    assert ran.stdout.splitlines() == ["3 fresh 0", "3 expired 1"], ran.stdout + ran.stderr


NO_FILES_LEFT = """
import resource, sys
from d1_signer import D1SignerError, TokenFetcher, open_signer

fetcher = TokenFetcher.from_settings(sys.argv[1], retry_interval=0.01)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
uri = "pkcs11:token=a;object=b?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/pin"
errors = []
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
for ask in (fetcher.token, lambda: open_signer(uri)):
    try:
        ask()
    except D1SignerError as error:
        errors.append(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
for error in errors:
    print(error.code, error.retryable, "open files" in error.message, "ulimit -n" in error.hint)
fetcher.token(timeout=30)
"""


def test_a_process_without_files_left_is_told_as_that(file: SettingsFile) -> None:
    file.tables = "[limits]\ntotal = 2\n"
    file.write()
    ran = subprocess.run(
        [sys.executable, "-c", NO_FILES_LEFT, str(file.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = ["token_unavailable True True True", "signer_unavailable True True True"]
    assert (ran.stdout.splitlines(), ran.returncode) == (told, 0), ran.stdout + ran.stderr

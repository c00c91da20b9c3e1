# SPDX-License-Identifier: Apache-2.0
"""``d1-signer status``: what the fleet's store tells, of a real Redis."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d1_signer import TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.token.settings import Settings
from tests.cli.conftest import ISSUER, Run
from tests.servers.redis_server import Cluster, RedisServer
from tests.token.fleet.conftest import redis_server
from tests.token.test_fetcher import until

__all__ = ["redis_server"]  # a fixture

Lines = dict[str, object]


@pytest.fixture
def lines(settings: dict[str, str], redis_server: RedisServer, tmp_path: Path) -> dict[str, object]:
    key = tmp_path / "store-key"
    key.touch(0o600)
    key.write_text(os.urandom(32).hex())
    return {
        "key": settings["D1_SIGNER_KEY"],
        "issuer_id": ISSUER,
        "environment": settings["D1_ENVIRONMENT"],
        "client_cert": settings["D1_CLIENT_CERT"],
        "client_key": settings["D1_CLIENT_KEY"],
        "ca_file": settings["D1_CA_FILE"],
        "store.url": redis_server.url,
        "store.key_source": f"file:{key}",
    }


@pytest.fixture
def file(lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("D1_")]:
        monkeypatch.delenv(name)
    return written(tmp_path, lines)


def written(tmp_path: Path, lines: Lines) -> Path:
    file = tmp_path / "d1.toml"
    fresh = tmp_path / "new"
    fresh.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    fresh.replace(file)
    return file


@pytest.fixture
def opened(file: Path) -> Iterator[TokenFetcher]:
    with TokenFetcher.from_settings(file) as fetcher:
        yield fetcher


def announced(*fetchers: TokenFetcher) -> None:
    """Have each get a token, and wait until the store has been told of each."""
    for fetcher in fetchers:
        fetcher.token()
    renewal: Any = fetchers[0]._renewal
    register = renewal.announcer._register
    until(lambda: len(register.members(renewal._name)) == len(fetchers), seconds=20)


@pytest.mark.parametrize("missing", ["issuer_id", "environment"])
def test_no_secret_is_read_before_the_settings_are_whole(
    run: Run, lines: Lines, file: Path, tmp_path: Path, missing: str
) -> None:
    del lines[missing]
    never = f"file:{tmp_path}/never-read"
    file = written(tmp_path, lines | {"store.password_source": never, "store.username": "d1"})
    result = run("status", "--json", "--config", str(file))
    assert result.document["message"].startswith(
        "No issuer id" if missing == "issuer_id" else "No D1 environment"
    )


def test_nothing_has_happened(run: Run, file: Path) -> None:
    result = run("status", "--json", "--config", str(file))
    found = result.document
    # Who waits for a rotation must not take a fleet that has told nothing for one that has it.
    assert (result.status, found["rotated"]) == (1, False)
    assert (found["token"], found["lease"], found["processes"]) == (None, None, [])
    assert found["settings"] == Settings.read(file).digest
    assert "No process has told of itself" in run("status", "--config", str(file)).out


def test_token_and_processes(run: Run, file: Path, opened: TokenFetcher, sandbox: Sandbox) -> None:
    with TokenFetcher.from_settings(file) as other:
        announced(opened, other)
        result = run("status", "--json", "--config", str(file))
    assert result.status == 0, result.out
    found = result.document
    assert 890 <= found["token"]["expires_in"] <= 900
    assert len(found["processes"]) == 2  # each store of this process is a member
    first = found["processes"][0]
    assert (first["pid"], first["kids"]) == (os.getpid(), ["bank-2026"])
    assert {each["settings"] for each in found["processes"]} == {found["settings"]}
    assert first["certificate"] == opened.status().client_certificate.fingerprint  # type: ignore[union-attr]
    shown = run("status", "--config", str(file)).out
    assert re.search(r"^Token +expires 20\S+ \S+ UTC \(in \d+ s\)$", shown, re.MULTILINE)
    assert f":{os.getpid()}" in shown
    assert opened.token().value not in result.out + shown
    assert sandbox.counters.token_requests == 1


def test_a_rotation_is_seen_when_all_have_it(
    run: Run, file: Path, opened: TokenFetcher, lines: Lines, tmp_path: Path
) -> None:
    with TokenFetcher.from_settings(file) as other:
        announced(opened, other)
        written(tmp_path, {**lines, "limits.total": 12})
        assert run("status", "--json", "--config", str(file)).status == 1
        opened.reload()
        result = run("status", "--json", "--config", str(file))
        assert (result.status, result.document["rotated"]) == (1, False)
        assert len({each["settings"] for each in result.document["processes"]}) == 2
        other.reload()
        result = run("status", "--json", "--config", str(file))
        assert (result.status, result.document["rotated"]) == (0, True)


def test_who_holds_the_lease(run: Run, file: Path, opened: TokenFetcher) -> None:
    announced(opened)
    fleet: Any = opened._renewal
    lease = fleet.announcer._register.lease(fleet._name, life=20.0)
    found = run("status", "--json", "--config", str(file)).document["lease"]
    assert found["holder"].endswith(f":{os.getpid()}")
    assert 15 < found["expires_in"] <= 20
    assert f":{os.getpid()}, for" in run("status", "--config", str(file)).out
    lease.release()
    assert run("status", "--json", "--config", str(file)).document["lease"] is None


def test_what_another_store_key_sealed_cannot_be_read(
    run: Run, file: Path, opened: TokenFetcher, tmp_path: Path
) -> None:
    announced(opened)
    (tmp_path / "store-key").write_text(os.urandom(32).hex())
    result = run("status", "--json", "--config", str(file))
    assert (result.status, result.document["unreadable"]) == (1, 2)
    assert result.document["token"] is None
    assert (
        "2: a part of the fleet has another store key" in run("status", "--config", str(file)).out
    )
    checked = run("check", "--json", "--config", str(file))
    assert (checked.status, checked.document["stopped_at"]["step"]) == (1, "store")
    assert checked.document["stopped_at"]["error"]["details"] == {"unreadable": 2}


def test_check_asks_the_store(
    run: Run, file: Path, opened: TokenFetcher, redis_server: RedisServer
) -> None:
    announced(opened)
    good = run("check", "--config", str(file), "--require", "store")
    assert good.status == 0, good.out
    assert f"{redis_server.url}: 1 processes of the fleet" in good.out
    redis_server.kill()
    away = run("check", "--json", "--config", str(file))
    assert (away.status, away.document["stopped_at"]["error"]["code"]) == (1, "store_unavailable")


def test_without_a_store_it_says_where_one_is_named(run: Run, key_uri: str) -> None:
    result = run("status", D1_SIGNER_KEY=key_uri)
    assert result.status == 2
    assert result.err.startswith("Error: No token store is configured.\n")
    assert "Give --config FILE, whose table [store] names it" in result.err


def test_check_requires_a_store_that_is_not_given(run: Run, key_uri: str) -> None:
    result = run("check", "--json", "--key", key_uri, "--require", "store")
    assert (result.status, result.document["stopped_at"]["step"]) == (1, "store")


def test_a_cluster_tells_it_too(run: Run, file: Path, lines: Lines, tmp_path: Path) -> None:
    with Cluster(tmp_path, masters=2, replicas=0) as cluster:
        url = f"redis://127.0.0.1:{cluster.nodes[0].port}"
        file = written(tmp_path, {**lines, "store.url": url, "store.cluster": True})
        with TokenFetcher.from_settings(file) as fetcher:
            announced(fetcher)
            result = run("status", "--json", "--config", str(file))
    assert result.status == 0, result.out
    assert [each["pid"] for each in result.document["processes"]] == [os.getpid()]


def test_a_lease_without_an_end_is_told(run: Run, file: Path, opened: TokenFetcher) -> None:
    announced(opened)
    fleet: Any = opened._renewal
    store = fleet.announcer._register
    with store._clients.get() as client:
        client.set(f"{fleet._name}:lease", "x" * 32)
    lease = run("status", "--json", "--config", str(file)).document["lease"]
    assert lease == {"holder": None, "member": "x" * 16, "expires_in": None}
    assert "delete the key that ends in :lease" in run("status", "--config", str(file)).out


TOLD: dict[str, object] = {
    "member": "m" * 16,
    "host": "app-1",
    "pid": 1,
    "at": 1.8e9,
    "settings": None,
    "kids": ["bank"],
    "certificate": None,
}


@pytest.mark.parametrize(
    "odd",
    [
        *({"at": at} for at in (1e300, -1.0, "now", None)),
        *({"kids": kids} for kids in (None, "bank", [1])),
        *({name: ["x"]} for name in ("member", "host", "pid", "settings", "certificate")),
    ],
    ids=repr,
)
def test_what_another_release_tells_is_not_readable(
    run: Run, file: Path, opened: TokenFetcher, odd: dict[str, object]
) -> None:
    announced(opened)
    announcer: Any = opened._renewal.announcer  # type: ignore[union-attr]
    missing = {name: value for name, value in TOLD.items() if name not in odd}
    more = {**TOLD, "member": "n" * 16, "more": 1}
    for number, facts in enumerate(({**TOLD, **odd}, missing, more)):
        with announcer._register._clients.get() as client:
            content = b"m" * 16 + announcer._sealer.seal_member(facts)
            client.set(f"{announcer._name}:member:{number}", content)
    announcer.tell()  # where its place was taken just now
    shown = run("status", "--config", str(file))
    result = run("status", "--json", "--config", str(file))
    assert (shown.status, result.status) == (1, 1), shown.out + result.out
    assert "defect" not in shown.out + shown.err
    assert (result.document["unreadable"], len(result.document["processes"])) == (2, 2)


def test_a_store_that_is_away(run: Run, file: Path, redis_server: RedisServer) -> None:
    redis_server.kill()
    result = run("status", "--json", "--config", str(file))
    assert (result.status, result.document["code"]) == (1, "store_unavailable")


def test_without_a_store_or_a_file(run: Run, lines: Lines, file: Path, tmp_path: Path) -> None:
    assert "Give --config FILE" in run("status").err
    del lines["store.url"]
    file = written(tmp_path, lines)
    result = run("status", "--json", "--config", str(file))
    assert (result.status, result.document["code"]) == (2, "configuration")


def test_more_processes_than_there_is_room_for(opened: TokenFetcher) -> None:
    announced(opened)
    fleet: Any = opened._renewal
    announcer = fleet.announcer
    store = announcer._register
    for number in range(300):
        store._place.get().number, store._place.get().missed = None, False
        for _ in range(2):  # a second one looks at all places
            if store._place.get().number is None:
                store.announce(announcer._name, b"x", life=60.0)
        assert len(store.members(announcer._name)) == min(number + 2, 256)


def test_the_same_settings_are_not_enough(run: Run, file: Path, opened: TokenFetcher) -> None:
    announced(opened)
    announcer: Any = opened._renewal.announcer  # type: ignore[union-attr]
    about = announcer._about()
    following: Any = opened._following
    following._away = ("pkcs11:token=b",)
    announcer.tell()
    result = run("status", "--config", str(file))
    assert result.status == 1
    assert re.fullmatch(r"A key is away at \S+: pkcs11:token=b\. .*", last_line(result.out))
    following._away = ()
    announcer.tell()
    assert run("status", "--config", str(file)).status == 0
    facts = {**TOLD, "settings": about["settings"], "certificate": "0" * 64}
    with announcer._register._clients.get() as client:
        sealed = announcer._sealer.seal_member(facts)
        free = (announcer._register._place.get().number + 1) % 256
        client.set(f"{announcer._name}:member:{free}", b"m" * 16 + sealed)
    result = run("status", "--config", str(file))
    assert result.status == 1
    assert last_line(result.out).startswith("The client certificates differ: ")
    assert "0000000000000000 at app-1:1" in last_line(result.out)
    assert not run("status", "--json", "--config", str(file)).document["rotated"]


def test_the_last_line_says_what_the_status_means(
    run: Run, file: Path, opened: TokenFetcher, lines: Lines, tmp_path: Path
) -> None:
    announced(opened)
    result = run("status", "--config", str(file))
    assert (result.status, last_line(result.out)) == (
        0,
        "Every process has the settings of the file.",
    )
    assert re.search(r" \d+ s ago\n", result.out)
    written(tmp_path, {**lines, "limits.total": 12})
    result = run("status", "--config", str(file))
    assert result.status == 1
    assert re.fullmatch(
        # Processes of containers may have the same name and number: the settings tell them apart.
        rf"Not as the file: \S+:{os.getpid()} \(settings [0-9a-f]{{16}}\). Reload or restart"
        " there.",
        last_line(result.out),
    )
    (tmp_path / "store-key").write_text(os.urandom(32).hex())
    result = run("status", "--config", str(file))
    assert result.status == 1
    assert last_line(result.out) == (
        "Not all can be read: 2 sealed with another store key. Compare key_source of the table "
        "[store] on every host."
    )
    assert "No process" not in result.out


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_what_was_told_last_is_what_is_true_last(
    run: Run, file: Path, opened: TokenFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced(opened)
    announcer: Any = opened._renewal.announcer  # type: ignore[union-attr]
    announcer._threads.get()[0].join(20)
    looked, go_on = threading.Event(), threading.Event()
    digest = opened.status().settings.digest  # type: ignore[union-attr]

    def about() -> dict[str, object]:
        if threading.current_thread().name == "d1-signer-announcing":
            looked.set()
            assert go_on.wait(20)
            return {"settings": "old", "kids": [], "certificate": None}
        return {"settings": digest, "kids": [], "certificate": None}

    monkeypatch.setattr(announcer, "_about", about)
    announcer.begin()
    assert looked.wait(20)
    reload = threading.Thread(target=announcer.tell)
    reload.start()
    reload.join(0.5)  # without order it would be over by now
    go_on.set()
    reload.join(20)
    announcer._threads.get()[0].join(20)
    found = run("status", "--json", "--config", str(file)).document["processes"]
    assert [each["settings"] for each in found] == [digest]


def test_a_process_that_has_two_places_is_listed_once_as_it_was_last(
    run: Run, file: Path, opened: TokenFetcher
) -> None:
    announced(opened)
    announcer: Any = opened._renewal.announcer  # type: ignore[union-attr]
    with announcer._register._clients.get() as client:
        for number, at in enumerate((3, 2, 1)):
            facts = {**TOLD, "at": at, "kids": [f"kid-{at}"]}
            content = b"m" * 16 + announcer._sealer.seal_member(facts)
            client.set(f"{announcer._name}:member:{number}", content)
    announcer.tell()  # where its place was taken just now
    found = run("status", "--json", "--config", str(file)).document["processes"]
    assert [each["kids"] for each in found if each["member"] == "m" * 16] == [["kid-3"]]


def test_a_process_that_closes_is_listed_no_more(
    run: Run, file: Path, opened: TokenFetcher
) -> None:
    with TokenFetcher.from_settings(file) as other:
        announced(opened, other)
    found = run("status", "--json", "--config", str(file)).document["processes"]
    renewal: Any = opened._renewal
    assert [each["member"] for each in found] == [renewal.announcer._register.member]


def test_what_the_settings_opened_at_the_store_is_closed(
    file: Path, redis_server: RedisServer
) -> None:
    def others() -> int:
        return len(admin.client_list()) - 1

    with redis_server.admin() as admin:
        with TokenFetcher.from_settings(file) as fetcher:
            announced(fetcher)
            assert others() >= 1
        until(lambda: others() == 0, seconds=20)  # the server hears of it a moment later
        assert fetcher is not None  # so that no destructor has done it

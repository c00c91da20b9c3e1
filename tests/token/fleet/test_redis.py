# SPDX-License-Identifier: Apache-2.0
"""A fleet over a real Redis: one request for all, and no error to a caller whatever Redis does."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from d1_signer import (
    D1SignerError,
    LazySigner,
    Limits,
    RenewalEvent,
    Signer,
    SignerSet,
    StoreUnavailable,
    TokenFetcher,
)
from d1_signer.events import CertificateEvent, Event
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.secret import Secret
from d1_signer.token.redis_clients import refusal
from d1_signer.token.redis_store import RedisTokenStore
from d1_signer.token.status import LeaseState, StoreState
from tests.servers.redis_server import Cluster, RedisServer
from tests.token.conftest import ISSUER, certificate_of
from tests.token.fleet.conftest import FleetMaker
from tests.token.fleet.member import Member
from tests.token.test_fetcher import until

Members = Callable[..., list[Member]]


def test_eight_cold_processes_of_sixteen_threads_sign_once_and_post_once(
    members: Members, sandbox: Sandbox
) -> None:
    fleet = members(8)
    sandbox.misbehave(Fault.DELAY, seconds=0.1)
    for member in fleet:
        member.ask(16)
    answers = [member.answer() for member in fleet]
    assert [answer["errors"] for answer in answers] == [[]] * 8
    tokens = [token for answer in answers for token in answer["tokens"]]
    assert len(tokens) == 128
    assert len(set(tokens)) == 1
    assert sum(answer["signed"] for answer in answers) == 1
    assert sandbox.counters.token_requests == 1


def test_a_shared_token_says_so_and_renews_at_its_own_time(
    fleet: FleetMaker, sandbox: Sandbox
) -> None:
    events: list[Event] = []
    first = fleet().token()
    second = fleet(observers=[events.append]).token()
    assert second.value == first.value
    assert second.scope == first.scope
    assert abs(second.expires_at - first.expires_at) < 5
    (event,) = [event for event in events if not isinstance(event, CertificateEvent)]
    assert isinstance(event, RenewalEvent)
    assert event.shared
    assert sandbox.counters.token_requests == 1


def test_a_refused_token_is_not_taken_from_the_store_again(
    fleet: FleetMaker, sandbox: Sandbox
) -> None:
    one, other = fleet(), fleet()
    refused = one.token()
    assert other.token().value == refused.value
    one.invalidate(refused)
    assert one.token().value != refused.value
    other.invalidate(refused)
    assert other.token().value == one.token().value
    assert sandbox.counters.token_requests == 2


def test_a_member_alone_renews_and_does_not_take_its_own_token_back(
    fleet: FleetMaker, sandbox: Sandbox
) -> None:
    fetcher = fleet()
    ahead = 0.0
    fetcher._clock = fetcher._renewal._clock = lambda: time.monotonic() + ahead
    fetcher._wall = fetcher._renewal._wall = lambda: time.time() + ahead
    fetcher._renewal._renewal._clock = fetcher._clock  # type: ignore[union-attr]
    fetcher._renewal._renewal._wall = fetcher._wall  # type: ignore[union-attr]
    for number in range(1, 16):  # each draws its moment at random
        before = fetcher._held
        until(lambda before=before: bool(fetcher.token()) and fetcher._held is not before)  # type: ignore[misc]
        assert sandbox.counters.token_requests == number
        assert fetcher._held is not None
        ahead = fetcher._held.renew_at - time.monotonic()


def test_a_user_of_redis_with_the_rights_that_are_named(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "fleet.md").read_text()
    (rule,) = re.findall(r"`ACL SETUSER d1 on >… (.*)`", page)
    with redis_server.admin() as admin:
        admin.execute_command("ACL", "SETUSER", "d1", "on", ">password", *rule.split())
    with (
        redis_server.client(username="d1", password="password") as one,
        redis_server.client(username="d1", password="password") as two,
    ):
        first, second = (fleet(store=RedisTokenStore(client)) for client in (one, two))
        assert first.token().value == second.token().value
        until(lambda: not keys(redis_server, "lease"))
    assert sandbox.counters.token_requests == 1
    assert "fleet." not in caplog.text


@pytest.mark.stress
def test_signers_that_hang_leave_time_for_the_one_that_signs(
    fleet: FleetMaker, signer: Signer
) -> None:
    over = threading.Event()

    def hang() -> Signer:
        over.wait(20)
        return signer

    hanging = [LazySigner(hang, kid=kid, public_key=signer.public_key) for kid in ("a", "b")]
    fetcher = fleet(signer=SignerSet([*hanging, signer]), limits=Limits(total=8.0))
    try:
        assert fetcher.token().value
    finally:
        over.set()


class Load:
    """Threads that ask for tokens without pause, and what they got."""

    def __init__(self, fetchers: list[TokenFetcher], threads: int) -> None:
        self.errors: list[str] = []
        self.expired = 0
        self.calls = 0
        self.longest_wait = 0.0  # of a call, the first of all excepted
        self.values: set[str] = set()
        self._end = threading.Event()
        self._fetchers = fetchers
        self._threads = threads

    def _call(self, number: int) -> None:
        fetcher = self._fetchers[number % len(self._fetchers)]
        while not self._end.wait(0.001):
            began, first = time.monotonic(), not self.values
            asked = time.time()  # after the call a thread may pause while a good token expires
            try:
                token = fetcher.token()
            except D1SignerError as error:
                self.errors.append(error.code)
            else:
                self.expired += asked >= token.expires_at
                self.values.add(token.value)
            if not first:
                self.longest_wait = max(self.longest_wait, time.monotonic() - began)
            self.calls += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(self._call, number) for number in range(self._threads)]
            try:
                yield
            finally:
                self._end.set()
            for future in futures:
                future.result()


def renewals_go_on(sandbox: Sandbox, number: int) -> None:
    before = sandbox.counters.tokens_issued
    until(lambda: sandbox.counters.tokens_issued >= before + number, seconds=20)


def test_redis_killed_and_restarted_under_load(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    sandbox.set_token_lifetime(1.0)
    load = Load([fleet() for _ in range(3)], threads=9)
    with load.running():
        for _ in range(2):
            renewals_go_on(sandbox, 1)
            redis_server.kill()
            renewals_go_on(sandbox, 4)
            redis_server.start()
        until(lambda: len(keys(redis_server, "token")) == 1)
    assert (load.errors, load.expired) == ([], 0)
    assert load.calls > 1000


def test_redis_frozen_under_load(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    sandbox.set_token_lifetime(1.0)
    load = Load([fleet() for _ in range(3)], threads=9)
    with load.running():
        renewals_go_on(sandbox, 1)
        redis_server.freeze()
        renewals_go_on(sandbox, 5)
        redis_server.thaw()
        renewals_go_on(sandbox, 2)
    assert (load.errors, load.expired) == ([], 0)


def test_a_lease_that_a_frozen_redis_gives_to_nobody_holds_up_nobody_for_long(
    redis_server: RedisServer,
) -> None:
    with redis_server.client() as client:
        store = RedisTokenStore(client)
        store.load("d1-signer:{x}")  # connects
        redis_server.freeze()
        with pytest.raises(StoreUnavailable):
            store.lease("d1-signer:{x}", life=60.0)
        redis_server.thaw()
        until(lambda: bool(client.exists("d1-signer:{x}:lease")))
        assert store.lease("d1-signer:{x}", life=60.0) is None
        until(lambda: store.lease("d1-signer:{x}", life=60.0) is not None, seconds=3)


def test_a_redis_that_never_was_costs_requests_and_no_error(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.kill()
    assert fleet().token().value != fleet().token().value
    assert sandbox.counters.token_requests == 2


def keys(server: RedisServer, kind: str) -> list[bytes]:
    with server.admin() as client:
        found: Any = client.keys(f"d1-signer:*:{kind}")
        return list(found)


def stored(server: RedisServer) -> tuple[bytes, dict[str, str]]:
    (name,) = keys(server, "token")
    with server.admin() as client:
        content: Any = client.get(name)
    envelope: dict[str, str] = json.loads(content)
    return name, envelope


def test_the_store_holds_ciphertext_and_forgets_it_in_time(
    fleet: FleetMaker, redis_server: RedisServer
) -> None:
    token = fleet().token()
    with redis_server.admin() as client:
        for name in client.scan_iter():
            content: Any = client.get(name)
            for secret in (token.value, ISSUER, token.value[:16]):
                assert secret.encode() not in name + content
            remaining: Any = client.pttl(name)
            assert 890_000 < remaining <= 900_000
    assert keys(redis_server, "lease") == []


def test_another_key_opens_nothing(fleet: FleetMaker, sandbox: Sandbox) -> None:
    assert fleet().token().value != fleet(store_key=os.urandom(32)).token().value
    assert sandbox.counters.token_requests == 2


def refuse(fetcher: TokenFetcher) -> None:
    """Let the API refuse its token, as if it were an old one."""
    fetcher._young_until = float("-inf")
    fetcher.invalidate(fetcher.token())


def test_another_key_is_told_in_each_renewal(
    fleet: FleetMaker, caplog: pytest.LogCaptureFixture
) -> None:
    stores: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, RenewalEvent):
            stores.append(event.store)

    first, other = fleet(), fleet(store_key=os.urandom(32), observers=[note])
    first.token()
    assert "fleet.token_unreadable" not in caplog.text
    assert first.status().store is StoreState.WORKING
    assert other.status().store is StoreState.UNUSED
    other.token()
    assert other.status().store is StoreState.UNREADABLE
    for _ in range(3):  # each part overwrites the token of the other
        for member in (first, other):
            refuse(member)
            member.token()
            assert member.status().store is StoreState.UNREADABLE
            assert "Give all of the fleet the same store_key." in str(member.status().store_error)
    told = [each for each in caplog.records if each.msg.startswith("fleet.token_unreadable")]
    assert len(told) == 7
    assert {each.levelname for each in told} == {"ERROR"}
    for each in told:
        assert f"issuer={ISSUER}" in each.getMessage()
        assert "store_key" in each.getMessage()
    assert stores == ["unreadable"] * 4


def test_the_status_tells_of_store_and_lease(
    fleet: FleetMaker, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = fleet(), fleet(limits=Limits(total=3.0))
    first.token()
    second.token()
    status = second.status()
    assert status.last_success is not None
    assert (status.last_success.shared, status.last_success.attempt) == (True, None)
    assert (first.status().lease, status.store) == (LeaseState.NONE, StoreState.WORKING)
    assert status.store_error is None
    redis_server.kill()
    refuse(second)
    second.token()
    assert second.status().store is StoreState.AWAY
    assert second.status().healthy
    why = (
        f"The token store {redis_server.socket} does not answer (ConnectionError). "
        "Look at Redis; tokens are fetched without it meanwhile."
    )
    assert second.status().store_error == why
    (line,) = [line for line in caplog.messages if line.startswith("fleet.store_unavailable")]
    assert f"issuer={ISSUER}" in line
    assert line.endswith(f'message="{why}"')
    redis_server.start()
    refuse(second)
    second.token()
    assert second.status().store_error is None


@pytest.mark.parametrize("failure", [ValueError("closed meanwhile"), OSError(), TimeoutError()])
def test_a_connection_that_was_cut_is_a_store_that_does_not_answer(
    redis_server: RedisServer, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise failure

    with redis.Redis(port=redis_server.port, **RedisTokenStore.CLIENT_SETTINGS) as client:
        store = RedisTokenStore(client)
        monkeypatch.setattr(client, "execute_command", cut)
        monkeypatch.setattr(redis.client.Pipeline, "execute", cut)
        with pytest.raises(StoreUnavailable) as caught:
            store.load("name")
    assert f"The token store localhost:{redis_server.port} does not" in caught.value.message


Change = Callable[[dict[str, str]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda envelope: envelope | {"scope": "d1-api:everything"},
        lambda envelope: envelope | {"box": envelope["box"][:-4] + "AAAA"},
        lambda envelope: envelope | {"box": "A" * 64},
        lambda envelope: envelope | {"box": ""},
        lambda envelope: {"scope": envelope["scope"]},
        lambda envelope: [envelope],
        lambda _: None,
        lambda _: 17,
    ],
)
def test_what_was_tampered_with_is_treated_as_absent(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, change: Change
) -> None:
    first = fleet().token()
    name, envelope = stored(redis_server)
    with redis_server.admin() as client:
        client.set(name, json.dumps(change(envelope)), px=800_000)
    assert fleet().token().value != first.value
    assert sandbox.counters.token_requests == 2


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[" * 100_000])
def test_what_is_not_ours_is_treated_as_absent(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, content: bytes
) -> None:
    fleet().token()
    (name,) = keys(redis_server, "token")
    with redis_server.admin() as client:
        client.set(name, content, px=800_000)
    assert fleet().token().value
    assert sandbox.counters.token_requests == 2


def test_a_token_of_another_issuer_or_environment_is_not_taken(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, signer: Any
) -> None:
    with Sandbox(issuer_id="other-issuer") as other:
        other.register_key(signer.kid, signer.public_key.jwk())
        foreign = fleet(
            issuer_id="other-issuer",
            environment=other.base_url,
            client_certificate=certificate_of(other),
            ca_file=other.ca_file,
        ).token()
        name, _ = stored(redis_server)
        fetcher = fleet()
        # Whoever can write to Redis moves the foreign envelope to the place of ours.
        ours = fetcher._renewal._name  # type: ignore[union-attr]
        with redis_server.admin() as client:
            client.rename(name, f"{ours}:token")
        assert fetcher.token().value != foreign.value
    assert sandbox.counters.token_requests == 1


def test_an_expired_token_in_the_store_is_not_taken(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    sandbox.set_token_lifetime(2.0)
    first = fleet().token()
    (name,) = keys(redis_server, "token")
    with redis_server.admin() as client:
        client.persist(name)
        # Kept for longer than the token lives, by whoever can write to Redis.
        client.pexpire(name, 800_000)
    until(lambda: time.time() >= first.expires_at)
    assert fleet().token().value != first.value
    assert sandbox.counters.token_requests == 2


def take_lease(server: RedisServer, fetcher: TokenFetcher, milliseconds: int | None) -> None:
    with server.admin() as client:
        name = fetcher._renewal._name  # type: ignore[union-attr]
        assert client.set(f"{name}:lease", "another", px=milliseconds, nx=True)


def test_whoever_waits_for_a_lease_goes_on_when_it_runs_out(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    fetcher = fleet()
    take_lease(redis_server, fetcher, 200)
    assert fetcher.token().value
    assert sandbox.counters.token_requests == 1


@pytest.mark.parametrize("milliseconds", [None, 86_400_000])
def test_a_lease_that_never_ends_is_done_without(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, milliseconds: int | None
) -> None:
    fetcher = fleet()
    take_lease(redis_server, fetcher, milliseconds)
    assert fetcher.token(timeout=5).value
    assert sandbox.counters.token_requests == 1


def test_a_lease_that_somebody_takes_over_and_over_is_an_error_in_time(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    fetcher = fleet(limits=Limits(total=0.5))
    take_lease(redis_server, fetcher, 2000)
    (lease,) = keys(redis_server, "lease")
    over = threading.Event()

    def take() -> None:
        with redis_server.admin() as client:
            while not over.wait(0.01):
                client.set(lease, "another", px=2000)

    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take)
        started = time.monotonic()
        try:
            with pytest.raises(D1SignerError) as failure:
                fetcher.token()
        finally:
            over.set()
        taking.result()
    assert failure.value.code == "token_timeout"
    assert time.monotonic() - started < 2
    assert sandbox.counters.token_requests == 0


def test_a_lease_lost_during_the_work_is_no_error_and_another_keeps_it(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    fetcher = fleet()
    sandbox.misbehave(Fault.DELAY, seconds=0.3, times=1)
    fetcher.prefetch()
    until(lambda: sandbox.counters.token_requests == 1)
    (lease,) = keys(redis_server, "lease")
    with redis_server.admin() as client:
        client.set(lease, "another", px=60_000)
        assert fetcher.token().value
        until(lambda: fetcher._flight is None)
        assert client.get(lease) == b"another"


def test_the_others_go_on_when_the_holder_of_the_lease_dies(
    fleet: FleetMaker, members: Members, sandbox: Sandbox, member_settings: dict[str, str]
) -> None:
    (holder,) = members(1, D1_TOTAL_SECONDS="3")
    sandbox.misbehave(Fault.DELAY, seconds=30.0, times=1)
    holder.ask(1)
    until(lambda: sandbox.counters.token_requests == 1)
    holder.kill()
    key = bytes.fromhex(Path(member_settings["D1_STORE_KEY_FILE"]).read_text())
    others = [fleet(store_key=key, limits=Limits(total=3.0)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(lambda fetcher: fetcher.token().value, others))
    assert len(set(tokens)) == 1
    assert sandbox.counters.token_requests == 2


def test_a_forked_child_uses_the_store(fleet: FleetMaker, sandbox: Sandbox) -> None:
    fetcher, other = fleet(), fleet()
    value = fetcher.token().value
    for asked in (fetcher, other):
        child = os.fork()
        if child == 0:
            try:
                asked._held, asked._fresh = None, (0.0, 0.0, asked._fresh[2])
                os._exit(0 if asked.token(timeout=10).value == value else 1)
            except BaseException:  # noqa: BLE001 (the child must not run the parent's tests)
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    assert other.token().value == value
    assert sandbox.counters.token_requests == 1


def test_a_client_that_answers_text_is_good_as_well(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    with redis_server.client(decode_responses=True) as client:
        store = RedisTokenStore(client)
        assert fleet(store=store).token().value == fleet(store=store).token().value
    assert sandbox.counters.token_requests == 1


REFUSALS: list[tuple[list[tuple[str, ...]], str, str]] = [
    ([("CONFIG", "SET", "maxmemory", "1")], "(OOM)", "maxmemory"),
    ([("REPLICAOF", "127.0.0.1", "1")], "(READONLY)", "Name its primary"),
    ([("CONFIG", "SET", "min-replicas-to-write", "3")], "(NOREPLICAS)", "replicas"),
    (
        [("REPLICAOF", "127.0.0.1", "1"), ("CONFIG", "SET", "replica-serve-stale-data", "no")],
        "(MASTERDOWN)",
        "primary",
    ),
    ([("CONFIG", "SET", "requirepass", "another")], "refuses the login", "Compare user and pass"),
    ([("ACL", "SETUSER", "default", ">another", "resetpass")], "refuses the login", "at its start"),
]


@pytest.mark.parametrize(("commands", "told", "look"), REFUSALS)
def test_what_a_redis_that_answers_refuses_is_told(
    tmp_path: Path, commands: list[tuple[str, ...]], told: str, look: str
) -> None:
    with RedisServer(tmp_path) as server, server.admin() as admin:
        for command in commands:
            admin.execute_command(*command)
        store = RedisTokenStore(server.client())
        with pytest.raises(StoreUnavailable) as caught:
            _ = store.load("d1-signer:{a}") or store.lease("d1-signer:{a}", life=1.0)
        store.abort()
    assert str(server.socket) in caught.value.message
    assert told in caught.value.message
    assert look in caught.value.hint
    assert "does not answer" not in caught.value.message


@pytest.mark.parametrize(
    ("password", "told", "look"),
    [
        ("wr0ng-of-redis", "refuses the login", "Compare user and pass"),
        ("s3cret-of-redis", "refuses a command to its user", "CLUSTER SLOTS"),
    ],
)
def test_what_a_cluster_refuses_to_its_client_is_told(
    tmp_path: Path, password: str, told: str, look: str
) -> None:
    with Cluster(tmp_path, masters=1, replicas=0) as nodes:
        (node,) = nodes.nodes
        rights = ["~d1-signer:*", "+getrange", "+set", "+pttl", "+del"]
        with node.admin() as admin:
            admin.execute_command("ACL", "SETUSER", "d1", "on", ">s3cret-of-redis", *rights)
        url = f"redis://127.0.0.1:{node.port}"
        login = Secret(password)
        store = RedisTokenStore.from_url(url, cluster=True, username="d1", password=login)
        with pytest.raises(StoreUnavailable) as caught:
            store.load("d1-signer:{a}")
    assert f"127.0.0.1:{node.port} {told}" in caught.value.message
    assert look in caught.value.hint
    assert "whether it is a cluster" not in caught.value.hint


def test_a_server_that_repeats_what_it_was_sent_is_not_quoted() -> None:
    echo = "unknown command 'AUTH', with args beginning with: 'd1' 'OOM hunter2'"
    assert refusal(redis.ResponseError(f"ERR {echo}")) is None
    assert refusal(redis.ResponseError("HUNTER2 is no password")) is None
    assert refusal(redis.ConnectionError("max number of clients reached")) is not None
    refused = refusal(redis.ResponseError(f"BUSY {echo}"))
    assert refused is not None
    assert "hunter2" not in " ".join(refused)


def test_a_child_of_a_fork_does_not_say_that_it_renews(fleet: FleetMaker, sandbox: Sandbox) -> None:
    fetcher = fleet()
    sandbox.misbehave(Fault.DELAY, seconds=30)
    fetcher.prefetch()
    until(lambda: fetcher.status().lease is LeaseState.OURS, seconds=20)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            status = fetcher.status()
            os.write(write, json.dumps([status.lease, status.renewing]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 (the child must not run the parent's tests)
            os._exit(2)
    _, exited = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(exited) == 0
    assert json.loads(os.read(read, 100)) == ["anothers", False]
    assert fetcher.status().lease is LeaseState.OURS
    os.close(read)
    os.close(write)


def test_a_store_that_goes_away_before_the_token_is_stored_is_away(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    stores: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, RenewalEvent):
            stores.append(event.store)

    fetcher = fleet(observers=[note])
    sandbox.misbehave(Fault.DELAY, seconds=1)
    fetcher.prefetch()
    until(lambda: fetcher.status().lease is LeaseState.OURS, seconds=20)
    redis_server.freeze()
    try:
        fetcher.token()
        until(lambda: bool(stores), seconds=20)
        status = fetcher.status()
    finally:
        redis_server.thaw()
    assert (status.store, status.lease, stores) == (StoreState.AWAY, LeaseState.KEPT, ["away"])
    assert status.store_error is not None
    assert "does not answer" in status.store_error

# SPDX-License-Identifier: Apache-2.0
"""Redis with an ACL, behind sentinels, as a cluster: failovers, migrations, all of it hanging."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis.cluster import RedisCluster
from redis.exceptions import RedisError
from redis.sentinel import Sentinel

from d1_signer import TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.token.redis_store import RedisTokenStore
from tests.servers.redis_server import (
    MASTER,
    Cluster,
    RedisServer,
    SentinelProcess,
    cluster,
    sentinels,
)
from tests.token.fleet.conftest import FleetMaker
from tests.token.fleet.member import ROOT
from tests.token.fleet.test_redis import Load, renewals_go_on
from tests.token.test_fetcher import until

MEMBERS = 24
SETTINGS = RedisTokenStore.CLIENT_SETTINGS


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def together(fetchers: list[TokenFetcher]) -> tuple[int, float]:
    """How many tokens a cold fleet came to, and the longest wait. No caller got an error."""

    def one(fetcher: TokenFetcher) -> tuple[str, float]:
        started = time.monotonic()
        return fetcher.token().value, time.monotonic() - started

    with ThreadPoolExecutor(len(fetchers)) as pool:
        answers = list(pool.map(one, fetchers))
    return len({value for value, _ in answers}), max(waited for _, waited in answers)


def share(fetchers: list[TokenFetcher], sandbox: Sandbox) -> bool:
    """Whether all of them are cold at once, and one of them asks D1.

    They may hold two tokens then: one that is a token behind takes that of the others, which they
    have just forgotten, and that D1 did not refuse.
    """
    for fetcher in fetchers:
        fetcher._young_until = float("-inf")
        fetcher.invalidate(fetcher.token())
    before = sandbox.counters.token_requests
    together(fetchers)
    return sandbox.counters.token_requests == before + 1


# -- one server -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rights",
    [
        "+@all",
        "+@all -@scripting",
        "+@all -evalsha -script|load -pexpire",
        "+getrange +set +pttl +del",
    ],
)
def test_cold_members_of_one_redis(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, stack: ExitStack, rights: str
) -> None:
    with redis_server.admin() as admin:
        rule = ["on", ">password", "~d1-signer:*", *rights.split()]
        admin.execute_command("ACL", "SETUSER", "d1", *rule)
    clients = [
        stack.enter_context(redis_server.client(username="d1", password="password"))
        for _ in range(MEMBERS)
    ]
    tokens, waited = together([fleet(store=RedisTokenStore(client)) for client in clients])
    # One more where the machine is so slow that a second is not enough.
    assert tokens <= sandbox.counters.token_requests <= 2
    assert waited < 15


def test_cold_members_that_may_not_lease_fetch_one_token_each(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, stack: ExitStack
) -> None:
    with redis_server.admin() as admin:
        admin.execute_command("ACL", "SETUSER", "d1", "on", ">p", "~d1-signer:*", "+get", "+pttl")
    clients = [
        stack.enter_context(redis_server.client(username="d1", password="p"))
        for _ in range(MEMBERS)
    ]
    tokens, waited = together([fleet(store=RedisTokenStore(client)) for client in clients])
    assert tokens == sandbox.counters.token_requests == MEMBERS
    assert waited < 15


def test_cold_members_of_a_redis_that_hangs_fetch_one_token_each(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    fetchers = [fleet() for _ in range(MEMBERS)]
    redis_server.freeze()
    tokens, waited = together(fetchers)
    assert tokens == sandbox.counters.token_requests == MEMBERS
    assert waited < 15
    redis_server.thaw()
    until(lambda: share(fetchers[:3], sandbox), seconds=30)


# -- sentinels ------------------------------------------------------------------------------------


class Watched:
    """A master and its replica, behind three sentinels."""

    def __init__(self, folder: Path, master: RedisServer, stack: ExitStack) -> None:
        self.master = master
        place = folder / "replica"
        place.mkdir()
        replicating = ["--replicaof", f"127.0.0.1 {master.port}"]
        self.replica = stack.enter_context(RedisServer(place, *replicating))
        with self.replica.admin() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", seconds=30)
        self.sentinels: list[SentinelProcess] = stack.enter_context(sentinels(folder, master))
        self._stack = stack

    def store(self) -> RedisTokenStore:
        # As docs/fleet.md writes it.
        hosts = [("127.0.0.1", each.port) for each in self.sentinels]
        watch = Sentinel(hosts, sentinel_kwargs=SETTINGS)  # type: ignore[no-untyped-call]
        client = watch.master_for(MASTER, **SETTINGS)  # type: ignore[no-untyped-call]
        return RedisTokenStore(self._stack.enter_context(client))


def is_master(server: RedisServer) -> bool:
    # One that becomes the master closes its connections.
    with contextlib.suppress(RedisError), server.admin() as client:
        return bool(client.info("replication")["role"] == "master")
    return False


@pytest.fixture
def watched(tmp_path: Path, redis_server: RedisServer, stack: ExitStack) -> Watched:
    return Watched(tmp_path, redis_server, stack)


def test_cold_members_behind_sentinels_one_of_which_hangs(
    fleet: FleetMaker, sandbox: Sandbox, watched: Watched
) -> None:
    fetchers = [fleet(store=watched.store()) for _ in range(MEMBERS)]
    watched.sentinels[0].freeze()
    tokens, waited = together(fetchers)
    assert sandbox.counters.token_requests <= 2
    assert tokens <= 2
    assert waited < 15


@pytest.mark.stress
def test_cold_members_behind_sentinels_that_all_hang(
    fleet: FleetMaker, sandbox: Sandbox, watched: Watched
) -> None:
    fetchers = [fleet(store=watched.store()) for _ in range(MEMBERS)]
    for each in watched.sentinels:
        each.freeze()
    watched.master.freeze()
    tokens, waited = together(fetchers)
    assert tokens == sandbox.counters.token_requests == MEMBERS
    assert waited < 10


@pytest.mark.stress
def test_a_failover_behind_sentinels_amid_renewals(
    fleet: FleetMaker, sandbox: Sandbox, watched: Watched
) -> None:
    sandbox.set_token_lifetime(2.0)
    fetchers = [fleet(store=watched.store()) for _ in range(3)]
    load = Load(fetchers, threads=9)
    with load.running():
        renewals_go_on(sandbox, 2)
        watched.master.kill()
        renewals_go_on(sandbox, 3)
        until(lambda: is_master(watched.replica), seconds=40)
        renewals_go_on(sandbox, 2)
    assert (load.errors, load.expired) == ([], 0)
    sandbox.set_token_lifetime(900.0)
    until(lambda: share(fetchers, sandbox), seconds=30)


# -- a cluster ------------------------------------------------------------------------------------


def test_a_cluster_shares_tokens(fleet: FleetMaker, sandbox: Sandbox, tmp_path: Path) -> None:
    with cluster(tmp_path) as client:
        store = RedisTokenStore(client)
        assert fleet(store=store).token().value == fleet(store=store).token().value
        assert sandbox.counters.token_requests == 1
        names = client.keys("d1-signer:*:token")
        assert len(names) == 1


def test_a_user_of_a_cluster_with_the_rights_that_are_named(
    fleet: FleetMaker, sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = (ROOT / "docs" / "fleet.md").read_text()
    (rule,) = re.findall(r"`ACL SETUSER d1 on >… (.*)`", page)
    (more,) = re.findall(r"asks for its layout as well: `(.*)`", page)
    with Cluster(tmp_path, masters=1, replicas=0) as nodes, ExitStack() as stack:
        with nodes.nodes[0].admin() as admin:
            rights = [*rule.split(), *more.split()]
            admin.execute_command("ACL", "SETUSER", "d1", "on", ">password", *rights)

        def client() -> RedisCluster:
            made = nodes.client(username="d1", password="password")
            stack.callback(made.close)
            return made

        one, other = (fleet(store=RedisTokenStore(client)) for _ in range(2))
        assert one.token().value == other.token().value
    assert sandbox.counters.token_requests == 1
    assert "fleet." not in caplog.text


def test_a_cluster_that_is_away_at_the_start(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, stack: ExitStack
) -> None:
    made: list[RedisCluster] = []

    def client() -> RedisCluster:
        made.append(RedisCluster.from_url(f"redis://127.0.0.1:{redis_server.port}", **SETTINGS))
        stack.callback(made[-1].close)
        return made[-1]

    # It is no cluster, so the client cannot be made.
    fetcher = fleet(store=RedisTokenStore(client))
    assert fetcher.token().value
    redis_server.kill()
    fetcher._young_until = float("-inf")
    fetcher.invalidate(fetcher.token())
    assert fetcher.token().value
    assert made == []
    assert sandbox.counters.token_requests == 2


class Nodes:
    """A cluster, the node that keeps the token, and how to wait for its successor."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self._stack = stack

    def store(self) -> RedisTokenStore:
        # As docs/fleet.md writes it.
        return RedisTokenStore(lambda: self._stack.enter_context(self.cluster.client()))


@pytest.fixture
def nodes(tmp_path: Path, stack: ExitStack) -> Nodes:
    folder = tmp_path / "cluster"
    folder.mkdir()
    return Nodes(stack.enter_context(Cluster(folder)), stack)


def name_of(fetcher: TokenFetcher) -> str:
    return f"{fetcher._renewal._name}:token"  # type: ignore[union-attr]


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("trouble", ["kill", "freeze"])
def test_cold_members_amid_a_failover_of_a_cluster(
    fleet: FleetMaker, sandbox: Sandbox, nodes: Nodes, trouble: str
) -> None:
    fetchers = [fleet(store=nodes.store()) for _ in range(MEMBERS)]
    owner = nodes.cluster.owner(name_of(fetchers[0]))
    getattr(owner, trouble)()
    tokens, waited = together(fetchers)
    assert tokens == sandbox.counters.token_requests <= MEMBERS
    assert waited < 15
    if trouble == "kill":
        nodes.cluster.wait()
    until(lambda: share(fetchers[:3], sandbox), seconds=100)


Amid = Callable[[Cluster, str], None]


def migration(cluster: Cluster, name: str) -> None:
    before = cluster.owner(name)
    cluster.migrate(name)
    until(lambda: cluster.owner(name) is not before, seconds=30)


def failover(cluster: Cluster, name: str) -> None:
    before = cluster.owner(name)
    before.kill()
    until(lambda: cluster.owner(name) is not before, seconds=40)


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("amid", [migration, failover])
def test_a_cluster_that_changes_amid_renewals(
    fleet: FleetMaker, sandbox: Sandbox, nodes: Nodes, amid: Amid
) -> None:
    sandbox.set_token_lifetime(2.0)
    fetchers = [fleet(store=nodes.store()) for _ in range(3)]
    load = Load(fetchers, threads=9)
    with load.running():
        renewals_go_on(sandbox, 2)
        amid(nodes.cluster, name_of(fetchers[0]))
        renewals_go_on(sandbox, 3)
    assert (load.errors, load.expired) == ([], 0)
    sandbox.set_token_lifetime(900.0)
    until(lambda: share(fetchers, sandbox), seconds=100)


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_a_cluster_all_of_whose_nodes_hang_amid_renewals(
    fleet: FleetMaker, sandbox: Sandbox, nodes: Nodes
) -> None:
    # Long enough for what a store may cost a renewal, also where a machine is slow.
    sandbox.set_token_lifetime(12.0)
    fetchers = [fleet(store=nodes.store()) for _ in range(3)]
    load = Load(fetchers, threads=9)
    with load.running():
        renewals_go_on(sandbox, 1)
        for node in nodes.cluster.nodes:
            node.freeze()
        renewals_go_on(sandbox, 3)
        for node in nodes.cluster.nodes:
            node.thaw()
    assert (load.errors, load.expired) == ([], 0)
    # Nobody waited while a token was valid.
    assert load.longest_wait < 5
    sandbox.set_token_lifetime(900.0)
    until(lambda: share(fetchers, sandbox), seconds=100)

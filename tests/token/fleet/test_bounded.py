# SPDX-License-Identifier: Apache-2.0
"""A store of anybody's that hangs, drips, floods, raises or lies: no caller waits long for it."""

from __future__ import annotations

import math
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from d1_signer import Limits, StoreUnavailable, TokenTimeout
from d1_signer.sandbox import Sandbox
from d1_signer.token.bounded import BoundedStore
from d1_signer.token.redis_store import RedisTokenStore
from d1_signer.token.stores import MAX_SEALED
from tests.servers.redis_server import RedisServer
from tests.token.fleet.conftest import FleetMaker
from tests.token.fleet.test_redis import keys
from tests.token.fleet.test_topologies import MEMBERS, together
from tests.token.test_fetcher import until


class Store:
    """A store in memory, one of whose methods does something else."""

    def __init__(self, **instead: Callable[..., Any]) -> None:
        self.asked: list[str] = []
        self.over = threading.Event()
        self._instead = instead

    def _answer(self, method: str, otherwise: Any) -> Any:
        self.asked.append(method)
        return self._instead[method]() if method in self._instead else otherwise

    def load(self, name: str) -> tuple[bytes, float] | None:
        del name
        answer: tuple[bytes, float] | None = self._answer("load", None)
        return answer

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        del name, sealed, life
        self._answer("save", None)

    def lease(self, name: str, *, life: float) -> Store | None:
        del name, life
        lease: Store | None = self._answer("lease", self)
        return lease

    def release(self) -> None:
        self._answer("release", None)


@pytest.fixture
def over() -> Iterator[threading.Event]:
    over = threading.Event()
    yield over
    over.set()


def away(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(line for line in caplog.text.splitlines() if "fleet." in line)


def test_d1_is_not_what_is_slow_where_a_store_leaves_it_no_time(
    fleet: FleetMaker, sandbox: Sandbox, over: threading.Event
) -> None:
    renewal = fleet(store=Store(load=lambda: over.wait(60)))._renewal
    with pytest.raises(TokenTimeout, match="No time is left to ask D1") as raised:
        renewal.obtain(deadline=time.monotonic() + 0.06, stopped=threading.Event(), refused=None)
    assert raised.value.retryable
    assert "store" in str(raised.value)
    assert raised.value.hint.startswith("Look at the store; ")
    assert raised.value.hint.endswith("meanwhile. It is tried again by itself.")
    assert "certificate" not in str(raised.value)
    assert sandbox.counters.token_requests == 0


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("load", ["load"]),
        ("lease", ["load", "lease"]),
        ("save", ["load", "lease", "load", "save"]),
        ("release", ["load", "lease", "load", "save", "release"]),
    ],
)
def test_a_store_that_hangs_costs_a_second_and_is_named(
    fleet: FleetMaker,
    sandbox: Sandbox,
    over: threading.Event,
    caplog: pytest.LogCaptureFixture,
    method: str,
    asked: list[str],
) -> None:
    store = Store(**{method: lambda: over.wait(60)})
    fetcher = fleet(store=store)
    started = time.monotonic()
    assert fetcher.token().value
    # A second, and then no more of this store.
    assert store.asked == asked
    assert 0.9 < time.monotonic() - started < 10
    assert "The token store Store did not answer in time." in away(caplog)
    assert sandbox.counters.token_requests == 1


def test_what_hangs_leaves_most_of_a_short_time_limit_to_d1(
    fleet: FleetMaker, over: threading.Event
) -> None:
    fetcher = fleet(store=Store(load=lambda: over.wait(60)), limits=Limits(total=2.0))
    started = time.monotonic()
    assert fetcher.token().value
    assert 0.4 < time.monotonic() - started < 2


def test_four_calls_that_do_not_end_are_enough(
    over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.token.bounded._REST", 0.0)
    store = Store(load=lambda: over.wait(60))
    bounded = BoundedStore(store)
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            bounded.load("x", deadline=time.monotonic() + 0.1)
    with pytest.raises(StoreUnavailable, match="has 4 calls that do not end") as failure:
        bounded.load("x", deadline=time.monotonic() + 0.1)
    assert failure.value.retryable
    assert len(store.asked) == 4
    over.set()
    until(lambda: not bounded._under_way.get())
    store._instead.clear()
    assert bounded.load("x", deadline=time.monotonic() + 20) is None


def test_a_lease_that_comes_too_late_is_given_back(over: threading.Event) -> None:
    store = Store()
    store._instead["lease"] = lambda: over.wait(60) and store
    bounded = BoundedStore(store)
    with pytest.raises(StoreUnavailable):
        bounded.lease("x", life=20.0, deadline=time.monotonic() + 0.1)
    assert store.asked == ["lease"]
    over.set()
    until(lambda: store.asked == ["lease", "release"])


def fail(error: BaseException) -> Callable[[], Any]:
    def raises() -> Any:
        raise error

    return raises


@pytest.mark.parametrize("method", ["load", "lease", "save", "release"])
@pytest.mark.parametrize("error", [KeyError("password"), TimeoutError(), OSError(24, "EMFILE")])
def test_whatever_a_store_raises_means_that_it_is_away(
    fleet: FleetMaker, caplog: pytest.LogCaptureFixture, method: str, error: Exception
) -> None:
    assert fleet(store=Store(**{method: fail(error)})).token().value
    assert "The token store Store " in away(caplog)
    assert "password" not in caplog.text


@pytest.mark.parametrize("answer", [(b"x" * (MAX_SEALED + 1), 900.0), (b"{}", 900.0)])
def test_what_is_too_long_or_not_ours_is_treated_as_absent(
    fleet: FleetMaker, sandbox: Sandbox, answer: tuple[bytes, float]
) -> None:
    assert fleet(store=Store(load=lambda: answer)).token().value
    assert sandbox.counters.token_requests == 1


@pytest.mark.parametrize(
    "answer", [17, (None, 900.0), (b"{}", "soon"), (b"{}", math.nan), (b"",), "x"]
)
def test_an_answer_of_a_wrong_type_means_that_it_is_away(
    fleet: FleetMaker, sandbox: Sandbox, answer: Any
) -> None:
    assert fleet(store=Store(load=lambda: answer)).token().value
    assert sandbox.counters.token_requests == 1


# -- what a hostile Redis sends -------------------------------------------------------------------


@contextmanager
def hostile(answer: Callable[[socket.socket], None]) -> Iterator[Callable[[], redis.Redis]]:
    """Makes clients of a server that answers everything so."""
    connections: list[socket.socket] = []

    def one(connection: socket.socket) -> None:
        try:
            while connection.recv(65536):
                answer(connection)
        except OSError:
            pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        host, port = listener.getsockname()[:2]
        settings = {"protocol": 2, **RedisTokenStore.CLIENT_SETTINGS}
        clients: list[redis.Redis] = []

        def client() -> redis.Redis:
            clients.append(redis.Redis(host=host, port=port, **settings))
            return clients[-1]

        try:
            yield client
        finally:
            for each in clients:
                each.close()
            listener.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()


def drips(connection: socket.socket) -> None:
    connection.sendall(b"$60000\r\n")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def floods(connection: socket.socket) -> None:
    connection.sendall(b"$100000000000\r\n")
    block = b"a" * 65536
    while True:
        connection.sendall(block)
        time.sleep(0.001)


def lies(connection: socket.socket) -> None:
    connection.sendall(b"*2\r\n:1\r\n$-1\r\n")


@pytest.mark.parametrize("answer", [drips, floods, lies])
def test_a_hostile_redis_costs_a_second_each_time_and_leaves_no_thread(
    fleet: FleetMaker,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[socket.socket], None],
) -> None:
    monkeypatch.setattr("d1_signer.token.bounded._REST", 0.0)
    with hostile(answer) as client:
        fetcher = fleet(store=RedisTokenStore(client()), retry_interval=0.01)
        for number in range(1, 6):
            started = time.monotonic()
            token = fetcher.token()
            assert time.monotonic() - started < 10
            fetcher._young_until = float("-inf")
            fetcher.invalidate(token)
            assert sandbox.counters.token_requests == number
        names = [thread.name for thread in threading.enumerate()]
        until(lambda: "d1-signer-call" not in [t.name for t in threading.enumerate()])
        assert names.count("d1-signer-renewal") <= 1


def test_cold_members_of_a_redis_that_drips_fetch_one_token_each(
    fleet: FleetMaker, sandbox: Sandbox
) -> None:
    with hostile(drips) as client:
        fetchers = [fleet(store=RedisTokenStore(client())) for _ in range(MEMBERS)]
        tokens, waited = together(fetchers)
    assert tokens == sandbox.counters.token_requests == MEMBERS
    assert waited < 15


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_a_value_of_200_mb_costs_no_memory(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    first = fleet().token()
    (name,) = keys(redis_server, "token")
    with redis_server.client(socket_timeout=20) as admin:
        # The server makes it, so that this process does not.
        admin.setrange(name, 200_000_000, b"x")
        admin.pexpire(name, 800_000)
        fetchers = [fleet() for _ in range(MEMBERS)]
        before = memory()
        tokens, waited = together(fetchers)
        assert memory() - before < 50
        assert (tokens, waited < 15) == (1, True)
        assert fetchers[0].token().value != first.value
        # It was replaced.
        assert admin.strlen(name) < 1000
    assert sandbox.counters.token_requests == 2

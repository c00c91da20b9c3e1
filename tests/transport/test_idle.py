# SPDX-License-Identifier: Apache-2.0
"""Firewalls that forget an idle connection: what comes later is dropped without a word."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from d1_signer import TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.token import endpoint
from d1_signer.token.d1 import Environment
from d1_signer.transport import session as sessions
from tests.servers.tcp_proxy import TcpProxy
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import age

# Much less than the limit for a read, which a call into the void costs.
SOON = 8.0


@pytest.fixture
def firewall(sandbox: Sandbox) -> Iterator[TcpProxy]:
    with TcpProxy(int(sandbox.base_url.split(":")[2].partition("/")[0])) as firewall:
        yield firewall


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker, sandbox: Sandbox, firewall: TcpProxy) -> TokenFetcher:
    return make_fetcher(
        environment=f"https://127.0.0.1:{firewall.port}/authz/v1", audience=sandbox.token_endpoint
    )


def kept(adapter: Any) -> list[Any]:
    """The connections that an adapter keeps."""
    pools = adapter.poolmanager.pools
    queues = [pools[key].pool.queue for key in pools.keys()]  # noqa: SIM118 (no mapping)
    return [one for queue in queues for one in queue if one is not None]


def let_rest(connection: Any, seconds: float, *, suspended: bool = False) -> None:
    """Let a connection have been idle; of a suspended machine the wall clock alone knows."""
    since, wall = connection.rests_since
    connection.rests_since = (since if suspended else since - seconds, wall - seconds)


@pytest.mark.parametrize("suspended", [False, True])
def test_a_renewal_does_not_go_into_the_void(
    fetcher: TokenFetcher, firewall: TcpProxy, *, suspended: bool
) -> None:
    first = fetcher.token()
    firewall.forget_all()
    (connection,) = kept(fetcher._endpoint._adapter)
    let_rest(connection, endpoint._IDLE, suspended=suspended)
    fetcher.invalidate(first)
    age(fetcher, 60)
    began = time.monotonic()
    assert fetcher.token().value != first.value
    assert time.monotonic() - began < SOON
    assert firewall.connections == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_call_of_a_session_does_not_go_into_the_void(
    fetcher: TokenFetcher, firewall: TcpProxy, method: str
) -> None:
    with fetcher.session() as session:
        url = f"{banking_url(firewall)}/ping"
        assert session.get(url).status_code in {200, 401}
        before = firewall.connections
        firewall.forget_all()
        let_rest(only_kept(session), sessions._IDLE)
        began = time.monotonic()
        assert session.request(method, url).status_code
        assert time.monotonic() - began < SOON
        assert firewall.connections == before + 1


def banking_url(firewall: TcpProxy) -> str:
    return Environment.of(f"https://127.0.0.1:{firewall.port}/authz/v1").banking_url


def only_kept(session: requests.Session) -> Any:
    (connection,) = kept(session.get_adapter("https://"))
    return connection


def test_connections_that_are_used_are_kept(
    fetcher: TokenFetcher, sandbox: Sandbox, firewall: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_IDLE", 60.0)
    with fetcher.session() as session:
        session.auth = None
        url = f"{banking_url(firewall)}/ping"
        session.get(url)
        before = firewall.connections
        for _ in range(3):
            let_rest(only_kept(session), sessions._IDLE / 100)
            session.get(url)
        assert firewall.connections == before
    assert sandbox.counters.banking_requests == 4


def test_the_limits_are_shorter_than_those_of_servers_and_firewalls() -> None:
    assert endpoint._IDLE <= 5
    assert sessions._IDLE < 5  # Node.js and Apache close after five seconds


def test_connections_are_probed_while_they_are_open(
    fetcher: TokenFetcher, firewall: TcpProxy
) -> None:
    """For an answer that takes minutes: a firewall sees that the connection lives."""
    with fetcher.session() as session:
        session.auth = None
        session.get(f"{banking_url(firewall)}/ping")
        sock = only_kept(session).sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
            # A peer that is gone is noticed within two minutes of silence.
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 20
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= 3

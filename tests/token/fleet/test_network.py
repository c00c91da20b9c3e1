# SPDX-License-Identifier: Apache-2.0
"""A network that misbehaves between fetcher and D1: seen by callers only where nothing valid is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from d1_signer import Limits, TokenFetcher, TokenUnavailable
from d1_signer.sandbox import Sandbox
from tests.servers.tcp_proxy import TcpProxy, Wire
from tests.token.conftest import FetcherMaker, make_fetcher
from tests.token.fleet.test_redis import Load
from tests.token.test_fetcher import succeeded, until

__all__ = ["make_fetcher"]  # a fixture

ENDING = [Wire.REFUSED, Wire.RESET, Wire.CUT, Wire.SILENT]


@pytest.fixture
def proxy(sandbox: Sandbox) -> Iterator[TcpProxy]:
    with TcpProxy(int(sandbox.base_url.split(":")[2].partition("/")[0])) as proxy:
        yield proxy


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker, sandbox: Sandbox, proxy: TcpProxy) -> TokenFetcher:
    options: dict[str, Any] = {
        "environment": f"https://127.0.0.1:{proxy.port}/authz/v1",
        # The sandbox judges by its own URL.
        "audience": sandbox.token_endpoint,
        "limits": Limits(total=1.5, read=0.4, connect=0.4),
        "retry_interval": 0.02,
    }
    return make_fetcher(**options)


@pytest.mark.parametrize("wire", ENDING)
def test_a_cold_fetcher_says_what_is_wrong_in_time_and_recovers(
    fetcher: TokenFetcher, proxy: TcpProxy, wire: Wire
) -> None:
    proxy.wire = wire
    started = time.monotonic()
    with pytest.raises(TokenUnavailable):
        fetcher.token()
    assert time.monotonic() - started < 2.5
    assert proxy.connections > 1
    proxy.wire = Wire.GOOD
    until(lambda: succeeded(fetcher))


@pytest.mark.parametrize("wire", [Wire.DELAYED, Wire.THROTTLED])
def test_a_slow_network_gives_a_token(fetcher: TokenFetcher, proxy: TcpProxy, wire: Wire) -> None:
    proxy.wire = wire
    assert fetcher.token().value


@pytest.mark.parametrize("wire", [Wire.RESET, Wire.SILENT])
def test_an_outage_within_the_life_of_a_token_is_not_noticed(
    fetcher: TokenFetcher, sandbox: Sandbox, proxy: TcpProxy, wire: Wire
) -> None:
    sandbox.set_token_lifetime(6.0)
    load = Load([fetcher], threads=4)
    with load.running():
        until(lambda: len(load.values) == 1)
        issued = sandbox.requests[0].at
        proxy.wire = wire
        proxy.cut_all()
        # Renewal begins at two thirds of the life; the last attempt and its pause take a second.
        until(lambda: time.time() > issued + 4.5)
        proxy.wire = Wire.GOOD
        until(lambda: sandbox.counters.tokens_issued >= 2)
        until(lambda: len(load.values) >= 2)
    assert (load.errors, load.expired) == ([], 0)


def test_a_connection_that_was_cut_while_idle_costs_nothing(
    fetcher: TokenFetcher, sandbox: Sandbox, proxy: TcpProxy
) -> None:
    first = fetcher.token()
    proxy.cut_all()
    fetcher.invalidate(first)
    assert fetcher.token().value != first.value
    assert sandbox.counters.token_requests == 2

# SPDX-License-Identifier: Apache-2.0
"""Whoever can write to the store puts back what the fleet once stored there."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from d1_signer import TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.secret import Secret
from d1_signer.token.stores import Sealer, SharedToken
from tests.servers.redis_server import RedisServer
from tests.token.conftest import ISSUER
from tests.token.fleet.conftest import STORE_KEY, FleetMaker
from tests.token.fleet.test_redis import keys, stored


def content(server: RedisServer) -> bytes:
    (name,) = keys(server, "token")
    with server.admin() as client:
        found: Any = client.get(name)
    return bytes(found)


def put(server: RedisServer, sealed: bytes) -> None:
    (name,) = keys(server, "token")
    with server.admin() as client:
        client.set(name, sealed, px=800_000)


def refuse(fetcher: TokenFetcher) -> str:
    """The banking API answers 401 to what is held."""
    token = fetcher.token()
    fetcher._young_until = float("-inf")
    fetcher.invalidate(token)
    return token.value


def forget(fetcher: TokenFetcher) -> None:
    """As when it expires: nobody has refused it."""
    fetcher._held, fetcher._fresh = None, (0.0, 0.0, fetcher._fresh[2])


def test_an_older_token_is_not_taken_by_whoever_has_seen_a_newer_one(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    one, other = fleet(), fleet()
    old = one.token().value
    assert other.token().value == old
    older = content(redis_server)
    refuse(one)
    newer = one.token().value
    forget(other)
    assert other.token().value == newer
    put(redis_server, older)
    forget(other)  # it was never told that the old one is refused
    newest = other.token().value
    assert newest not in {old, newer}
    assert sandbox.counters.token_requests == 3
    forget(one)
    assert one.token().value == newest


def test_refused_tokens_are_not_taken_however_often_they_come_back(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    sealer = Sealer(Secret(STORE_KEY.hex()), issuer_id=ISSUER, base_url=sandbox.base_url)
    fetcher = fleet()
    values = [refuse(fetcher)]
    # Sealed anew under a generation to come: as if the fleet had, which a writer cannot do.
    _, envelope = stored(redis_server)
    first = sealer.open(json.dumps(envelope).encode())
    assert first is not None
    for number in range(1, 6):
        again = SharedToken(
            value=values[number % len(values)],
            scope=first.scope,
            requested_at=time.time(),
            expires_at=time.time() + 800,
            generation=int(time.time()) + 1000 * number,
        )
        put(redis_server, sealer.seal(again))
        values.append(refuse(fetcher))
    assert len(set(values)) == sandbox.counters.token_requests == 6


def test_what_was_refused_is_remembered_until_it_has_expired(fleet: FleetMaker) -> None:
    fetcher = fleet()
    renewal: Any = fetcher._renewal
    refuse(fetcher)
    fetcher.token()
    (digest,) = renewal._refused
    ahead = 0.0
    renewal._clock = lambda: time.monotonic() + ahead
    for seconds, kept in ((890.0, True), (901.0, False)):
        ahead = seconds
        renewal._remember("another")
        assert (digest in renewal._refused) is kept


@pytest.mark.parametrize("change", [-1, 1, 10**6])
def test_a_generation_that_was_changed_opens_nothing(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, change: int
) -> None:
    first = fleet().token()
    _, envelope = stored(redis_server)
    generation: Any = envelope["generation"]
    put(redis_server, json.dumps(envelope | {"generation": generation + change}).encode())
    assert fleet().token().value != first.value
    assert sandbox.counters.token_requests == 2


def test_clocks_that_differ_and_a_store_that_lost_everything_cost_one_request_each(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer
) -> None:
    one, behind = fleet(), fleet()
    renewal: Any = behind._renewal
    renewal._wall = renewal._renewal._wall = behind._wall = lambda: time.time() - 300
    assert one.token().value == behind.token().value
    # In whose turn it is next, its clock makes no difference.
    refuse(behind)
    assert sandbox.counters.token_requests == 1
    value = behind.token().value
    forget(one)
    assert one.token().value == value
    assert sandbox.counters.token_requests == 2
    with redis_server.admin() as client:
        client.flushall()
    late = fleet()
    renewal = late._renewal
    renewal._wall = renewal._renewal._wall = late._wall = lambda: time.time() - 300
    late.token()
    forget(one)
    value = one.token().value
    assert sandbox.counters.token_requests == 4
    forget(late)
    forget(behind)
    assert late.token().value == behind.token().value == value

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from d1_signer import Signer, TokenFetcher
from d1_signer.sandbox import Sandbox
from d1_signer.token.redis_store import RedisTokenStore
from tests.servers.redis_server import RedisServer
from tests.token.conftest import ISSUER, KID, certificate_of, pem_uri, sandbox, signer
from tests.token.fleet.member import Member

__all__ = ["pem_uri", "sandbox", "signer"]  # fixtures

STORE_KEY = bytes(range(32))
FleetMaker = Callable[..., TokenFetcher]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as server:
        yield server


@pytest.fixture
def fleet(sandbox: Sandbox, signer: Signer, redis_server: RedisServer) -> Iterator[FleetMaker]:
    """Makes fetchers that know each other through Redis alone, like processes."""
    with ExitStack() as stack:

        def make(**options: Any) -> TokenFetcher:
            settings: dict[str, Any] = {
                "signer": signer,
                "issuer_id": ISSUER,
                "environment": sandbox.base_url,
                "client_certificate": certificate_of(sandbox),
                "ca_file": sandbox.ca_file,
                "store_key": STORE_KEY,
                "retry_interval": 0.01,
            }
            if "store" not in options:
                client = stack.enter_context(redis_server.client())
                settings["store"] = RedisTokenStore(client)
            return stack.enter_context(TokenFetcher(**(settings | options)))

        yield make


@pytest.fixture
def member_settings(
    sandbox: Sandbox, pem_uri: str, redis_server: RedisServer, tmp_path: Path
) -> dict[str, str]:
    """The environment of a process of the fleet."""
    key = tmp_path / "store.key"
    key.touch(mode=0o600)
    key.write_text(os.urandom(32).hex())
    return {
        "D1_SIGNER_KEY": f"{pem_uri}#{KID}",
        "D1_ISSUER_ID": ISSUER,
        "D1_ENVIRONMENT": sandbox.base_url,
        "D1_CLIENT_CERT": str(sandbox.client_certificate),
        "D1_CLIENT_KEY": str(sandbox.client_key),
        "D1_CA_FILE": str(sandbox.ca_file),
        "D1_STORE_KEY_FILE": str(key),
        "REDIS_URL": redis_server.url,
    }


@pytest.fixture
def members(member_settings: dict[str, str]) -> Iterator[Callable[..., list[Member]]]:
    """Starts processes of the fleet and waits until they are ready."""
    started: list[Member] = []

    def start(number: int, **settings: str) -> list[Member]:
        new = [Member(member_settings | settings) for _ in range(number)]
        started.extend(new)
        for member in new:
            member.ready()
        return new

    yield start
    for member in started:
        member.kill()


@pytest.fixture(autouse=True)
def no_thread_is_left(
    request: pytest.FixtureRequest,
) -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert "d1-signer-renewal" not in names, request.node.name

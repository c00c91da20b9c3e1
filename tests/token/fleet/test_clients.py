# SPDX-License-Identifier: Apache-2.0
"""Which clients of Redis a store takes, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from d1_signer import ConfigurationError
from d1_signer.sandbox import Sandbox
from d1_signer.token.redis_store import RedisTokenStore
from tests.conftest import told_by
from tests.servers.redis_server import MASTER, RedisServer
from tests.token.fleet.conftest import FleetMaker

SETTINGS = RedisTokenStore.CLIENT_SETTINGS
HOSTS = [("127.0.0.1", 1), ("127.0.0.1", 2)]
ENDLESS: dict[str, Any] = {"socket_timeout": None, "socket_connect_timeout": None}


def watched(sentinels: dict[str, Any], settings: dict[str, Any]) -> redis.Redis:
    watch = Sentinel(HOSTS, sentinel_kwargs=sentinels)  # type: ignore[no-untyped-call]
    client: redis.Redis = watch.master_for(MASTER, **settings)  # type: ignore[no-untyped-call]
    return client


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0?sock_timeout=1",
        "rediss://127.0.0.1:1/0?foo=1",
        "unix:///run/redis.sock?host=x&foo=1",
        "redis://127.0.0.1:1/0?connection_class=foo",
        "redis://127.0.0.1:1/0?protocol=9",
        "redis://127.0.0.1:1/0?username=a&credential_provider=x",
        "redis://127.0.0.1:1/0?maint_notifications_config=x",
    ],
)
@pytest.mark.parametrize("cluster", [False, True])
def test_a_setting_of_the_url_that_no_connection_takes_is_refused_at_once(
    url: str, cluster: bool
) -> None:
    named = "names a database or a socket" if cluster and "unix:" in url else "does not take"
    with pytest.raises(ConfigurationError, match=named) as refused:
        RedisTokenStore.from_url(url, cluster=cluster)
    assert refused.value.__context__ is None


@pytest.mark.parametrize("query", ["health_check_interval=5", "ssl_min_version=772"])
def test_a_setting_that_a_client_of_a_cluster_would_drop_is_refused(query: str) -> None:
    with pytest.raises(ConfigurationError, match="does not take"):
        RedisTokenStore.from_url(f"rediss://127.0.0.1:1?{query}", cluster=True)


@pytest.mark.parametrize("query", ["db=3", "max_connections=9", "health_check_interval=5"])
def test_the_settings_of_the_url_that_the_package_names_are_taken(query: str) -> None:
    RedisTokenStore.from_url(f"redis://127.0.0.1:1?{query}")


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:p@127.0.0.1:1/0?max_connections=9&socket_timeout=0.2&protocol=3",
        "rediss://127.0.0.1:1?ssl_check_hostname=yes&ssl_cert_reqs=required&db=0",
        "rediss://127.0.0.1?ssl_ca_certs=/etc/ca.pem&client_name=d1&socket_keepalive=yes",
    ],
)
def test_the_settings_that_a_client_of_a_cluster_takes_are_taken(url: str) -> None:
    RedisTokenStore.from_url(url, cluster=True)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: None, "it was given NoneType"),
        (lambda: "redis://:hunter2@127.0.0.1", "it was given str"),
        (lambda: redis.asyncio.Redis(**SETTINGS), "it was given redis.asyncio.client.Redis"),
        (lambda: redis.Redis, "it was given the class redis.client.Redis"),
        (redis.ConnectionPool, "it was given redis.connection.ConnectionPool"),
        (lambda: Sentinel(HOSTS), "it was given redis.sentinel.Sentinel"),  # type: ignore[no-untyped-call]
        (lambda: redis.Redis(**ENDLESS), "The client of the token store has no time limit"),
        (lambda: redis.Redis.from_url("redis://x", **ENDLESS), "The client of the token store"),
        (lambda: watched(SETTINGS, ENDLESS), "The client of the token store has no time limit"),
        (lambda: watched(ENDLESS, SETTINGS), "The sentinel_kwargs of the token store has no time"),
    ],
)
def test_a_client_that_does_not_fit_is_refused_where_the_store_is_made(
    make: Callable[[], Any], named: str
) -> None:
    with pytest.raises(ConfigurationError) as failure:
        RedisTokenStore(make())
    assert named in failure.value.message
    assert "CLIENT_SETTINGS" in failure.value.hint
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: redis.Redis(socket_timeout=5.0), "client"),
        (lambda: redis.Redis(**SETTINGS | {"retry": Retry(NoBackoff(), 3)}), "client"),
        (lambda: watched({"socket_timeout": 5.0}, SETTINGS), "sentinel_kwargs"),
        (lambda: watched(SETTINGS | {"retry": Retry(NoBackoff(), 3)}, SETTINGS), "sentinel_kwargs"),
    ],
)
def test_a_client_that_is_too_patient_is_warned_of(
    make: Callable[[], redis.Redis], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    RedisTokenStore(make())
    assert f"fleet.slow_client the {part} of the token store" in caplog.text


def test_the_clients_of_the_page_are_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    RedisTokenStore(redis.Redis.from_url("rediss://127.0.0.1", ssl_check_hostname=True, **SETTINGS))
    RedisTokenStore(watched(SETTINGS, SETTINGS))
    RedisTokenStore(lambda: redis.RedisCluster.from_url("redis://127.0.0.1:1", **SETTINGS))
    assert "fleet." not in caplog.text


def test_a_function_is_called_again_until_it_makes_a_client(
    fleet: FleetMaker, sandbox: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[object] = ["redis://:hunter2@x"]

    def client() -> Any:
        if not made:
            raise redis.ConnectionError("away, with hunter2")
        return made[-1]

    one, other = fleet(store=RedisTokenStore(client)), fleet()
    assert one.token().value != other.token().value
    assert "it was given str" in caplog.text
    made.clear()
    refused = one.token()
    one._young_until = float("-inf")
    one.invalidate(refused)
    assert one.token().value != other.token().value
    assert "does not answer (ConnectionError)" in caplog.text
    with redis_server.client() as found:
        made.append(found)
        one._young_until = float("-inf")
        one.invalidate(one.token())
        assert one.token().value == other.token().value
    assert sandbox.counters.token_requests == 3
    assert "hunter2" not in caplog.text


def test_the_password_of_a_client_that_is_refused_stands_in_no_frame() -> None:
    limits = {"socket_timeout": None, "socket_connect_timeout": None}
    client = redis.Redis.from_url("redis://svc:s3cret-of-redis@127.0.0.1:1", **limits)
    for given in (client, "rediss://:s3cret-of-redis@127.0.0.1:1"):
        with pytest.raises(ConfigurationError) as refused:
            RedisTokenStore(given)  # type: ignore[arg-type]
        # The client itself is the caller's, and its repr shows none.
        assert "s3cret" not in "".join(told_by(refused.value))

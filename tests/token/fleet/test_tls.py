# SPDX-License-Identifier: Apache-2.0
"""A store over TLS: no password for a server with another's certificate; which URLs serve."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from redis.cluster import RedisCluster

from d1_signer import ConfigurationError, StoreUnavailable
from d1_signer.secret import Secret
from d1_signer.token.redis_store import RedisTokenStore
from tests.conftest import told_by
from tests.servers.certificates import Authority
from tests.servers.process import free_port
from tests.servers.redis_server import RedisServer
from tests.token.test_fetcher import until

PASSWORD = "s3cret-of-redis"
SETTINGS = RedisTokenStore.CLIENT_SETTINGS

Start = Callable[..., tuple[RedisServer, str]]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def start(tmp_path: Path, authority: Authority) -> Iterator[Start]:
    """Starts Redis over TLS, with a certificate for some name; a cluster of one node, if asked."""
    with ExitStack() as stack:

        def server(*names: x509.GeneralName, cluster: bool) -> tuple[RedisServer, str]:
            certificate, key = authority.issue("redis", *names)
            port = free_port()
            options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
            options += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
            options += ["--tls-ca-cert-file", str(authority.ca_file)]
            if cluster:
                options += ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
                options += ["--tls-cluster", "yes", "--cluster-announce-ip", "127.0.0.1"]
            started = stack.enter_context(RedisServer(tmp_path, *options))
            with started.client(protocol=2, socket_timeout=20) as admin:
                if cluster:
                    admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                    until(lambda: _serves(admin), seconds=40)
                admin.acl_setuser(
                    "d1",
                    enabled=True,
                    passwords=[f"+{PASSWORD}"],
                    keys=["*"],
                    commands=["+@all"],
                )
            return started, f"rediss://127.0.0.1:{port}"

        yield server


def _serves(admin: redis.Redis) -> bool:
    state: Any = admin.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return bool(state["cluster_state"] == "ok")


OURS = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
ANOTHER = x509.DNSName("another.example")


def store_at(url: str, authority: Authority, *, cluster: bool) -> RedisTokenStore:
    return RedisTokenStore.from_url(
        url,
        username="d1",
        password=Secret(PASSWORD),
        ca_file=str(authority.ca_file),
        cluster=cluster,
    )


def logins(server: RedisServer) -> int:
    """How often somebody has given a password."""
    with server.admin() as admin:
        told: Any = admin.info("commandstats")
    return sum(told.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("auth", "hello"))


@pytest.mark.parametrize("cluster", [False, True])
def test_the_right_host_is_talked_to(start: Start, authority: Authority, cluster: bool) -> None:
    _, url = start(OURS, cluster=cluster)
    store = store_at(url, authority, cluster=cluster)
    store.save("d1-signer:{x}", b"sealed", life=20.0)
    found = store.load("d1-signer:{x}")
    assert found is not None
    assert found[0] == b"sealed"
    store.abort()


@pytest.mark.parametrize("cluster", [False, True])
def test_another_host_of_the_same_authority_gets_no_password(
    start: Start, authority: Authority, cluster: bool
) -> None:
    server, url = start(ANOTHER, cluster=cluster)
    store = store_at(url, authority, cluster=cluster)
    before = logins(server)
    with pytest.raises(StoreUnavailable) as refused:
        store.load("d1-signer:{x}")
    assert "IP address mismatch" in refused.value.message
    assert url.removeprefix("rediss://") in refused.value.message
    # One more at most: of the look itself.
    assert logins(server) - before <= 1
    assert PASSWORD not in "".join(told_by(refused.value))


UNVERIFIED: list[dict[str, Any]] = [
    {"ssl_check_hostname": False},
    {"ssl_check_hostname": True, "ssl_cert_reqs": "none"},
    {"ssl_check_hostname": True, "ssl_cert_reqs": "optional"},
    {"ssl_check_hostname": False, "ssl_cert_reqs": None},
]


@pytest.mark.parametrize("options", UNVERIFIED, ids=repr)
def test_a_client_that_does_not_verify_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="does not verify") as refused:
        RedisTokenStore(redis.Redis.from_url("rediss://127.0.0.1", **SETTINGS, **options))
    assert "ssl_check_hostname=True" in refused.value.hint


@pytest.mark.parametrize("query", ["ssl_check_hostname=no", "ssl_cert_reqs=none"])
@pytest.mark.parametrize("cluster", [False, True])
def test_a_url_that_switches_it_off_is_refused(query: str, cluster: bool) -> None:
    with pytest.raises(ConfigurationError, match="does not verify"):
        RedisTokenStore.from_url(f"rediss://127.0.0.1?{query}", cluster=cluster)


def test_a_cluster_of_ones_own_that_does_not_verify_is_refused(
    start: Start, authority: Authority
) -> None:
    _, url = start(ANOTHER, cluster=True)
    options = {"ssl_ca_certs": str(authority.ca_file), "ssl_check_hostname": False, **SETTINGS}
    with RedisCluster.from_url(url, **options) as client:
        client.get("x")  # it would talk to anybody
        with pytest.raises(ConfigurationError, match="does not verify"):
            RedisTokenStore(client)


@pytest.mark.parametrize(
    ("url", "cluster"),
    [
        ("redis://127.0.0.1:1/3", True),
        ("unix:///run/redis", True),
        ("http://:s3cret-of-redis@127.0.0.1", False),
        ("redis://:s3cret-of-redis@127.0.0.1:port", False),
        ("", False),
    ],
)
def test_a_url_that_cannot_serve_is_refused_at_once(url: str, cluster: bool) -> None:
    with pytest.raises(ConfigurationError, match="token store") as refused:
        RedisTokenStore.from_url(url, cluster=cluster)
    assert PASSWORD not in "".join(told_by(refused.value))


def test_a_cluster_that_is_away_is_named(redis_server: RedisServer) -> None:
    with redis_server.admin() as admin:
        admin.config_set("requirepass", PASSWORD)
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}"
    store = RedisTokenStore.from_url(url, cluster=True)
    for _ in range(2):  # one that is none, and one that is away
        with pytest.raises(StoreUnavailable) as failure:
            store.load("d1-signer:{x}")
        assert f"127.0.0.1:{redis_server.port} does not answer" in failure.value.message
        assert failure.value.retryable
        assert PASSWORD not in "".join(told_by(failure.value))
        redis_server.kill()

# SPDX-License-Identifier: Apache-2.0
"""Debian's redis-server, without persistence, in a folder of the test's."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.crc import key_slot

from d1_signer.token.redis_store import RedisTokenStore
from tests.servers.process import accepts, free_port, running

MASTER = "d1-tokens"


class RedisServer:
    """One server on a Unix socket and on a loopback port, to be killed, frozen and restarted."""

    def __init__(self, folder: Path, *options: str) -> None:
        # The path of a Unix socket is short, and pytest's folders are not.
        self._stack = ExitStack()
        short = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="redis")))
        self.socket = short / "s"
        self.port = free_port()
        self._folder = folder
        self._options = options
        self._running = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def client(self, **settings: Any) -> redis.Redis:
        return redis.Redis.from_url(self.url, **(RedisTokenStore.CLIENT_SETTINGS | settings))

    def admin(self) -> redis.Redis:
        """A client of the test's own, which has time on a busy machine."""
        return self.client(socket_timeout=20, socket_connect_timeout=20)

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--unixsocket", str(self.socket), "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", *self._options]
        self._process = self._running.enter_context(
            running(command, env={}, log=self._folder / "redis.log", ready=self._answers)
        )

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def option(self, name: str) -> str:
        return self._options[self._options.index(name) + 1]

    def kill(self) -> None:
        self._running.close()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stack.close()


@contextmanager
def cluster(folder: Path) -> Iterator[RedisCluster]:
    """A cluster of one node that serves all slots."""
    with Cluster(folder, masters=1, replicas=0) as nodes, nodes.client() as client:
        yield client


class Cluster:
    """Masters with an equal part of the slots each, and replicas of them."""

    def __init__(self, folder: Path, *, masters: int = 3, replicas: int = 3) -> None:
        self._masters = masters
        self._replicas = replicas
        self.nodes: list[RedisServer] = []
        for number in range(masters + replicas):
            place = folder / f"node{number}"
            place.mkdir()
            # The default port of the cluster bus is 10,000 above, where there may be none.
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            self.nodes.append(RedisServer(place, *options, "--cluster-node-timeout", "1000"))
        self._running = ExitStack()

    def client(self, **settings: Any) -> RedisCluster:
        nodes = [ClusterNode("127.0.0.1", node.port) for node in self.nodes]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, **(RedisTokenStore.CLIENT_SETTINGS | settings))

    def owner(self, key: str) -> RedisServer:
        """The node that serves a key, as most see it."""
        slot = key_slot(key.encode())
        for first, last, master, *_ in self._ask(self._alive(), "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == master[1])
        raise AssertionError(slot)

    def migrate(self, key: str) -> None:
        """Move the slot of a key to another master, as redis-cli does it."""
        slot, source = key_slot(key.encode()), self.owner(key)
        target = next(node for node in self.nodes[: self._masters] if node is not source)
        self._ask(target, "SETSLOT", slot, "IMPORTING", self._id(source))
        self._ask(source, "SETSLOT", slot, "MIGRATING", self._id(target))
        for name in self._ask(source, "GETKEYSINSLOT", slot, 100):
            with source.client(decode_responses=False) as client:
                client.execute_command("MIGRATE", "127.0.0.1", target.port, name, 0, 5000)
        for node in (target, source, *self.nodes[: self._masters]):
            self._ask(node, "SETSLOT", slot, "NODE", self._id(target))

    def _ask(self, node: RedisServer, *command: object) -> Any:
        # RESP2: its answers are lists.
        with node.client(protocol=2, socket_timeout=20) as client:
            client.response_callbacks.clear()
            return client.execute_command("CLUSTER", *command)

    def _id(self, node: RedisServer) -> str:
        name: bytes = self._ask(node, "MYID")
        return name.decode()

    def _alive(self) -> RedisServer:
        return next(node for node in self.nodes if node.alive)

    def wait(self) -> None:
        """Until every node that lives says that all slots are served."""
        until = time.monotonic() + 40
        for node in self.nodes:
            while node.alive and b"cluster_state:ok" not in self._ask(node, "INFO"):
                assert time.monotonic() < until
                time.sleep(0.05)

    def __enter__(self) -> Self:
        for node in self.nodes:
            self._running.enter_context(node)
        bounds = [16384 * number // self._masters for number in range(self._masters + 1)]
        for number, node in enumerate(self.nodes):
            if number:
                bus = self.nodes[0].option("--cluster-port")
                self._ask(node, "MEET", "127.0.0.1", self.nodes[0].port, bus)
            if number < self._masters:
                self._ask(node, "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        self.wait()
        for number in range(self._replicas):
            master = self._id(self.nodes[number % self._masters])
            replica = self.nodes[self._masters + number]
            self._until_known(replica, master)
            self._ask(replica, "REPLICATE", master)
        for node in self.nodes:
            self._until_replicated(node)
        return self

    def _until_known(self, node: RedisServer, name: str) -> None:
        while name.encode() not in self._ask(node, "NODES"):
            time.sleep(0.05)

    def _until_replicated(self, node: RedisServer) -> None:
        while self._ask(node, "NODES").count(b"slave") != self._replicas:
            time.sleep(0.05)
        with node.client(protocol=2) as client:
            while client.info("replication").get("master_link_status", "up") != "up":
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            if node.alive:
                node.thaw()
        self._running.close()


@contextmanager
def sentinels(
    folder: Path, master: RedisServer, number: int = 3
) -> Iterator[list[SentinelProcess]]:
    """Sentinels that watch over a master and its replica."""
    with ExitStack() as stack:
        watching = []
        for each in range(number):
            place = folder / f"sentinel{each}"
            place.mkdir()
            port = free_port()
            settings = place / "sentinel.conf"
            settings.write_text(
                f"bind 127.0.0.1\nport {port}\ndir {place}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {master.port} {number // 2 + 1}\n"
                f"sentinel down-after-milliseconds {MASTER} 1000\n"
                f"sentinel failover-timeout {MASTER} 3000\n"
            )
            command = ["redis-server", str(settings), "--sentinel"]
            log = place / "log"
            process = stack.enter_context(
                running(command, env={}, log=log, ready=lambda port=port: accepts(port))  # type: ignore[misc]
            )
            watching.append(SentinelProcess(port, process))
        for one in watching:
            while not one.knows(number - 1):
                time.sleep(0.05)
        yield watching


class SentinelProcess:
    """One sentinel, to be frozen."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process

    def knows(self, others: int) -> bool:
        """Whether it has found the other sentinels, and the replica."""
        with redis.Redis(port=self.port, socket_timeout=20) as client:
            state: Any = client.sentinel_master(MASTER)
        return (int(state["num-other-sentinels"]), int(state["num-slaves"])) == (others, 1)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

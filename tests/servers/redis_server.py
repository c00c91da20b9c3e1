# SPDX-License-Identifier: Apache-2.0
"""Debian's redis-server, without persistence, in a folder of the test's."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.sentinel import Sentinel

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
    # The default port of the cluster bus is 10,000 above, where there may be none.
    bus = str(free_port())
    with RedisServer(folder, "--cluster-enabled", "yes", "--cluster-port", bus) as server:
        with server.client() as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in admin.execute_command("CLUSTER", "INFO"):
                pass
        nodes = [ClusterNode("127.0.0.1", server.port)]  # type: ignore[no-untyped-call]
        with RedisCluster(startup_nodes=nodes, **RedisTokenStore.CLIENT_SETTINGS) as client:
            yield client


@contextmanager
def sentinel(folder: Path, master: RedisServer) -> Iterator[Sentinel]:
    """A sentinel that watches over a master."""
    port = free_port()
    settings = folder / "sentinel.conf"
    settings.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {folder}\n"
        f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 1\n"
    )
    command = ["redis-server", str(settings), "--sentinel"]
    with running(command, env={}, log=folder / "sentinel.log", ready=lambda: accepts(port)):
        yield Sentinel([("127.0.0.1", port)], socket_timeout=1.0)  # type: ignore[no-untyped-call]

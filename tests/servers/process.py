# SPDX-License-Identifier: Apache-2.0
"""Servers that run as processes of their own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_given: set[int] = set()


def free_port() -> int:
    """One that this process has not been given before: what was may not listen yet."""
    while True:
        with closed_port() as port:
            if port not in _given:
                _given.add(port)
                return port


@contextmanager
def closed_port() -> Iterator[int]:
    """One at which nobody listens, and nobody else can meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def running(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is ready (90 s at most), and end it afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        until = time.monotonic() + 90
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                msg = f"{command[0]} did not start:\n{log.read_text()}"
                raise RuntimeError(msg)
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True

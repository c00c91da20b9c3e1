# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy on loopback that cuts, delays, throttles and resets what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from concurrent.futures import Future
from enum import StrEnum
from typing import Self


class Wire(StrEnum):
    """How the network behaves."""

    GOOD = "good"
    REFUSED = "refused"  # a connection is reset at the client's first byte
    RESET = "reset"  # a connection is reset amid the server's answer
    CUT = "cut"  # the same, ended in order
    SILENT = "silent"  # nothing passes and nothing ends
    DELAYED = "delayed"  # each block is late
    THROTTLED = "throttled"  # a few bytes at a time


_BLOCK = 16_384
_DELAY = 0.05
_FEW = 256


class TcpProxy:
    """Forwards to one port of this machine; ``wire`` may be changed at any time."""

    def __init__(self, upstream: int) -> None:
        self.wire = Wire.GOOD
        self.connections = 0
        self._forgotten = 0
        self._upstream = upstream
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: Future[tuple[asyncio.AbstractEventLoop, int]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop, self.port = self._ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def cut_all(self) -> None:
        """Reset all connections that are open."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def forget_all(self) -> None:
        """Let nothing pass any more through the connections that are open, as a firewall does."""
        self._forgotten = self.connections

    def _reset_all(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=128)
        async with server:
            port: int = server.sockets[0].getsockname()[1]
            self._ready.set_result((asyncio.get_running_loop(), port))
            await self._ended.wait()
            self._reset_all()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.wire is Wire.REFUSED:
            await reader.read(1)
            _reset(writer)
            return
        with contextlib.suppress(OSError):
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
            writers = {writer, upstream[1]}
            self._writers |= writers
            await asyncio.gather(
                self._pump(reader, upstream[1], number, answers=False),
                self._pump(upstream[0], writer, number, answers=True),
                return_exceptions=True,
            )
            self._writers -= writers

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        number: int,
        *,
        answers: bool,
    ) -> None:
        try:
            while block := await source.read(_FEW if self.wire is Wire.THROTTLED else _BLOCK):
                if number <= self._forgotten:
                    continue
                while self.wire is Wire.SILENT and not self._ended.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                if self.wire in {Wire.DELAYED, Wire.THROTTLED}:
                    await asyncio.sleep(_DELAY if self.wire is Wire.DELAYED else _DELAY / 10)
                if answers and self.wire in {Wire.RESET, Wire.CUT}:
                    block = block[: len(block) // 2]
                target.write(block)
                await target.drain()
                if answers and self.wire is Wire.RESET:
                    _reset(target)
                if answers and self.wire in {Wire.RESET, Wire.CUT}:
                    return
        finally:
            target.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    # SO_LINGER with no time: closing sends RST instead of FIN.
    end: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

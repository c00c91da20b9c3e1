# SPDX-License-Identifier: Apache-2.0
"""The socket and the thread that a sandbox runs on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from aiohttp import web

from d1_signer.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl

    from d1_signer.sandbox.recorder import Recorder
    from d1_signer.sandbox.service import Service

# Fixed: the keys and tokens of a sandbox are for this machine only.
HOST = "127.0.0.1"

_BACKLOG = 512
_HANDSHAKE_SECONDS = 10.0
_CLOSE_SECONDS = 2.0


def _without_exception(record: logging.LogRecord) -> bool:
    # The framework logs the exception of an unreadable request, whose text quotes the request.
    if record.exc_info and record.exc_info[0] is not None:
        record.msg = f"{record.getMessage()}: {record.exc_info[0].__name__}"
        record.args = None
        record.exc_info = None
    return True


_framework_log = logging.getLogger("d1_signer.sandbox.http")
_framework_log.addFilter(_without_exception)


class Listener(socket.socket):
    """A listening socket that counts what it accepts and can cut all of it off at once.

    Raises:
        ConfigurationError: The port is taken or not allowed.
    """

    def __init__(self, port: int, recorder: Recorder) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._recorder = recorder
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.bind((HOST, port))
        except (OSError, OverflowError) as error:
            self.close()
            raise ConfigurationError(
                f"The sandbox cannot listen on {HOST}:{port}: {error}.",
                hint="Choose another port, or 0 for any free one.",
            ) from None
        # Clients that come before the thread runs wait in the queue.
        self.listen(_BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept one connection, as the event loop asks for."""
        connection, address = super().accept()
        self._accepted.add(connection)
        self._recorder.count("connections")
        return connection, address

    def cut_off(self) -> None:
        """End all connections, those amid a handshake or a blocked write included."""
        for connection in list(self._accepted):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def all_closed(self) -> bool:
        """Whether no accepted connection is open any more."""
        return all(connection.fileno() < 0 for connection in list(self._accepted))


class Running:
    """A service on its own event loop in its own thread, from construction to `stop`.

    Args:
        listener: Is closed by `stop`.
        tls: Plain http where None.
        service: Answers the requests.
    """

    def __init__(self, listener: Listener, tls: ssl.SSLContext | None, service: Service) -> None:
        self._listener = listener
        self._tls = tls
        self._service = service
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="d1-signer-sandbox", daemon=True)
        self._thread.start()
        try:
            self._loop = self._ready.result()
        except BaseException:
            self._thread.join()
            raise

    def stop(self) -> None:
        """Close all connections and wait for the thread's end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: stopped before
            self._loop.call_soon_threadsafe(self._service.stopping.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            # Not the policy's loop: others do not accept through the listener's own method.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        # A handler whose client has gone is cancelled: a long delay does not outlive its test.
        server = web.Server(
            self._service.handle,
            handler_cancellation=True,
            access_log=None,
            logger=_framework_log,
            lingering_time=1.0,
        )
        accepting = await loop.create_server(
            server,
            sock=self._listener,
            ssl=self._tls,
            backlog=_BACKLOG,
            ssl_handshake_timeout=_HANDSHAKE_SECONDS if self._tls else None,
        )
        self._ready.set_result(loop)
        await self._service.stopping.wait()
        # What was accepted gets its transport first: asyncio loses the socket of a connection whose
        # server is closed in between.
        loop.remove_reader(self._listener)
        await asyncio.sleep(0)
        accepting.close()
        self._listener.cut_off()
        await server.shutdown(_CLOSE_SECONDS)
        deadline = loop.time() + _CLOSE_SECONDS
        # Closing takes a few turns of the loop; a transport offers no event to wait for.
        while not self._listener.all_closed() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

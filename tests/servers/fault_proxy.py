# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback that misbehave: an HTTP proxy before a real one, and bare sockets."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    # Fewer bytes than announced, then the connection is closed.
    sent: int | None = None


class Dropped(Exception):
    """Close the connection without an answer."""


Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Answer]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, *_: object) -> None:
        # A client that left; what the client sees is what the tests look at.
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet for head and body, at once: otherwise each call waits 40 ms.
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(*self.proxy().upstream, timeout=30)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def proxy(self) -> FaultProxy:
        assert isinstance(self.server, _Server)
        return self.server.proxy

    def answer(self) -> None:
        proxy = self.proxy()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, dict(self.headers.items()), body)
        proxy.requests.append(request)
        fault = proxy.fault
        try:
            answer = fault(request, self.forward) if fault else self.forward(request)
        except Dropped:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[: answer.sent])
        if answer.sent is not None:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_LIST = answer  # noqa: N815 (http.server finds them by name)

    def forward(self, request: Request) -> Answer:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        self.upstream.request(request.method, request.path, request.body, headers)
        response = self.upstream.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class FaultProxy:
    """Forwards each request, or lets ``fault`` answer it.

    ``fault`` is called in the thread of the connection with the request and the function that
    forwards it; it may alter either, wait, or raise `Dropped`.
    """

    upstream: tuple[str, int]
    fault: Fault | None = None
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def listening(
    serve: Callable[[socket.socket], None], *, host: str = "127.0.0.1", port: int = 0
) -> Iterator[int]:
    """Give each connection to ``serve``, in a thread of its own, and close it after that."""
    listener = socket.create_server((host, port))
    handles: list[socket.socket] = []

    def one(connection: socket.socket, handle: socket.socket) -> None:
        with handle, contextlib.suppress(OSError):
            with connection, contextlib.suppress(OSError):
                serve(connection)
            handle.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                # Of its own, since TLS takes the descriptor of the other.
                handle = connection.dup()
                handles.append(handle)
                threading.Thread(target=one, args=(connection, handle), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # A thread that accepts or reads is not woken by a close alone.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        for handle in handles:
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def join(one: socket.socket, other: socket.socket) -> None:
    back = threading.Thread(target=_copy, args=(other, one), daemon=True)
    back.start()
    _copy(one, other)
    back.join()


@contextlib.contextmanager
def tls_in_front_of(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """A TLS listener that passes on to a server without TLS."""

    def serve(connection: socket.socket) -> None:
        with (
            context.wrap_socket(connection, server_side=True) as tls,
            socket.create_connection(("127.0.0.1", port)) as server,
        ):
            join(tls, server)

    with listening(serve) as own:
        yield own


@contextlib.contextmanager
def tunnel() -> Iterator[tuple[int, list[str]]]:
    """A proxy for CONNECT; gives its port and the first lines of what it was asked."""
    asked: list[str] = []

    def serve(connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        asked.append(head.decode().partition("\r\n")[0])
        host, _, port = asked[-1].split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            join(connection, server)

    with listening(serve) as own:
        yield own, asked


def drop(connection: socket.socket) -> None:
    """Read what comes first, a request or a greeting of TLS, and answer nothing."""
    connection.recv(65536)


def trickle(head: bytes) -> Callable[[socket.socket], None]:
    """Answer with ``head`` and then byte after byte, without an end, until the client has left."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    return serve


def endless(connection: socket.socket) -> None:
    """Answer with a body of unknown length that does not end, until the client has left."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


TRICKLES = {
    "head": trickle(b"HTTP/1.1 200 OK\r\nX-Long: "),
    "body": trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
}

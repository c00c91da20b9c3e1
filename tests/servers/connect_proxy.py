# SPDX-License-Identifier: Apache-2.0
"""An HTTP proxy for CONNECT (RFC 9110 section 9.3.6) that asks for a password, or refuses."""

from __future__ import annotations

import contextlib
import socket
import threading
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.servers.fault_proxy import join, listening

_PHRASES = {407: "Proxy Authentication Required", 403: "Forbidden"}


@dataclass
class ConnectProxy:
    """What it does may be changed at any time.

    Attributes:
        credentials: ``USER:PASSWORD`` that it asks for; None: whoever comes may pass.
        status: With which it refuses everybody; None: it connects.
        headers: Header lines of its refusals.
        answer: What it answers instead, in bytes.
        silent: Whether it answers nothing.
        asked: The heads that it got, without credentials.
        refused: How many times it said that credentials are wrong or missing.
        sent: Credentials that it got.
    """

    credentials: str | None = field(default=None, repr=False)
    status: int | None = None
    headers: tuple[str, ...] = ()
    answer: bytes | None = None
    silent: bool = False
    port: int = 0
    asked: list[str] = field(default_factory=list)
    refused: int = 0
    sent: list[str] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[ConnectProxy]:
        with listening(self._serve) as self.port:
            yield self

    def _serve(self, connection: socket.socket) -> None:
        lines = _head(connection).split("\r\n")
        method, target, version = lines[0].split()
        fields = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])
        }
        assert (method, version, fields["host"]) == ("CONNECT", "HTTP/1.1", target)
        given = fields.get("proxy-authorization", "")
        pair = b64decode(given.removeprefix("Basic ")).decode() if given else None
        with self._lock:
            self.asked.append(target)
            self.sent += [pair] if pair else []
        if self.silent:
            connection.recv(1)  # until the client has left
        elif self.answer is not None:
            connection.sendall(self.answer)
        elif self.status is not None:
            self._refuse(connection, self.status)
        elif self.credentials is not None and pair != self.credentials:
            with self._lock:
                self.refused += 1
            self._refuse(connection, 407)
        else:
            host, _, port = target.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port))) as server:
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                join(connection, server)

    def _refuse(self, connection: socket.socket, status: int) -> None:
        headers = self.headers or (('Proxy-Authenticate: Basic realm="p"',) * (status == 407))
        head = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'No')}", *headers, "Content-Length: 2"]
        connection.sendall("\r\n".join([*head, "", "no"]).encode())


def _head(connection: socket.socket) -> str:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError
        head += byte
    return head.decode().removesuffix("\r\n\r\n")

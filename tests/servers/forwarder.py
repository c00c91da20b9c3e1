# SPDX-License-Identifier: Apache-2.0
"""A TCP forwarder whose connections pass nothing any more, break, or are refused; and a name server
for one name, whose address changes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Self


class Forwarder:
    """Forwards to a port of this machine."""

    def __init__(self, upstream: int, host: str = "127.0.0.1", port: int = 0) -> None:
        self._upstream = upstream
        self._deaf: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.host, self.port = host, port
        self.accepted = 0

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()

    def listen(self) -> None:
        """Take connections, again."""
        self._listener = socket.create_server((self.host, self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def go_deaf(self) -> None:
        """What is open stays open, takes all bytes and passes none; new connections work."""
        self._deaf |= self._open

    def reset(self) -> None:
        """Break what is open, by a reset."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.shutdown(socket.SHUT_RD)  # wakes who reads, and who then closes it

    def refuse(self) -> None:
        """Take no connection any more, and break what is open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.accepted += 1
                self._open |= {client}
                thread = threading.Thread(target=self._join, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _join(self, client: socket.socket) -> None:
        upstream = ("127.0.0.1", self._upstream)
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(upstream) as server,
        ):
            back = threading.Thread(target=self._pass, args=(server, client, client))
            back.start()
            self._pass(client, server, client)
            back.join()
        self._open.discard(client)

    def _pass(self, source: socket.socket, target: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if client not in self._deaf:
                    target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class NameServer:
    """Answers every question for an address with one address (RFC 1035)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, client = self._socket.recvfrom(4096)
                end = 12
                while asked[end]:
                    end += asked[end] + 1
                question = asked[12 : end + 5]
                is_address = question[-4:-2] == b"\0\1"
                answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4)
                told = answer + socket.inet_aton(self.address) if is_address else b""
                head = asked[:2] + b"\x81\x80" + struct.pack(">4H", 1, int(is_address), 0, 0)
                self._socket.sendto(head + question + told, client)

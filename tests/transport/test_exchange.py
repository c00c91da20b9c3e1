# SPDX-License-Identifier: Apache-2.0
"""The limits of one exchange, each for what it is named after."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable

import pytest
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from d1_signer.transport.exchange import Answer, Http
from tests.servers.fault_proxy import drop, listening


def exchange(serve: Callable[[socket.socket], None], *, connect: float, read: float) -> Answer:
    http = Http(
        "The service", ssl.create_default_context(), connect_timeout=connect, read_timeout=read
    )
    with listening(serve) as port:
        try:
            return http.exchange(
                "GET",
                f"http://127.0.0.1:{port}/",
                headers={},
                body=None,
                until=time.monotonic() + 20,
            )
        finally:
            http.close()


def test_an_answer_may_take_longer_than_a_connection() -> None:
    def late(connection: socket.socket) -> None:
        connection.recv(65536)
        threading.Event().wait(1.2)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")

    assert exchange(late, connect=1.0, read=15.0).body == b"late"


def test_an_answer_may_take_no_longer_than_a_read() -> None:
    over = threading.Event()

    def silent(connection: socket.socket) -> None:
        connection.recv(65536)
        over.wait(20)

    started = time.monotonic()
    try:
        with pytest.raises(ReadTimeoutError):
            exchange(silent, connect=15.0, read=0.2)
    finally:
        over.set()
    assert time.monotonic() - started < 10


class Stop(BaseException):
    """What a signal's handler raises."""


def test_an_interrupted_exchange_holds_nothing_of_what_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(http.client.HTTPResponse, "begin", interrupted)
    service = Http("It", ssl.create_default_context(), connect_timeout=20, read_timeout=20)
    with listening(drop) as port, pytest.raises(Stop) as caught:
        service.exchange(
            "POST",
            f"http://127.0.0.1:{port}/",
            headers={"X-Vault-Token": "hvs." + "x" * 20},
            body=b"secret_id=" + b"y" * 20,
            until=time.monotonic() + 20,
        )
    service.close()
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    told = repr([frame.f_locals for frame in frames if frame.f_code.co_filename != __file__])
    assert "x" * 20 not in told
    assert "y" * 20 not in told


def test_a_length_that_is_told_in_two_ways_is_not_read() -> None:
    sent = 0

    def endless(connection: socket.socket) -> None:
        nonlocal sent
        connection.recv(65536)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        while True:
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000

    with pytest.raises(ProtocolError, match="two ways"):
        exchange(endless, connect=15.0, read=15.0)
    assert sent < 64 << 20

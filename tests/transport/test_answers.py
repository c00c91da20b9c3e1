# SPDX-License-Identifier: Apache-2.0
"""Nothing that is left in a connection is ever read as the answer to another request."""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from cryptography import x509

from d1_signer import Environment, TokenResponseError, TokenUnavailable
from d1_signer.secret import Secret
from d1_signer.token.endpoint import TokenEndpoint
from d1_signer.token.response import Grant
from d1_signer.transport import connections, session as sessions
from d1_signer.transport.chunks import Chunks, FramingError
from d1_signer.transport.client import ClientTls
from d1_signer.transport.failures import failure_of
from d1_signer.transport.proxies import Proxy
from d1_signer.transport.response import received
from d1_signer.transport.session import TlsAdapter, new_session
from tests.servers.fault_proxy import listening, tunnel
from tests.transport.test_handshakes import server_certificate, server_context

POISON = "of-nobody"
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def body(name: str) -> bytes:
    grant = {"access_token": name, "token_type": "Bearer", "expires_in": 900}
    return json.dumps(grant).encode()


def answer(name: str, *lines: str, status: str = "200 OK", length: int | None = None) -> bytes:
    content = body(name)
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {length or len(content)}", *lines)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def chunked(
    name: str, *lines: str, end: bytes = b"0\r\nX-Trailer: x\r\n\r\n", size: str = ""
) -> bytes:
    content = body(name)
    head = "\r\n".join(("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *lines)).encode()
    first = f"5;note=x\r\n{content[:5].decode()}\r\n{size or f'{len(content) - 5:X}'}\r\n".encode()
    return head + b"\r\n\r\n" + first + content[5:] + b"\r\n" + end


OTHER = answer(POISON)
# What is sent at once, and what is sent behind it; then whether the connection is closed.
Sent = tuple[bytes, bytes, bool]
GOOD: dict[str, Callable[[str], Sent]] = {
    "plain": lambda name: (answer(name), b"", False),
    "chunked": lambda name: (chunked(name), b"", False),
    "interim": lambda name: (INTERIM + answer(name), b"", False),
    "interim-100": lambda name: (
        b"HTTP/1.1 100 Continue\r\n\r\n" + INTERIM + answer(name),
        b"",
        False,
    ),
    "two-equal-lengths": lambda name: (
        answer(name, f"Content-Length: {len(body(name))}"),
        b"",
        False,
    ),
    "second": lambda name: (answer(name) + OTHER, b"", False),
    "second-behind-chunks": lambda name: (chunked(name) + OTHER, b"", False),
    "late": lambda name: (answer(name), OTHER, False),
    "late-behind-chunks": lambda name: (chunked(name), OTHER, False),
    "late-in-two": lambda name: (answer(name) + OTHER[:20], OTHER[20:], False),
    "late-and-closed": lambda name: (answer(name), OTHER, True),
    "late-interim": lambda name: (answer(name), INTERIM, False),
    "closing-with-more": lambda name: (answer(name, "Connection: close") + OTHER, b"", False),
    "closed": lambda name: (answer(name), b"", True),
    "chunks-in-1.0": lambda name: (
        chunked(name, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"),
        b"",
        False,
    ),
}
BAD: dict[str, Callable[[str], Sent]] = {
    "cut": lambda name: (answer(name, length=500), b"", True),
    "cut-in-status": lambda name: (answer(name)[:10], b"", True),
    "cut-in-head": lambda name: (answer(name)[:20], b"", True),
    "cut-behind-line": lambda name: (answer(name)[:17], b"", True),
    "cut-behind-length": lambda name: (answer(name).partition(b"\r\n\r\n")[0] + b"\r\n", b"", True),
    "cut-amid-chunk": lambda name: (chunked(name)[:-30], b"", True),
    "cut-before-last-chunk": lambda name: (chunked(name, end=b""), b"", True),
    "length-and-chunks": lambda name: (chunked(name, "Content-Length: 5"), b"", False),
    "two-lengths": lambda name: (answer(name, "Content-Length: 5"), b"", False),
    "list-of-lengths": lambda name: (answer(name, "Content-Length: 5, 70"), b"", False),
    "chunk-in-python": lambda name: (chunked(name, size="0x40"), b"", False),
    "chunk-negative": lambda name: (chunked(name, size="-1"), b"", False),
    "chunk-too-short": lambda name: (chunked(name, size="3"), b"", False),
    "chunks-in-chunks": lambda name: (chunked(name, "Transfer-Encoding: chunked"), b"", False),
    "gzip-in-chunks": lambda name: (chunked(name, "Transfer-Encoding: gzip"), b"", False),
    "switching": lambda name: (answer(name, status="101 Switching Protocols"), b"", False),
}
KINDS = GOOD | BAD


class Server:
    """Answers a request as the kind in its path or its correlation id says."""

    def __init__(self) -> None:
        self.context: ssl.SSLContext | None = None
        self.connections = 0
        self.settled = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        self.connections += 1
        # Else the system holds back what follows an answer until that is acknowledged.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.context is None:
            self.serve(connection)
            return
        with self.context.wrap_socket(connection, server_side=True) as tls:
            self.serve(tls)

    def serve(self, connection: socket.socket) -> None:
        left = b""
        while True:
            while b"\r\n\r\n" not in left:
                data = connection.recv(65536)
                if not data:
                    return
                left += data
            head, _, left = left.partition(b"\r\n\r\n")
            told = re.search(rb"(?i)content-length: (\d+)", head)
            length = int(told[1]) if told else 0
            while len(left) < length:
                left += connection.recv(65536)
            left = left[length:]
            asked = re.search(rb"([a-z0-9.-]+)_(\d{9})", head)
            assert asked is not None
            now, behind, closed = KINDS[asked[1].decode()](asked[2].decode())
            connection.sendall(now)
            if behind:
                connection.sendall(behind)
            if closed:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            self.settled.set()
            if closed:
                return


Ask = Callable[[str, str], str | None]
Client = Callable[..., AbstractContextManager[Ask]]


@contextmanager
def place_of(server: Server, folder: Path, *, tls: bool) -> Iterator[tuple[str, ssl.SSLContext]]:
    """URL of a server, and the context for it."""
    context = ssl.create_default_context()
    if tls:
        certificate = server_certificate(folder, x509.DNSName("localhost"), common_name="any")
        server.context = server_context(certificate)
        context = ssl.create_default_context(cafile=str(certificate))
    with listening(server) as port:
        yield f"http{'s' if tls else ''}://localhost:{port}", context


@contextmanager
def session_of(url: str, context: ssl.SSLContext, proxy: Proxy | None = None) -> Iterator[Ask]:
    adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0), proxy=proxy)
    with new_session(adapter, for_callers=True) as session:

        def ask(kind: str, name: str) -> str | None:
            try:
                got = session.get(f"{url}/banking/{kind}_{name}")
            except requests.RequestException:
                return None
            return str(got.json()["access_token"]) if got.status_code == 200 else None

        yield ask


@contextmanager
def token_connection(url: str, context: ssl.SSLContext) -> Iterator[Ask]:
    endpoint = TokenEndpoint(
        Environment.of(f"{url}/authz/v1"),
        ClientTls(context, None),
        proxy=None,
        connect_timeout=20.0,
        read_timeout=20.0,
    )

    def ask(kind: str, name: str) -> str | None:
        deadline = time.monotonic() + 20
        reply = endpoint.post(Secret("a.b.c"), correlation_id=f"{kind}_{name}", deadline=deadline)
        if isinstance(reply.outcome, Grant):
            return reply.outcome.value
        assert isinstance(reply.outcome, TokenResponseError | TokenUnavailable)
        return None

    yield ask
    endpoint.close()


@pytest.mark.parametrize("calls", [300, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("client", [session_of, token_connection])
def test_no_answer_is_that_of_another_request(
    tmp_path: Path, calls: int, client: Client, tls: bool
) -> None:
    server, chosen = Server(), random.Random(20)
    kept = 0
    with place_of(server, tmp_path, tls=tls) as place, client(*place) as ask:
        for number in range(calls):
            kind = "plain" if chosen.random() < 0.3 else chosen.choice(list(KINDS))
            name, before = f"{number:09}", server.connections
            server.settled.clear()
            got = ask(kind, name)
            # In one thread with the answer: what arrives after a request is sent is its answer, to
            # everybody who speaks HTTP/1.1.
            assert server.settled.wait(20)
            assert got == (name if kind in GOOD else None), kind
            kept += server.connections == before
    assert kept > calls / 4


@pytest.mark.parametrize(
    ("kind", "number_of_them"), [("plain", 1), ("chunked", 1), ("chunks-in-1.0", 3)]
)
@pytest.mark.parametrize("client", [session_of, token_connection])
def test_a_connection_is_used_again_where_the_end_of_its_answer_was_certain(
    tmp_path: Path, client: Client, kind: str, number_of_them: int
) -> None:
    server = Server()
    with place_of(server, tmp_path, tls=True) as place, client(*place) as ask:
        for number in range(3):
            assert ask(kind, f"{number:09}") == f"{number:09}"
    assert server.connections == number_of_them


def test_a_connection_rests_before_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[float] = []

    def noting(sock: socket.socket, *, within: float = 0.0) -> bytes | None:
        waited.append(within)
        return received(sock)

    monkeypatch.setattr(sessions, "_REST", 1000.0)
    monkeypatch.setattr(connections, "received", noting)
    server = Server()
    with place_of(server, tmp_path, tls=True) as place, session_of(*place) as ask:
        for number in range(2):
            assert ask("plain", f"{number:09}") == f"{number:09}"
    assert 900 < max(waited) <= 1000
    assert server.connections == 1


def test_a_proxys_tunnel_is_made_anew_where_something_was_left(tmp_path: Path) -> None:
    server = Server()
    kinds = ("plain", "second", "plain", "second", "second-behind-chunks", "plain", "plain")
    with (
        tunnel() as (proxy, asked),
        place_of(server, tmp_path, tls=True) as place,
        session_of(*place, proxy=Proxy(f"http://127.0.0.1:{proxy}")) as ask,
    ):
        for number, kind in enumerate(kinds):
            assert ask(kind, f"{number:09}") == f"{number:09}"
    assert len(asked) == 4


def test_what_comes_between_the_pool_and_the_request_ends_a_tunnel_too(tmp_path: Path) -> None:
    server = Server()
    with tunnel() as (proxy, asked), place_of(server, tmp_path, tls=True) as (url, context):
        through = Proxy(f"http://127.0.0.1:{proxy}")
        adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0), proxy=through)
        with new_session(adapter, for_callers=True) as session:
            session.get(f"{url}/plain_000000001")
            manager = next(iter(adapter.proxy_manager.values()))
            pool = manager.pools[next(iter(manager.pools.keys()))]
            taken = pool.pool.queue[-1]
            looked_at: list[bool] = []

            class Late(type(taken)):  # type: ignore[misc]
                @property
                def is_connected(self) -> bool:
                    looked_at.append(True)
                    return len(looked_at) != 2 and bool(super().is_connected)

            taken.__class__ = Late
            assert session.get(f"{url}/plain_000000002").json()["access_token"] == "000000002"
    assert len(looked_at) == 2
    assert len(asked) == 2


BODILESS: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "head": ("HEAD", answer),
    "head-chunked": ("HEAD", chunked),
    "204": ("GET", lambda name: answer(name, status="204 No Content")),
    "204-chunked": (
        "GET",
        lambda name: chunked(name).replace(b"200 OK", b"204 No Content"),
    ),
    "304": ("GET", lambda name: answer(name, status="304 Not Modified")),
}


@pytest.mark.parametrize("kind", BODILESS)
def test_a_body_where_there_can_be_none_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    method, made = BODILESS[kind]
    monkeypatch.setitem(KINDS, kind, lambda name: (made(name) + OTHER, b"", False))
    server = Server()
    with place_of(server, tmp_path, tls=False) as (url, context):
        adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0))
        with new_session(adapter, for_callers=True) as session:
            for number in range(5):
                got = session.request(method, f"{url}/{kind}_{number:09}")
                assert got.content == b""
                # What a GET would have; of two ways to tell a length, neither is handed on.
                assert ("Content-Length" in got.headers) == (not kind.endswith("-chunked"))
                assert "Transfer-Encoding" not in got.headers
                assert (
                    session.get(f"{url}/plain_{number:09}").json()["access_token"] == f"{number:09}"
                )


@pytest.mark.parametrize("leave", ["release_conn", "close", "drain_conn"])
def test_a_body_that_nobody_read_is_left_with_its_connection(tmp_path: Path, leave: str) -> None:
    server = Server()
    with place_of(server, tmp_path, tls=False) as (url, context):
        adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0))
        with new_session(adapter, for_callers=True) as session:
            for number, kind in enumerate(("plain", "chunked", "second", "interim") * 3):
                unread = session.get(f"{url}/{kind}_{number:09}", stream=True)
                unread.raw.read(3)
                getattr(unread.raw, leave)()
                name = f"1{number:08}"
                assert session.get(f"{url}/plain_{name}").json()["access_token"] == name


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_what_a_server_says_before_it_is_asked_is_no_answer(tmp_path: Path, tls: bool) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    server = server_context(certificate)
    server.num_tickets = 0  # what comes after the handshake is the answer
    over = threading.Event()

    def eager(connection: socket.socket) -> None:
        if tls:
            connection = server.wrap_socket(connection, server_side=True)
        with connection:
            connection.sendall(OTHER)
            over.wait(20)

    context = ssl.create_default_context(cafile=str(certificate))
    adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0))
    with listening(eager) as port, new_session(adapter) as session:
        url = f"http{'s' if tls else ''}://localhost:{port}/"
        pool: Any = adapter.get_connection_with_tls_context(
            requests.Request("GET", url).prepare(), verify=True
        )

        class Slow(pool.ConnectionCls):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                assert select.select([self.sock], [], [], 20)[0]

        pool.ConnectionCls = Slow
        with pytest.raises(requests.ConnectionError, match="before it was asked"):
            session.get(url)
        over.set()


def test_interim_answers_without_end_are_no_answer() -> None:
    def endless(connection: socket.socket) -> None:
        connection.recv(65536)
        while True:
            connection.sendall(INTERIM * 100)

    with listening(endless) as port:
        context = ssl.create_default_context()
        adapter = TlsAdapter(ClientTls(context, None), timeouts=lambda: (20.0, 20.0))
        with (
            new_session(adapter, for_callers=True) as session,
            pytest.raises(requests.ConnectionError, match="informational"),
        ):
            session.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "lines", [b"X-Long: " + b"a" * 70_000 + b"\r\n", b"X-Many: a\r\n" * 110], ids=["long", "many"]
)
def test_a_head_beyond_all_measure_is_told_as_that(lines: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + lines + b"\r\n{}")
        connection.recv(1)  # until it is left

    with listening(answer) as port:
        adapter = TlsAdapter(
            ClientTls(ssl.create_default_context(), None), timeouts=lambda: (20.0, 20.0)
        )
        with (
            new_session(adapter, for_callers=True) as session,
            pytest.raises(requests.ConnectionError, match="its head"),
        ):
            session.get(f"http://127.0.0.1:{port}/")


def test_an_answer_without_a_certain_end_is_not_told_as_one_that_was_cut() -> None:
    error = urllib3.exceptions.ProtocolError("Connection aborted.", FramingError("two lengths"))
    assert failure_of(error).told() == "the answer failed: it cannot be read: two lengths"


@pytest.mark.parametrize("cut", [b"", b"5", b"5\r", b"5\r\nabc", b"3\r\nabc\r\n0\r\n"])
def test_what_is_cut_amid_the_framing_is_told_as_cut(cut: bytes) -> None:
    chunks = Chunks(io.BufferedReader(io.BytesIO(cut)))
    with pytest.raises(http.client.IncompleteRead):
        chunks.read()

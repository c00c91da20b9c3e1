# SPDX-License-Identifier: Apache-2.0
"""Connections that are cut, answers that drip or are malformed, and forks between two calls."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import requests

from d1_signer import (
    Environment,
    Limits,
    Signer,
    TokenFetcher,
    TokenRefusedError,
    TokenUnavailable,
)
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.secret import Secret
from d1_signer.token.endpoint import TokenEndpoint
from d1_signer.transport.client import ClientTls
from d1_signer.transport.session import new_session
from tests.token.conftest import ISSUER, FetcherMaker, certificate_of
from tests.token.test_fetcher import age, workers


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server on loopback that does as told with one connection; its base URL without scheme."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}/authz/v1"
        finally:
            thread.join(20)
            assert not thread.is_alive()


def read_assertion(connection: socket.socket) -> bytes:
    data = b""
    while b"assertion=" not in data or data.rpartition(b"assertion=")[2].count(b".") < 2:
        data += connection.recv(65536)
    return data.rpartition(b"assertion=")[2]


def test_header_lines_that_cannot_be_read_are_not_logged(
    make_fetcher: FetcherMaker, caplog: pytest.LogCaptureFixture
) -> None:
    echoed = []

    def echo(connection: socket.socket) -> None:
        echoed.append(read_assertion(connection))
        connection.sendall(
            b"HTTP/1.1 400 Bad Request\r\nX-One: 1\r\nrefused: is this\r\nrefused "
            + echoed[0]
            + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
        )

    with answering(echo) as place:
        fetcher = make_fetcher(environment=f"http://{place}", client_certificate=None, ca_file=None)
        with pytest.raises(TokenRefusedError):
            fetcher.token()
    assert "tls.malformed_headers" in caplog.text
    assert echoed[0].decode() not in caplog.text


def drip(connection: socket.socket) -> None:
    while True:  # each head comes within the time for a read; ends when the client has gone
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        threading.Event().wait(0.02)


def test_an_answer_that_drips_ends_at_the_deadline() -> None:
    with answering(drip) as place:
        endpoint = TokenEndpoint(
            Environment.of(f"http://{place}"),
            ClientTls(ssl.create_default_context(), None),
            proxy=None,
            connect_timeout=30.0,
            read_timeout=30.0,
        )
        deadline = time.monotonic() + 0.3
        reply = endpoint.post(Secret("a.b.c"), correlation_id="0" * 32, deadline=deadline)
        endpoint.close()
    assert isinstance(reply.outcome, TokenUnavailable)
    assert reply.status is None


def test_closing_during_a_handshake_leaves_no_thread(
    make_fetcher: FetcherMaker,
) -> None:
    sent: list[bytes] = []
    accepted = threading.Event()

    def keep_silent(connection: socket.socket) -> None:
        accepted.set()
        while data := connection.recv(65536):
            sent.append(data)

    with answering(keep_silent) as place:
        fetcher = make_fetcher(
            environment=f"https://{place}", limits=Limits(total=60, connect=60, read=60)
        )
        fetcher.prefetch()
        assert accepted.wait(20)
        fetcher.close()
        assert not workers()
    assert len(b"".join(sent)) < 4096  # a ClientHello at most


def test_a_cut_connection_sends_nothing_in_clear(fetcher: TokenFetcher) -> None:
    fetcher.token()
    pools = fetcher._endpoint._adapter.poolmanager.pools
    (key,) = pools.keys()
    sock = pools[key].pool.queue[-1].sock
    fetcher._endpoint.abort()
    # Cut or not, this is the TLS stream: once its state is gone, Python would send plain text.
    assert isinstance(sock, ssl.SSLSocket)
    assert sock.version() is not None
    with pytest.raises((ssl.SSLError, BrokenPipeError)):
        sock.sendall(b"assertion=")
    assert fetcher.token().value


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: close", b"HTTP/1.0 200 OK"])
def test_closing_amid_an_answer_that_ends_its_connection_leaves_no_thread(
    make_fetcher: FetcherMaker, head: bytes
) -> None:
    begun = threading.Event()

    def drip_body(connection: socket.socket) -> None:
        read_assertion(connection)
        connection.sendall(head + b"\r\nContent-Length: 60000\r\n\r\n")
        while True:
            connection.sendall(b" ")
            begun.set()
            threading.Event().wait(0.02)

    with answering(drip_body) as place:
        fetcher = make_fetcher(
            environment=f"http://{place}",
            client_certificate=None,
            ca_file=None,
            limits=Limits(total=60),
        )
        fetcher.prefetch()
        assert begun.wait(20)
        fetcher.close()
        assert not workers()


def test_a_multipart_answer_has_no_malformed_header(
    fetcher: TokenFetcher, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/form-data; boundary=abc\r\n"
            b"Content-Length: 14\r\n\r\n--abc--\r\n\r\n\r\n\r\n"
        )

    adapter = fetcher._endpoint._adapter
    with answering(answer) as place, new_session(adapter) as session:
        assert session.get(f"http://{place}").status_code == 200
    assert "tls.malformed_headers" not in caplog.text


def test_nothing_is_sent_by_who_connects_while_the_calls_are_cut(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    adapter = fetcher._endpoint._adapter
    with new_session(adapter) as session, adapter.bounded(time.monotonic() + 30):
        adapter.abort()
        with pytest.raises(requests.ConnectionError):
            session.post(sandbox.token_endpoint)
    assert sandbox.counters.token_requests == 0


def test_a_forked_child_leaves_the_parents_connection_alone(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    first = fetcher.token()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):  # the child must not run the parent's tests
            fetcher._endpoint.abort()
            fetcher.close()
        os._exit(0)
    os.waitpid(child, 0)
    fetcher.invalidate(first)
    age(fetcher, 60)
    assert fetcher.token().value != first.value
    assert sandbox.counters.connections == 1


def test_a_fork_amid_a_cut_does_not_hold_up_the_child(fetcher: TokenFetcher) -> None:
    fetcher.token()
    connections = fetcher._endpoint._adapter._connections
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with connections.lock:
            held.set()
            go_on.wait(20)

    holding = threading.Thread(target=hold)
    holding.start()
    assert held.wait(20)
    child = os.fork()  # runs the hooks of all libraries in the child
    if child == 0:
        os._exit(0)
    go_on.set()
    holding.join()
    assert exit_code(child) == 0


# A program of its own: a thread that waits for the interpreter at the moment of the fork would hold
# it in the child for ever, whatever the child does.
FORKED_BY_C = """
import ctypes, os, ssl, sys
from d1_signer.transport.client import ClientTls
from d1_signer.transport.session import TlsAdapter, new_session

adapter = TlsAdapter(ClientTls(ssl.create_default_context(), None), timeouts=lambda: (10.0, 10.0))
with new_session(adapter) as session:
    os.write(1, b"%d\\n" % session.get(sys.argv[1]).status_code)
    child = ctypes.PyDLL(None).fork()
    os.write(1, b"%d\\n" % session.get(sys.argv[1]).status_code)
    if child == 0:
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_child_of_a_fork_that_python_was_not_told_of_has_its_own_connection() -> None:
    with Sandbox(issuer_id=ISSUER, tls=False) as sandbox:
        command = [sys.executable, "-c", FORKED_BY_C, f"{sandbox.banking_url}/ping"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode, ran.stdout.split()) == (0, ["401"] * 3), ran.stderr
        assert sandbox.counters.connections == 2


def exit_code(child: int) -> int:
    """How a child ended; one that hangs is killed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_moment_to_retry_after_is_one_of_the_servers_clock(
    make_fetcher: FetcherMaker, signer: Signer
) -> None:
    with Sandbox(issuer_id=ISSUER, clock=lambda: time.time() + 400) as ahead:
        ahead.register_key(signer.kid, signer.public_key.jwk())
        ahead.misbehave(Fault.STATUS_503, retry_after=60, as_date=True)
        fetcher = make_fetcher(
            environment=ahead.base_url,
            client_certificate=certificate_of(ahead),
            ca_file=ahead.ca_file,
            limits=Limits(total=20),
        )
        with pytest.raises(TokenUnavailable) as failure:
            fetcher.token()
    told = failure.value.details["retry_after"]
    assert isinstance(told, float)
    assert 30 < told <= 61

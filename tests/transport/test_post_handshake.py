# SPDX-License-Identifier: Apache-2.0
"""A server of TLS 1.3 that asks for the client certificate after the handshake, as Apache does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from d1_signer import ClientCertificate, SignerClosedError, TokenFetcher, open_signer
from d1_signer.events import Event, SignEvent
from d1_signer.transport.client import ClientTls
from tests.servers.certificates import Authority, self_signed
from tests.servers.process import free_port
from tests.token.conftest import FetcherMaker
from tests.transport.in_memory import Pair

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


class Asking:
    """A server that asks once it has seen the request, and answers when it has the certificate."""

    def __init__(self, folder: Path, authority: Path) -> None:
        self.ca_file, key = self_signed(folder)
        self.seen: list[str] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(self.ca_file, key)
        self._context.load_verify_locations(authority)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.post_handshake_auth = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self._listener.getsockname()[1]}/authz/v1"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            plain.settimeout(20)
            with (
                contextlib.suppress(OSError),
                plain,
                self._context.wrap_socket(plain, server_side=True) as tls,
            ):
                self._answer(tls)

    def _answer(self, tls: ssl.SSLSocket) -> None:
        assert tls.getpeercert() is None
        tls.recv(1 << 16)
        tls.verify_client_post_handshake()
        tls.sendall(ANSWER[:10])
        tls.settimeout(0.05)
        until = time.monotonic() + 20
        while not tls.getpeercert() and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                if not tls.recv(1):
                    return
        subject: Any = tls.getpeercert()
        self.seen.append(subject["subject"][0][0][1])
        tls.sendall(ANSWER[10:])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A signer and its certificate."""
    return Pair(tmp_path)


@pytest.fixture
def asking(pair: Pair, tmp_path: Path) -> Iterator[Asking]:
    (tmp_path / "asking").mkdir()
    both = tmp_path / "both.pem"
    files = Authority(tmp_path / "asking")
    both.write_bytes(files.ca_file.read_bytes() + pair.authority.file.read_bytes())
    pair.files = files.issue("client")  # type: ignore[attr-defined]
    server = Asking(tmp_path / "asking", both)
    yield server
    server.close()


def by_session(fetcher: TokenFetcher) -> int:
    with fetcher.session() as session:
        session.auth = None
        return session.get(fetcher.environment.banking_url).status_code


def by_httpx(fetcher: TokenFetcher) -> int:
    with httpx.Client(verify=fetcher.ssl_context, trust_env=False, timeout=20) as http:
        return http.get(fetcher.environment.banking_url).status_code


def by_httpx_async(fetcher: TokenFetcher) -> int:
    async def call() -> int:
        context = fetcher.ssl_context
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=20) as http:
            return (await http.get(fetcher.environment.banking_url)).status_code

    return asyncio.run(call())


WAYS: list[Callable[[TokenFetcher], int]] = [by_session, by_httpx, by_httpx_async]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["file", "signer"])
def test_the_certificate_is_shown_when_it_is_asked_for(
    make_fetcher: FetcherMaker,
    asking: Asking,
    pair: Pair,
    kind: str,
    way: Callable[[TokenFetcher], int],
) -> None:
    events: list[Event] = []
    with open_signer(pair.uri, kid="tls", observers=[events.append]) as signer:
        events.clear()
        key = ClientCertificate(pair.path, signer)
        if kind == "file":
            key = ClientCertificate(*pair.files)  # type: ignore[attr-defined]
        fetcher = make_fetcher(
            environment=asking.url, client_certificate=key, ca_file=asking.ca_file
        )
        assert way(fetcher) == 200
    assert asking.seen == ["client"]
    uses = [event.use for event in events if isinstance(event, SignEvent)]
    names = [use.references for use in uses if use]
    assert names == ([(("server", "localhost"),)] if kind == "signer" else [])


@pytest.mark.parametrize("way", WAYS)
def test_what_the_signer_raises_then_comes_out_as_it_was(
    make_fetcher: FetcherMaker,
    asking: Asking,
    pair: Pair,
    way: Callable[[TokenFetcher], int],
) -> None:
    fetcher = make_fetcher(
        environment=asking.url,
        client_certificate=ClientCertificate(pair.path, pair.signer),
        ca_file=asking.ca_file,
    )
    pair.signer.close()
    with pytest.raises(SignerClosedError):
        way(fetcher)
    with pytest.raises(SignerClosedError):
        fetcher.token()


def test_a_second_handshake_of_tls_12(pair: Pair, tmp_path: Path) -> None:
    """How a server of TLS 1.2 asks later on: OpenSSL's own, which does so at the letter R."""
    events: list[Event] = []
    (tmp_path / "renegotiating").mkdir()
    certificate, key = self_signed(tmp_path / "renegotiating")
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1"]
    command += ["-tls1_2", "-no_resumption_on_reneg"]
    command += ["-cert", str(certificate), "-key", str(key), "-CAfile", str(pair.authority.file)]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    with server, open_signer(pair.uri, kid="tls", observers=[events.append]) as signer:
        assert server.stdin is not None
        assert server.stdout is not None
        events.clear()
        tls = ClientTls(ClientCertificate(pair.path, signer), certificate)
        with (
            connected(port) as plain,
            tls.context().wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"hello\n")
            assert b"hello\n" in server.stdout
            assert not events
            server.stdin.write(b"R\n")
            told: list[bytes] = []
            reader = threading.Thread(target=lambda: told.append(sock.recv(100)))
            reader.start()
            until = time.monotonic() + 20
            while not events and time.monotonic() < until:
                time.sleep(0.01)
            server.stdin.write(b"served\n")
            reader.join(30)
            assert told == [b"served\n"]
        server.kill()
    (event,) = [event for event in events if isinstance(event, SignEvent)]
    assert event.use is not None
    assert event.use.references == (("server", "localhost"),)


def connected(port: int) -> socket.socket:
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)

# SPDX-License-Identifier: Apache-2.0
"""Sockets of our contexts, and of those we were given, carry nothing before our own look."""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import urllib3
from cryptography import x509

from d1_signer import ClientCertificate, ConfigurationError, open_signer
from d1_signer.events import Event, SignEvent
from d1_signer.sandbox import Sandbox
from d1_signer.transport.client import ClientTls
from d1_signer.transport.tls import VerifyingContext, verifying_context
from tests.token.conftest import FetcherMaker
from tests.transport.in_memory import Pair
from tests.transport.test_handshakes import server_certificate, server_context, serving

SECRET = b"assertion=secret"


def send_file(sock: Any) -> object:
    with tempfile.TemporaryFile() as file:
        file.write(SECRET)
        file.seek(0)
        return sock.sendfile(file)


SENDING: dict[str, Callable[[Any], object]] = {
    "send": lambda sock: sock.send(SECRET),
    "sendall": lambda sock: sock.sendall(SECRET),
    "write": lambda sock: sock.write(SECRET),
    "sendfile": send_file,
    "sendto": lambda sock: sock.sendto(SECRET, ("127.0.0.1", 9)),
    "a file of it": lambda sock: sock.makefile("wb", buffering=0).write(SECRET),
}
RECEIVING: dict[str, Callable[[Any], object]] = {
    "read": lambda sock: sock.read(10),
    "read into": lambda sock: sock.read(10, bytearray(10)),
    "recv": lambda sock: sock.recv(10),
    "recv_into": lambda sock: sock.recv_into(bytearray(10)),
    "a file of it": lambda sock: sock.makefile("rb").read(10),
}


def given(path: Path) -> ssl.SSLContext:
    """A context of the caller's that believes common names, as the ssl module's do by default."""
    context = ssl.create_default_context(cafile=str(path))
    return ClientTls(context, None).context()


OF_OURS: list[Callable[[Path], ssl.SSLContext]] = [
    lambda path: verifying_context(str(path)),
    lambda path: ClientTls(None, path).context(),
    given,
]


@pytest.mark.parametrize("make", OF_OURS, ids=["verifying", "of a fetcher", "given"])
@pytest.mark.parametrize("way", [*SENDING, *RECEIVING])
def test_nothing_passes_a_socket_whose_handshake_was_left_to_openssl(
    tmp_path: Path, make: Callable[[Path], ssl.SSLContext], way: str
) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    with serving(server_context(certificate)) as (port, told):
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        with (
            make(certificate).wrap_socket(
                plain, server_hostname="localhost", do_handshake_on_connect=False
            ) as tls,
            pytest.raises(ssl.SSLCertVerificationError, match="handshake"),
        ):
            (SENDING | RECEIVING)[way](tls)
    assert not told


@pytest.mark.parametrize("way", [way for way in SENDING if way != "sendto"])  # not for TLS
def test_what_is_sent_after_the_handshake_arrives_and_is_counted(tmp_path: Path, way: str) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    with serving(server_context(certificate)) as (port, told):
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        with verifying_context(str(certificate)).wrap_socket(
            plain, server_hostname="localhost"
        ) as tls:
            assert SENDING[way](tls) == (None if way == "sendall" else len(SECRET))
            assert tls.recv(12) == b"HTTP/1.1 200"
    assert told == SECRET


@pytest.mark.parametrize("way", SENDING)
@pytest.mark.parametrize("end", ["shutdown", "unwrap"])
def test_nothing_is_sent_in_clear_text_after_the_end(tmp_path: Path, way: str, end: str) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    context = verifying_context(str(certificate))
    left, right = socket.socketpair()
    server = server_context(certificate)
    with left, right:
        left.settimeout(20)
        right.settimeout(20)

        def serve() -> None:
            with (
                contextlib.suppress(OSError),  # the client is gone
                server.wrap_socket(right, server_side=True) as tls,
            ):
                if end == "unwrap":
                    tls.unwrap()
                received.extend(socket.socket.recv(tls, 100))

        received = bytearray()
        thread = threading.Thread(target=serve)
        thread.start()
        with context.wrap_socket(left, server_hostname="localhost") as tls:
            if end == "unwrap":
                tls.unwrap()
            else:
                tls.shutdown(socket.SHUT_RD)
            with pytest.raises(ssl.SSLCertVerificationError, match="ended"):
                SENDING[way](tls)
        thread.join(30)
    assert SECRET not in received


@pytest.mark.parametrize("way", ["read", "write"])
def test_nothing_passes_buffers_either(tmp_path: Path, way: str) -> None:
    """Nor does a signature leave the device, in a handshake that names no server."""
    events: list[Event] = []
    pair = Pair(tmp_path)
    watched = open_signer(pair.uri, observers=[events.append])
    tls = ClientTls(ClientCertificate(pair.path, watched), tmp_path / "server.pem")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.context().wrap_bio(to_client, to_server, server_hostname="localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="handshake"):
        client.read(10) if way == "read" else client.write(SECRET)
    assert to_server.pending == 0
    assert not [event for event in events if isinstance(event, SignEvent) and event.use]
    watched.close()


def weaken(context: ssl.SSLContext) -> None:
    context.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME


def test_a_weakened_context_wraps_nothing(tmp_path: Path) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    context = verifying_context(str(certificate))
    weaken(context)
    with socket.socket() as plain, pytest.raises(ConfigurationError, match="valid"):
        context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
    with pytest.raises(ConfigurationError, match="valid"):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")


# -- contexts of the caller's ---------------------------------------------------------------------


@pytest.mark.parametrize("names", [[], [x509.DNSName("other.example")]])
def test_another_client_with_a_given_context_is_looked_at_too(
    tmp_path: Path, make_fetcher: FetcherMaker, names: list[x509.GeneralName]
) -> None:
    certificate = server_certificate(tmp_path, *names, common_name="localhost")
    context = ssl.create_default_context(cafile=str(certificate))
    assert context.hostname_checks_common_name
    fetcher = make_fetcher(client_certificate=context, ca_file=None)
    with (
        serving(server_context(certificate)) as (port, told),
        httpx.Client(verify=fetcher.ssl_context, trust_env=False) as http,
        pytest.raises(httpx.ConnectError),
    ):
        http.post(f"https://localhost:{port}/", content=SECRET)
    assert not told


def test_a_given_context_that_is_weakened_makes_no_connection_for_others(
    tmp_path: Path, make_fetcher: FetcherMaker
) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("other.example"), common_name="any")
    context = ssl.create_default_context(cafile=str(certificate))
    handed = make_fetcher(client_certificate=context, ca_file=None).ssl_context
    with (
        serving(server_context(certificate)) as (port, told),
        httpx.Client(verify=handed, trust_env=False) as http,
    ):
        context.check_hostname = False
        with pytest.raises(ConfigurationError, match="share this context"):
            http.post(f"https://localhost:{port}/", content=SECRET)
    assert not told


def test_a_context_with_sockets_of_its_own_is_refused(make_fetcher: FetcherMaker) -> None:
    class Other(ssl.SSLSocket):
        pass

    context = ssl.create_default_context()
    context.sslsocket_class = Other
    with pytest.raises(ConfigurationError, match="class of its own"):
        make_fetcher(client_certificate=context, ca_file=None)


@pytest.mark.parametrize("kind", ["given", "ours"])
def test_urllib3_with_pyopenssl_changes_no_context(
    make_fetcher: FetcherMaker, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # All that inject_into_urllib3() changes for a context that is given.
    monkeypatch.setattr(urllib3.util.ssl_, "IS_PYOPENSSL", True)
    context = ssl.create_default_context(cafile=str(sandbox.ca_file))
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    options: dict[str, Any] = {"client_certificate": context, "ca_file": None}
    fetcher = make_fetcher(**(options if kind == "given" else {}))
    for _ in range(3):
        with fetcher.session() as session:
            assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
    assert context.check_hostname
    assert fetcher.ssl_context.check_hostname


def test_urllib3_of_the_callers_with_our_context_and_pyopenssl(
    tmp_path: Path, make_fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib3.util.ssl_, "IS_PYOPENSSL", True)
    certificate = server_certificate(tmp_path, x509.DNSName("other.example"), common_name="any")
    context = make_fetcher(ca_file=certificate, client_certificate=None).ssl_context
    assert isinstance(context, VerifyingContext)
    with serving(server_context(certificate)) as (port, told):
        pool = urllib3.PoolManager(ssl_context=context, assert_hostname=False, retries=False)
        with pytest.raises(urllib3.exceptions.SSLError):
            pool.request("POST", f"https://localhost:{port}/", body=SECRET)
    assert context.check_hostname
    assert not told


def test_settings_of_urllib3_reach_no_given_context(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    context = ssl.create_default_context(cafile=str(sandbox.ca_file))
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    fetcher = make_fetcher(client_certificate=context, ca_file=None)
    with fetcher.session() as session:
        adapter: Any = session.get_adapter("https://localhost")
        adapter.poolmanager.connection_pool_kw.update(assert_hostname=False, cert_reqs="CERT_NONE")
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert isinstance(session, requests.Session)

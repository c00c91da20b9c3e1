# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS whose client key is a signer's: handshakes, and all that can go wrong in one."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer import (
    CertificateEvent,
    ClientCertificate,
    ConfigurationError,
    HttpxD1Auth,
    InvalidKeyError,
    KeyMismatchError,
    LazySigner,
    Signer,
    SignerClosedError,
    SignerTimeout,
    SignEvent,
    TokenFetcher,
    generate_key,
    open_signer,
)
from d1_signer.events import Event
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken
from d1_signer.transport import handshake
from tests.token.conftest import FetcherMaker


def request_of(signer: Signer) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "TLSMA/issuer/PPR")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(signer.as_private_key(), SHA256()).public_bytes(Encoding.PEM)


class Opened:
    """A signer for the client key, and what it was asked for."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.events: list[SignEvent] = []
        self.signer = open_signer(uri, kid="tls", observers=[self.note])

    def note(self, event: Event) -> None:
        if isinstance(event, SignEvent) and event.use is not None:
            self.events.append(event)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(generate_key((tmp_path / "client.pem").as_uri()).uri)
    with opened.signer:
        yield opened


@pytest.fixture
def certificate(sandbox: Sandbox, client: Opened) -> Path:
    return sandbox.sign_client_request(request_of(client.signer))


def ping(fetcher: TokenFetcher) -> int:
    """Call the API over a new connection, without a token."""
    with fetcher.session() as session:
        session.auth = None
        return session.get(f"{fetcher.environment.banking_url}/ping").status_code


def versions() -> list[ssl.TLSVersion]:
    return [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def test_a_key_in_an_hsm_opens_every_way_to_d1(
    make_fetcher: FetcherMaker, sandbox: Sandbox, softhsm_token: SoftHsmToken
) -> None:
    client = Opened(generate_key(softhsm_token.uri).uri)
    certificate = sandbox.sign_client_request(request_of(client.signer))
    client.events.clear()
    with client.signer:
        fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
        assert fetcher.token().value
        with fetcher.session() as session:
            for _ in range(20):
                assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
        auth = HttpxD1Auth(fetcher)
        with httpx.Client(auth=auth, verify=fetcher.ssl_context, trust_env=False) as sync:
            assert sync.get(f"{sandbox.banking_url}/ping").status_code == 200

        async def call() -> int:
            context = fetcher.ssl_context
            async with httpx.AsyncClient(auth=auth, verify=context, trust_env=False) as http:
                return (await http.get(f"{sandbox.banking_url}/ping")).status_code

        assert asyncio.run(call()) == 200
    # One for the token endpoint's connection and one for each of the three clients.
    assert [event.use and event.use.purpose for event in client.events] == [handshake.PURPOSE] * 4
    assert {event.use.references for event in client.events if event.use} == {
        (("server", "127.0.0.1"),)
    }


@pytest.mark.parametrize("version", versions())
def test_each_version_of_tls_under_many_threads(
    make_fetcher: FetcherMaker, sandbox: Sandbox, client: Opened, certificate: Path, version: Any
) -> None:
    client.events.clear()
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))

    def call(_: int) -> int:
        context = fetcher.ssl_context
        context.minimum_version = context.maximum_version = version
        with httpx.Client(verify=context, trust_env=False) as http:
            return http.get(f"{sandbox.banking_url}/ping").status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(80))) == [401] * 80
    assert len(client.events) == 80


def test_no_key_file_is_opened(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:

    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)  # which stays for the process
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
    assert fetcher.token().value
    watching = False
    assert str(certificate) in opened
    assert not [path for path in opened if path.endswith(("client.pem", ".key"))]


def test_the_signer_whose_key_is_the_certificates_signs(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path, tmp_path: Path
) -> None:
    other = open_signer(generate_key((tmp_path / "other.pem").as_uri()).uri)
    lazy = LazySigner(
        lambda: open_signer(client.uri, kid="tls"), kid="tls", public_key=client.signer.public_key
    )
    keys: list[Any] = [[other, client.signer], (client.signer, other), lazy, [other, lazy]]
    for key in keys:
        fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, key))
        assert fetcher.token().value
    with pytest.raises(KeyMismatchError, match="does not belong"):
        make_fetcher(client_certificate=ClientCertificate(certificate, other))
    lazy.close()
    other.close()


def test_a_device_that_is_away_at_start_does_not_keep_a_process_from_starting(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:
    there = threading.Event()

    def opener() -> Signer:
        if not there.is_set():
            raise SignerTimeout("The device is away.")
        return open_signer(client.uri, kid="tls")

    lazy = LazySigner(opener, kid="tls", public_key=client.signer.public_key)
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, lazy))
    with pytest.raises(SignerTimeout, match="away"):
        ping(fetcher)
    there.set()
    assert fetcher.token().value
    lazy.close()


@pytest.mark.parametrize("key", [[], 5, ["a"], None])
def test_what_is_neither_a_path_nor_a_signer(
    make_fetcher: FetcherMaker, certificate: Path, key: Any
) -> None:
    with pytest.raises(ConfigurationError):
        make_fetcher(client_certificate=ClientCertificate(certificate, key))


def test_an_rsa_certificate_is_refused_with_a_signer(
    make_fetcher: FetcherMaker, sandbox: Sandbox, client: Opened
) -> None:
    rsa, _ = sandbox.issue_client_certificate(key="rsa")
    with pytest.raises(InvalidKeyError, match="not for a P-256 key"):
        make_fetcher(client_certificate=ClientCertificate(rsa, client.signer))


def test_the_key_of_assertions_is_not_the_client_key(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer
) -> None:
    certificate = sandbox.sign_client_request(request_of(signer))
    with pytest.raises(ConfigurationError, match="key that signs assertions"):
        make_fetcher(client_certificate=ClientCertificate(certificate, signer))


def test_what_the_signer_raises_comes_out_as_it_was(
    make_fetcher: FetcherMaker, sandbox: Sandbox, client: Opened, certificate: Path
) -> None:
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
    context = fetcher.ssl_context
    client.signer.close()
    with pytest.raises(SignerClosedError):
        ping(fetcher)
    with httpx.Client(verify=context, trust_env=False) as sync, pytest.raises(SignerClosedError):
        sync.get(f"{sandbox.banking_url}/ping")

    async def call() -> None:
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            await http.get(f"{sandbox.banking_url}/ping")

    with pytest.raises(SignerClosedError):
        asyncio.run(call())
    with pytest.raises(SignerClosedError):
        fetcher.token()


class Hanging:
    """A backend that signs when it is told to."""

    name = "hanging"

    def __init__(self, inner: Signer) -> None:
        self.inner = inner
        self.work: Callable[[], None] = lambda: None

    encoding: Any = "raw"

    def public_key(self) -> Any:
        return self.inner.public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        self.work()
        if deadline is not None and time.monotonic() >= deadline:
            raise SignerTimeout("It hangs.")
        return self.inner.sign_digest(digest)

    def custody(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_a_signer_that_hangs_has_its_own_limit(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:
    backend = Hanging(client.signer)
    slow = Signer(backend, kid="slow")
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, slow, timeout=0.3))
    until = threading.Event()
    backend.work = lambda: until.wait(0.3)  # type: ignore[assignment]
    started = time.monotonic()
    with pytest.raises(SignerTimeout):
        ping(fetcher)
    assert time.monotonic() - started < 5


def test_an_interrupt_in_a_handshake_is_an_interrupt(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:
    backend = Hanging(client.signer)
    signer = Signer(backend, kid="slow")
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, signer))

    def interrupt() -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)
        finally:
            signal.signal(signal.SIGINT, before)

    backend.work = interrupt
    with pytest.raises(KeyboardInterrupt):
        ping(fetcher)
    backend.work = lambda: None
    assert fetcher.token().value


def test_contexts_leave_nothing_behind(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
    before = len(handshake._handshakes)
    for _ in range(100):
        _ = fetcher.ssl_context
    gc.collect()
    assert len(handshake._handshakes) <= before + 1


def test_a_forked_child_makes_its_own_handshake(
    make_fetcher: FetcherMaker, sandbox: Sandbox, client: Opened, certificate: Path
) -> None:
    fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
    assert fetcher.token().value
    context = fetcher.ssl_context
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with httpx.Client(verify=context, trust_env=False) as http:
                status = 0 if http.get(f"{sandbox.banking_url}/ping").status_code == 401 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_certificate_is_told_to_observers(
    make_fetcher: FetcherMaker, client: Opened, certificate: Path
) -> None:
    events: list[Event] = []
    make_fetcher(
        client_certificate=ClientCertificate(certificate, client.signer), observers=[events.append]
    )
    (event,) = [event for event in events if isinstance(event, CertificateEvent)]
    (parsed,) = x509.load_pem_x509_certificates(certificate.read_bytes())
    assert event.not_after == parsed.not_valid_after_utc.timestamp()
    assert event.serial_number == parsed.serial_number


def test_a_build_that_is_not_known_is_refused_before_anything_is_touched(
    make_fetcher: FetcherMaker,
    client: Opened,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handshake, "_RELEASES", frozenset())
    handshake._openssl.cache_clear()
    touched: list[object] = []
    monkeypatch.setattr(handshake, "_pointer", touched.append)
    try:
        with pytest.raises(ConfigurationError, match="cannot sign TLS handshakes"):
            make_fetcher(client_certificate=ClientCertificate(certificate, client.signer))
    finally:
        handshake._openssl.cache_clear()
    assert touched == []


def test_the_signature_is_over_a_digest_of_32_bytes() -> None:
    with pytest.raises(Exception, match="384 bits"):
        handshake._sign(None, (), 1.0, hashlib.sha384(b"").digest())  # type: ignore[arg-type]

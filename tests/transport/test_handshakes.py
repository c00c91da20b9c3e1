# SPDX-License-Identifier: Apache-2.0
"""What a handshake came to is looked at before the first byte, whatever the context says."""

from __future__ import annotations

import contextlib
import datetime as dt
import select
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from d1_signer import ConfigurationError, TlsError
from d1_signer.transport.exchange import Http
from d1_signer.transport.tls import verifying_context
from tests.token.conftest import FetcherMaker


def server_certificate(
    folder: Path,
    *names: x509.GeneralName,
    common_name: str,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> Path:
    """A self-signed certificate with its key behind it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    file = folder / "server.pem"
    file.write_bytes(
        builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return file


@contextmanager
def serving(context: ssl.SSLContext) -> Iterator[tuple[int, bytearray]]:
    """A TLS server for one connection: its port, and all that it was sent inside of TLS."""
    told = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                plain, _ = server.accept()
                with plain, context.wrap_socket(plain, server_side=True) as tls:
                    while b"assertion=" not in told and (data := tls.recv(65536)):
                        told.extend(data)
                    tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], told
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(20)
            assert not thread.is_alive()


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_the_context_that_python_makes_by_itself_serves(
    tmp_path: Path, make_fetcher: FetcherMaker
) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    context = ssl.create_default_context(cafile=str(certificate))
    with serving(server_context(certificate)) as (port, told):
        fetcher = make_fetcher(
            environment=f"https://localhost:{port}/authz/v1",
            client_certificate=context,
            ca_file=None,
        )
        with pytest.raises(Exception, match="access_token"):
            fetcher.token()
    assert b"assertion=" in told


@pytest.mark.parametrize("names", [[], [x509.DNSName("other.example")]])
def test_a_name_that_only_the_subject_has_is_not_enough(
    tmp_path: Path, make_fetcher: FetcherMaker, names: list[x509.GeneralName]
) -> None:
    certificate = server_certificate(tmp_path, *names, common_name="localhost")
    context = ssl.create_default_context(cafile=str(certificate))
    context.hostname_checks_common_name = True
    with serving(server_context(certificate)) as (port, told):
        fetcher = make_fetcher(
            environment=f"https://localhost:{port}/authz/v1",
            client_certificate=context,
            ca_file=None,
        )
        with pytest.raises(TlsError, match="not trusted") as failure:
            fetcher.token()
    assert not failure.value.retryable
    assert not told


def test_a_service_that_holds_keys_is_looked_at_too(tmp_path: Path) -> None:
    certificate = server_certificate(tmp_path, common_name="localhost")
    context = verifying_context(str(certificate))
    context.hostname_checks_common_name = True
    http = Http("The service", context, connect_timeout=5.0, read_timeout=5.0)
    with serving(server_context(certificate)) as (port, told):
        url = f"https://localhost:{port}/"
        until = time.monotonic() + 10
        with pytest.raises(Exception, match="subjectAltName"):
            http.exchange("GET", url, headers={"X-Vault-Token": "s.1"}, body=None, until=until)
    http.close()
    assert not told


def test_our_own_context_offers_no_suite_without_a_certificate() -> None:
    ours = {suite["name"] for suite in verifying_context(None).get_ciphers()}
    systems = {
        suite["name"]
        for suite in ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).get_ciphers()
        if not {"PSK", "SRP"} & set(suite["name"].split("-"))
    }
    # And else the list is the system's.
    assert ours == systems


if ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).minimum_version < ssl.TLSVersion.TLSv1_2:
    # A build that leaves it to OpenSSL's configuration, such as Debian's.

    def test_an_old_version_that_was_negotiated_is_refused(
        tmp_path: Path, make_fetcher: FetcherMaker
    ) -> None:
        certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
        server = server_context(certificate)
        context = ssl.create_default_context(cafile=str(certificate))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            server.minimum_version = server.maximum_version = ssl.TLSVersion.TLSv1_1
        for each in (server, context):
            each.set_ciphers("DEFAULT:@SECLEVEL=0")
        with serving(server) as (port, told):
            fetcher = make_fetcher(
                environment=f"https://localhost:{port}/authz/v1",
                client_certificate=context,
                ca_file=None,
            )
            with pytest.raises(TlsError, match=r"TLSv1\.1 is too old"):
                fetcher.token()
        assert not told


if hasattr(ssl.SSLContext, "set_psk_client_callback"):  # Python 3.13

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_a_key_shared_beforehand_is_no_certificate(
        make_fetcher: FetcherMaker, version: ssl.TLSVersion
    ) -> None:
        key = bytes(range(32))
        server: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.minimum_version = server.maximum_version = version
        server.set_ciphers("PSK")
        server.set_psk_server_callback(lambda _: key)
        context: Any = ssl.create_default_context()
        context.set_psk_client_callback(lambda _: ("d1", key))
        with serving(server) as (port, told):
            fetcher = make_fetcher(
                environment=f"https://localhost:{port}/authz/v1",
                client_certificate=context,
                ca_file=None,
            )
            # Of builds whose own list has no such suite, TLS 1.2 fails in the handshake already.
            with pytest.raises((TlsError, ConfigurationError)):
                fetcher.token(timeout=5)
        assert not told


def test_a_handshake_that_does_not_block_goes_on(tmp_path: Path) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("localhost"), common_name="any")
    context = verifying_context(str(certificate))
    with serving(server_context(certificate)) as (port, told):
        plain = socket.create_connection(("127.0.0.1", port))
        plain.settimeout(0)
        until = time.monotonic() + 10
        with context.wrap_socket(
            plain, server_hostname="localhost", do_handshake_on_connect=False
        ) as tls:
            while time.monotonic() < until:
                try:
                    tls.do_handshake()
                except ssl.SSLWantReadError:
                    select.select([tls], [], [], 1)
                else:
                    break
            assert tls.version() is not None
            tls.settimeout(10)
            tls.sendall(b"assertion=")
            assert tls.recv(100)
    assert told == b"assertion="

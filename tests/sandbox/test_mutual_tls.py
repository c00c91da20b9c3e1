# SPDX-License-Identifier: Apache-2.0
"""The certificates of a run, and who is let in by them."""

from __future__ import annotations

import http.client
import socket
import ssl
import stat
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from d1_signer.errors import ConfigurationError, InvalidInputError
from d1_signer.sandbox import Sandbox
from tests.sandbox.client import ISSUER, KID, Client, public_jwk

if TYPE_CHECKING:
    from pathlib import Path

    from joserfc.jwk import ECKey

REFUSED = (ssl.SSLError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)


def context_of(sandbox: Sandbox) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(sandbox.ca_file))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def get_counters(sandbox: Sandbox, context: ssl.SSLContext, name: str = "127.0.0.1") -> int:
    url = urlsplit(sandbox.base_url)
    with (
        socket.create_connection(("127.0.0.1", url.port or 0), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=name) as connection,
    ):
        connection.sendall(b"GET /counters HTTP/1.1\r\nHost: sandbox\r\nConnection: close\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read()
        return answer.status


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_strict_verification_accepts_the_server(
    sandbox: Sandbox, name: str, version: ssl.TLSVersion
) -> None:
    context = context_of(sandbox)
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    context.minimum_version = context.maximum_version = version
    assert get_counters(sandbox, context, name) == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_nobody_is_let_in_without_a_certificate(sandbox: Sandbox, version: ssl.TLSVersion) -> None:
    context = context_of(sandbox)
    context.minimum_version = context.maximum_version = version
    with pytest.raises(REFUSED):
        get_counters(sandbox, context)
    assert sandbox.exchanges == ()


def test_requests_without_a_certificate_fails(client: Client, sandbox: Sandbox) -> None:
    client.session.cert = None
    with pytest.raises(requests.exceptions.ConnectionError):
        client.post()
    assert sandbox.counters.token_requests == 0
    assert sandbox.counters.connections == 1


def test_a_certificate_of_another_run_is_refused(sandbox: Sandbox) -> None:
    with Sandbox(issuer_id=ISSUER) as other:
        context = context_of(sandbox)
        context.load_cert_chain(other.client_certificate, other.client_key)
        with pytest.raises(REFUSED):
            get_counters(sandbox, context)


def test_the_server_certificate_does_not_serve_as_a_clients(sandbox: Sandbox) -> None:
    folder = sandbox.ca_file.parent
    context = context_of(sandbox)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with pytest.raises(REFUSED):
        get_counters(sandbox, context)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_1_1_is_refused(sandbox: Sandbox) -> None:
    context = context_of(sandbox)
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        get_counters(sandbox, context)


def test_folder_and_files_are_private(sandbox: Sandbox) -> None:
    folder = sandbox.ca_file.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(
        ("ca.pem", "server.pem", "server.key", "client.pem", "client.key"), 0o600
    )


def test_the_client_certificate_fits_its_key(sandbox: Sandbox) -> None:
    certificate = x509.load_pem_x509_certificate(sandbox.client_certificate.read_bytes())
    key = load_pem_private_key(sandbox.client_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert certificate.public_key() == key.public_key()
    authority = x509.load_pem_x509_certificate(sandbox.ca_file.read_bytes())
    certificate.verify_directly_issued_by(authority)


@pytest.mark.parametrize(
    ("kind", "kept"), [("ec", ec.EllipticCurvePrivateKey), ("rsa", rsa.RSAPrivateKey)]
)
@pytest.mark.parametrize("passphrase", [None, b"correct horse"])
def test_further_client_certificates(
    sandbox: Sandbox, kind: Literal["ec", "rsa"], kept: type, passphrase: bytes | None
) -> None:
    certificate, key = sandbox.issue_client_certificate(key=kind, passphrase=passphrase)
    assert isinstance(load_pem_private_key(key.read_bytes(), passphrase), kept)
    assert (b"ENCRYPTED" in key.read_bytes()) is (passphrase is not None)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    context = context_of(sandbox)
    context.load_cert_chain(certificate, key, passphrase)
    assert get_counters(sandbox, context) == 200


def test_another_kind_of_client_key_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidInputError):
        sandbox.issue_client_certificate(key="dsa")  # type: ignore[arg-type]


def test_plain_http_on_request(key: ECKey) -> None:
    with Sandbox(issuer_id=ISSUER, tls=False) as sandbox:
        sandbox.register_key(KID, public_jwk(key))
        client = Client(sandbox, key, tls=False)
        with client.session:
            assert sandbox.base_url.startswith("http://127.0.0.1:")
            assert client.ping(client.token()).status_code == 200
        for read in (
            lambda: sandbox.ca_file,
            lambda: sandbox.client_certificate,
            lambda: sandbox.client_key,
            sandbox.issue_client_certificate,
        ):
            with pytest.raises(ConfigurationError):
                read()


def test_file_paths_are_paths(sandbox: Sandbox) -> None:
    paths: list[Path] = [sandbox.ca_file, sandbox.client_certificate, sandbox.client_key]
    assert all(path.is_file() for path in paths)

# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS: what is trusted, what is refused, and that nobody can switch it off."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import certifi
import pytest
import requests

from d1_signer import (
    ClientCertificate,
    ConfigurationError,
    D1SignerError,
    Environment,
    Limits,
    SecretSourceError,
    Signer,
    TlsError,
    TokenError,
    TokenFetcher,
)
from d1_signer.sandbox import Sandbox
from d1_signer.transport.tls import read_authorities
from tests.conftest import told_by
from tests.facts.test_secret import FORMS_OF_A_KEY, OWN_KEY
from tests.token.conftest import ISSUER, FetcherMaker, certificate_of

PASSPHRASE = b"correct horse battery"


def verifying_context(sandbox: Sandbox) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(sandbox.ca_file)
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    return context


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_an_encrypted_client_key(
    make_fetcher: FetcherMaker, sandbox: Sandbox, tmp_path: Path, kind: str
) -> None:
    certificate, key = sandbox.issue_client_certificate(
        key="rsa" if kind == "rsa" else "ec", passphrase=PASSPHRASE
    )
    source = tmp_path / "passphrase"
    source.write_bytes(PASSPHRASE + b"\n")
    source.chmod(0o600)
    right = ClientCertificate(certificate, key, passphrase=f"file:{source}")
    assert make_fetcher(client_certificate=right).token().value
    with pytest.raises(SecretSourceError):
        make_fetcher(client_certificate=ClientCertificate(certificate, key))
    wrong = ClientCertificate(certificate, key, passphrase=lambda: "not the passphrase")
    with pytest.raises(SecretSourceError):
        make_fetcher(client_certificate=wrong)


def test_a_ready_context_is_used_as_it_is(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    context = verifying_context(sandbox)
    fetcher = make_fetcher(client_certificate=context, ca_file=None)
    assert fetcher.token().value
    with fetcher.session() as session:
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
    # The usual adapter would have added more than a hundred public authorities here.
    assert context.cert_store_stats()["x509_ca"] == 1


def test_a_context_that_does_not_verify_is_refused(
    make_fetcher: FetcherMaker, sandbox: Sandbox, tmp_path: Path
) -> None:
    no_host = verifying_context(sandbox)
    no_host.check_hostname = False
    nothing = verifying_context(sandbox)
    nothing.check_hostname = False
    nothing.verify_mode = ssl.CERT_NONE
    old = verifying_context(sandbox)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = ssl.TLSVersion.TLSv1_1
    logging_keys = verifying_context(sandbox)
    logging_keys.keylog_filename = str(tmp_path / "keys")
    contexts = [no_host, nothing, old, logging_keys]
    if ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).minimum_version == ssl.TLSVersion.TLSv1_2:
        # Elsewhere it is what Python's build leaves to OpenSSL, and the handshake is looked at.
        any_version = verifying_context(sandbox)
        any_version.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        contexts.append(any_version)
    for context in contexts:
        with pytest.raises(ConfigurationError):
            make_fetcher(client_certificate=context, ca_file=None)


@pytest.mark.parametrize(
    "ciphers", ["ALL:@SECLEVEL=0", "aNULL:@SECLEVEL=0", "PSK", "eNULL:@SECLEVEL=0"]
)
def test_ciphers_that_authenticate_no_server_are_refused(
    make_fetcher: FetcherMaker, sandbox: Sandbox, ciphers: str
) -> None:
    context = verifying_context(sandbox)
    context.set_ciphers(ciphers)
    with pytest.raises(ConfigurationError, match="cipher"):
        make_fetcher(client_certificate=context, ca_file=None)


@pytest.mark.parametrize("proxy", ["https://127.0.0.1:1", "socks5h://h:1", "ftp://x", "h:1", "", 5])
def test_a_proxy_that_cannot_be_used_is_refused(make_fetcher: FetcherMaker, proxy: object) -> None:
    with pytest.raises(ConfigurationError, match="proxy"):
        make_fetcher(proxy=proxy)


def test_a_key_put_where_its_path_belongs_is_not_shown(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    pem = sandbox.client_key.read_text()
    cases: list[tuple[object, object]] = [
        (sandbox.client_certificate, pem),
        (pem, sandbox.client_key),
        (pem, pem),
    ]
    for certificate, key in cases:
        with pytest.raises(D1SignerError) as failure:
            make_fetcher(client_certificate=ClientCertificate(certificate, key))  # type: ignore[arg-type]
        assert pem.splitlines()[1] not in str(failure.value)
    with pytest.raises(D1SignerError) as failure:
        make_fetcher(ca_file=pem)
    assert pem.splitlines()[1] not in str(failure.value)
    uri = "pkcs11:token=bank;object=d1?pin-value=pin-in-the-uri"
    for certificate, key in ((sandbox.client_certificate, uri), (uri, sandbox.client_key)):
        with pytest.raises(ConfigurationError) as refused:
            ClientCertificate(certificate, key)
        assert "pin-in-the-uri" not in "".join(told_by(refused.value))
    with pytest.raises(ConfigurationError) as refused:
        ClientCertificate(sandbox.client_certificate, pem.encode())  # type: ignore[arg-type]
    assert pem.splitlines()[1] not in "".join(told_by(refused.value))
    hidden = ClientCertificate("c", "k", passphrase="put here by mistake")
    assert "mistake" not in repr(hidden)


def _given_as() -> Iterator[tuple[str, object]]:
    yield from FORMS_OF_A_KEY.items()
    pem = FORMS_OF_A_KEY["PKCS8, PEM"]
    der = FORMS_OF_A_KEY["PKCS8, DER"]
    yield "PEM, lines", pem.splitlines()
    yield "PEM, lines with their ends", tuple(pem.splitlines(keepends=True))
    yield "PEM, lines as bytes", pem.encode().splitlines()
    yield "PEM, several", [pem, pem]
    yield "PEM, lines without the first", pem.splitlines()[1:-1]
    yield "PEM, bytes", pem.encode()
    yield "PEM, a path", Path(pem)
    yield "DER, bytes", os.fsencode(der)
    yield "DER, bytearray", bytearray(os.fsencode(der))
    yield "number, bytes in hexadecimal", FORMS_OF_A_KEY["number"].encode()
    yield "number", int(FORMS_OF_A_KEY["number"], 16)
    yield "JWK, a dictionary", json.loads(FORMS_OF_A_KEY["JWK"])
    yield "JWK, dictionaries", [json.loads(FORMS_OF_A_KEY["JWK"])]
    yield "JWK, read-only", MappingProxyType(json.loads(FORMS_OF_A_KEY["JWK"]))
    yield "key", OWN_KEY


GIVEN_AS = dict(_given_as())


@pytest.mark.parametrize("form", GIVEN_AS)
@pytest.mark.parametrize("place", ["certificate", "key"])
def test_a_key_itself_is_neither_taken_nor_told(form: str, place: str) -> None:
    given = {
        "certificate": "/etc/d1/client.pem",
        "key": "/etc/d1/client.key",
        place: GIVEN_AS[form],
    }
    with pytest.raises(ConfigurationError) as refused:
        ClientCertificate(**given)  # type: ignore[arg-type]
    told = "".join(told_by(refused.value))
    pem, hexadecimal = FORMS_OF_A_KEY["PKCS8, PEM"], FORMS_OF_A_KEY["number"]
    jwk = json.loads(FORMS_OF_A_KEY["JWK"])["d"]
    for part in (pem[80:110], hexadecimal[20:50], hexadecimal[20:50].upper(), jwk[4:30]):
        assert part not in told
    assert str(int(hexadecimal, 16)) not in told
    if place == "key" and form not in {"key", "number", "DER, bytearray"}:
        assert "itself" in str(refused.value)
        assert "replace the key" in str(refused.value.hint)
    assert "path" in f"{refused.value}{refused.value.hint}"


@pytest.mark.parametrize("key", [[], (), ["/etc/d1/client.key"], {7}, 7, None, [None]])
def test_what_is_neither_a_path_nor_signers_is_refused_at_once(key: object) -> None:
    with pytest.raises(ConfigurationError, match="neither a path nor a Signer"):
        ClientCertificate("client.pem", key)  # type: ignore[arg-type]


def test_a_context_that_is_weakened_later_is_refused(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    context = verifying_context(sandbox)
    fetcher = make_fetcher(client_certificate=context, ca_file=None)
    context.check_hostname = False
    with pytest.raises(ConfigurationError):
        fetcher.token()
    assert sandbox.counters.connections == 0


@pytest.mark.parametrize("verify", [False, "/etc/ssl/certs"])
def test_a_session_cannot_be_told_not_to_verify(
    fetcher: TokenFetcher, sandbox: Sandbox, verify: bool | str
) -> None:
    with fetcher.session() as session, pytest.raises(ConfigurationError):
        session.get(f"{sandbox.banking_url}/ping", verify=verify)
    with fetcher.session() as session:
        session.verify = verify
        with pytest.raises(ConfigurationError):
            session.get(f"{sandbox.banking_url}/ping")


def test_nothing_is_taken_from_the_environment(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    key_log = tmp_path / "tls-keys"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    for name, value in {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
        "REQUESTS_CA_BUNDLE": "/nowhere",
        "CURL_CA_BUNDLE": "/nowhere",
        "SSLKEYLOGFILE": str(key_log),
        "NETRC": str(netrc),
    }.items():
        monkeypatch.setenv(name, value)
    assert make_fetcher().token().value
    assert not key_log.exists()
    assert "authorization" not in {name.lower() for name in sandbox.requests[0].headers}


def test_a_server_of_another_authority_is_not_trusted(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    with Sandbox(issuer_id=ISSUER) as other, pytest.raises(TlsError) as failure:
        make_fetcher(ca_file=other.ca_file).token()
    assert "not trusted" in failure.value.message
    assert not failure.value.retryable
    assert sandbox.counters.token_requests == 0


def test_a_server_that_is_called_otherwise_is_not_trusted(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    elsewhere = sandbox.base_url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(TokenError):
        make_fetcher(environment=elsewhere, limits=Limits(total=2.0)).token()
    assert sandbox.counters.token_requests == 0


def test_a_missing_client_certificate_is_refused_by_the_server(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    with pytest.raises(TokenError) as failure:
        make_fetcher(client_certificate=None, limits=Limits(total=2.0)).token()
    assert "certificate" in str(failure.value)
    assert sandbox.counters.token_requests == 0


@pytest.mark.parametrize(
    "environment",
    [
        Environment.PRODUCTION,
        "staging",
        "develop",
        "https://API.d1.thalescloud.io/authz/v1",
        "https://api.d1.thalescloud.io.:443/other",
    ],
)
def test_thales_environments_need_a_client_certificate(
    signer: Signer, environment: Environment | str
) -> None:
    with pytest.raises(ConfigurationError, match="client certificate"):
        TokenFetcher(signer, issuer_id=ISSUER, environment=environment)
    TokenFetcher(
        signer, issuer_id=ISSUER, environment=environment, proxy_adds_certificate=True
    ).close()


def test_files_that_do_not_serve(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    folder = sandbox.ca_file.parent
    other_certificate, other_key = sandbox.issue_client_certificate()
    empty = folder / "empty.pem"
    empty.write_bytes(b"")
    empty.chmod(0o600)
    cases: list[tuple[ClientCertificate, type[Exception]]] = [
        (ClientCertificate(folder / "none.pem", sandbox.client_key), SecretSourceError),
        (ClientCertificate(sandbox.client_certificate, folder / "none.key"), SecretSourceError),
        (ClientCertificate(sandbox.client_certificate, other_key), ConfigurationError),
        (ClientCertificate(empty, sandbox.client_key), SecretSourceError),
        (ClientCertificate(other_certificate, empty), SecretSourceError),
    ]
    for certificate, error in cases:
        with pytest.raises(error):
            make_fetcher(client_certificate=certificate)
    with pytest.raises(ConfigurationError):
        make_fetcher(ca_file=folder / "none.pem")
    with pytest.raises(ConfigurationError):
        make_fetcher(ca_file=empty)
    with pytest.raises(ConfigurationError):
        make_fetcher(client_certificate=verifying_context(sandbox))  # and a ca_file beside it
    other_key.chmod(0o644)
    with pytest.raises(SecretSourceError, match="0644"):
        make_fetcher(client_certificate=ClientCertificate(other_certificate, other_key))


def test_a_token_reaches_the_api_by_any_session_with_the_auth(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    with fetcher.session() as session:
        answer = session.get(f"{sandbox.banking_url}/ping")
    assert answer.json()["status"] == "ok"
    assert isinstance(answer, requests.Response)


def test_the_certificate_fixture_is_the_one_in_use(sandbox: Sandbox) -> None:
    assert certificate_of(sandbox).certificate == sandbox.client_certificate


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nMIIB"])
def test_authorities_that_are_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(content)
    with pytest.raises(OSError, match="holds no certificates"):
        read_authorities(str(file))
    assert b"BEGIN CERTIFICATE" in read_authorities(certifi.where())

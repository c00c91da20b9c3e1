# SPDX-License-Identifier: Apache-2.0
"""Certificate, key and authorities that change on disk under a fetcher that is in use."""

from __future__ import annotations

import datetime as dt
import logging
import os
import shutil
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from d1_signer import CertificateEvent, ClientCertificate, D1SignerError, TokenFetcher
from d1_signer.events import Event
from d1_signer.sandbox import Sandbox
from d1_signer.transport import client
from tests.token.conftest import FetcherMaker


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_LOOK_INTERVAL", 0.0)


@pytest.fixture
def files(sandbox: Sandbox, tmp_path: Path) -> ClientCertificate:
    put(sandbox.client_certificate, tmp_path / "tls.pem")
    put(sandbox.client_key, tmp_path / "tls.key")
    return ClientCertificate(tmp_path / "tls.pem", tmp_path / "tls.key")


def put(source: Path, target: Path) -> None:
    """Replace a file as a tool does that is careful."""
    fresh = target.with_suffix(".new")
    shutil.copy(source, fresh)
    fresh.replace(target)


def serials(events: list[Event]) -> list[int]:
    return [event.serial_number for event in events if isinstance(event, CertificateEvent)]


def serial(certificate: Path) -> int:
    return x509.load_pem_x509_certificates(certificate.read_bytes())[0].serial_number


def ping(fetcher: TokenFetcher) -> int:
    with fetcher.session() as session:
        return session.get(f"{fetcher.environment.banking_url}/ping").status_code


def test_a_new_certificate_serves_the_next_connection(
    make_fetcher: FetcherMaker, sandbox: Sandbox, files: ClientCertificate
) -> None:
    events: list[Event] = []
    fetcher = make_fetcher(client_certificate=files, observers=[events.append])
    fetcher.token()
    kept = fetcher.session()
    other = httpx.Client(verify=fetcher.ssl_context, trust_env=False)
    url = f"{sandbox.banking_url}/ping"
    assert kept.get(url).status_code == 200
    certificate, key = sandbox.issue_client_certificate()
    put(key, Path(files.key))  # type: ignore[arg-type]
    put(certificate, Path(files.certificate))
    with kept, other:
        # A session that is in use, one that is new, and a client with a context of ours.
        assert kept.get(url).status_code == 200
        assert ping(fetcher) == 200
        assert other.get(url).status_code == 401
    assert serials(events) == [serial(sandbox.client_certificate), serial(certificate)]


def test_a_file_written_in_two_steps_keeps_the_last_good(
    make_fetcher: FetcherMaker,
    sandbox: Sandbox,
    files: ClientCertificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fetcher = make_fetcher(client_certificate=files)
    fetcher.token()
    certificate, key = sandbox.issue_client_certificate()
    put(certificate, Path(files.certificate))
    with caplog.at_level(logging.WARNING, "d1_signer.tls"):
        assert [ping(fetcher) for _ in range(3)] == [200] * 3
    assert "tls.files_unusable" in caplog.text
    with pytest.raises(D1SignerError, match="does not belong"):
        fetcher.reload()
    put(key, Path(files.key))  # type: ignore[arg-type]
    events: list[Event] = []
    fetcher._tls._observers = (events.append,)
    assert ping(fetcher) == 200
    assert serials(events) == [serial(certificate)]


@pytest.mark.parametrize("broken", [b"", b"-----BEGIN CERTIFICATE-----\nMIIB", None])
def test_a_broken_file_keeps_the_last_good(
    make_fetcher: FetcherMaker, files: ClientCertificate, broken: bytes | None
) -> None:
    fetcher = make_fetcher(client_certificate=files)
    path = Path(files.certificate)
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
    assert ping(fetcher) == 200
    with pytest.raises(D1SignerError):
        fetcher.reload()
    assert ping(fetcher) == 200


def test_links_as_kubernetes_makes_them(
    make_fetcher: FetcherMaker, sandbox: Sandbox, tmp_path: Path
) -> None:
    def version(name: str, certificate: Path, key: Path) -> None:
        (tmp_path / name).mkdir()
        shutil.copy(certificate, tmp_path / name / "tls.crt")
        shutil.copy(key, tmp_path / name / "tls.key")
        (tmp_path / "..data_tmp").symlink_to(name)
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")  # noqa: PTH105 (a link)

    version("..1", sandbox.client_certificate, sandbox.client_key)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    events: list[Event] = []
    fetcher = make_fetcher(
        client_certificate=ClientCertificate(tmp_path / "tls.crt", tmp_path / "tls.key"),
        observers=[events.append],
    )
    assert ping(fetcher) == 200
    certificate, key = sandbox.issue_client_certificate()
    version("..2", certificate, key)
    assert ping(fetcher) == 200
    assert serials(events)[-1] == serial(certificate)


def test_authorities_that_change_are_those_of_the_next_connection(
    make_fetcher: FetcherMaker, sandbox: Sandbox, tmp_path: Path
) -> None:
    authorities = tmp_path / "ca.pem"
    with Sandbox(issuer_id="another") as another:
        put(another.ca_file, authorities)
        fetcher = make_fetcher(ca_file=authorities)
        with pytest.raises(D1SignerError, match="not trusted"):
            fetcher.token()
        put(sandbox.ca_file, authorities)
        assert ping(make_fetcher(ca_file=authorities)) == 200
        with fetcher.session() as session:
            session.auth = None
            assert session.get(f"{sandbox.banking_url}/ping").status_code == 401


@pytest.mark.parametrize(("days", "warned"), [(29, True), (6, True), (-1, True), (31, False)])
def test_an_end_that_comes_near_is_told_once_a_day(
    make_fetcher: FetcherMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    days: int,
    *,
    warned: bool,
) -> None:
    certificate = own_certificate(tmp_path, days)
    with caplog.at_level(logging.WARNING, "d1_signer.tls"):
        fetcher = make_fetcher(client_certificate=certificate)
        for _ in range(5):
            fetcher._tls.look()
    told = [line for line in caplog.messages if "tls.client_certificate_expires" in line]
    assert len(told) == int(warned)
    if warned:
        assert ("already" if days < 0 else f"in {days} days") in told[0]


@pytest.mark.parametrize(("days", "level"), [(60, "INFO"), (31, "WARNING")])
def test_one_that_ends_before_the_last_is_told_as_odd(
    make_fetcher: FetcherMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    days: int,
    level: str,
) -> None:
    caplog.set_level(logging.INFO, "d1_signer.tls")
    fetcher = make_fetcher(client_certificate=own_certificate(tmp_path, 45))
    own_certificate(tmp_path, days)
    fetcher.reload()
    (told,) = [each for each in caplog.records if "certificate_replaced" in each.getMessage()]
    assert told.levelname == level
    assert ("is it the right one?" in told.getMessage()) == (level == "WARNING")
    ended = dt.datetime.now(dt.UTC) + dt.timedelta(days=45, hours=1)
    assert f"not_after_before={ended:%Y-%m-%d}" in told.getMessage()


def own_certificate(folder: Path, days: int) -> ClientCertificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "client")])
    now = dt.datetime.now(dt.UTC)
    built: Any = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=days, hours=1))
        .sign(key, SHA256())
    )
    (folder / "own.pem").write_bytes(built.public_bytes(Encoding.PEM))
    private = folder / "own.key"
    private.touch(0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return ClientCertificate(folder / "own.pem", private)


def test_a_context_of_the_callers_is_the_callers(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    context = ssl.create_default_context(cafile=str(sandbox.ca_file))
    context.load_cert_chain(sandbox.client_certificate, sandbox.client_key)
    fetcher = make_fetcher(client_certificate=context, ca_file=None)
    fetcher.reload()
    assert fetcher.ssl_context is context
    assert ping(fetcher) == 200

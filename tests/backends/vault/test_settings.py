# SPDX-License-Identifier: Apache-2.0
"""Where Vault is and how it is trusted: what its own clients read, and what is refused."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.backends.vault.settings import read_settings
from d1_signer.secret import read_public_file
from d1_signer.signing.opening import open_signer
from tests.backends.vault.conftest import signs
from tests.owners import give_away
from tests.servers import vault
from tests.servers.certificates import self_signed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers.fault_proxy import FaultProxy


@pytest.fixture(scope="module")
def agent(
    server: vault.Vault, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    with vault.agent(server, tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest.fixture(scope="session")
def client_files(server: vault.Vault) -> dict[str, Any]:
    certificate, key = server.authority.issue("d1-signer")
    return {"client_cert": str(certificate), "client_key": str(key)}


# -- an agent or a proxy --------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "?token-source=none"])
def test_agent_that_adds_its_token(
    agent: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if not source:
        monkeypatch.delenv("VAULT_TOKEN")
    with open_signer(f"hashivault://d1{source}", address=agent[0]) as signer:
        signs(signer)


def test_address_of_an_agent_comes_before_that_of_the_server(
    agent: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_AGENT_ADDR", agent[0])
    with open_signer("hashivault://d1") as signer:
        signs(signer)


def test_unix_socket_of_an_agent(agent: tuple[str, Path], token: str) -> None:
    for options in ({"token_source": "none"}, {"token_source": lambda: token}):
        with open_signer("hashivault://d1", address=f"unix://{agent[1]}", **options) as signer:
            signs(signer)


@pytest.mark.usefixtures("asked_once")
def test_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.SignerUnavailable) as refused:
        open_signer("hashivault://d1", address=f"unix://{tmp_path}/none.sock")
    assert refused.value.retryable
    assert refused.value.details["endpoint"] == f"{tmp_path}/none.sock"
    for address in ("unix:relative", "unix://relative/x.sock"):
        with pytest.raises(errors.ConfigurationError, match="Unix socket"):
            open_signer("hashivault://d1", address=address)


# -- the variables of Vault's and OpenBao's own clients -------------------------------------------


def test_names_of_openbao_come_first(
    server: vault.Vault, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_TOKEN", "not-this-one-at-all")
    monkeypatch.setenv("VAULT_CACERT", "/nowhere.pem")
    monkeypatch.setenv("VAULT_NAMESPACE", "nowhere")
    monkeypatch.setenv("BAO_ADDR", server.tls_url)
    monkeypatch.setenv("BAO_TOKEN", token)
    monkeypatch.setenv("BAO_CACERT", str(server.ca_file))
    with pytest.raises(errors.SignerError):
        open_signer("hashivault://d1")  # the namespace is still Vault's
    monkeypatch.setenv("BAO_NAMESPACE", "root")
    with open_signer("hashivault://d1") as signer:
        signs(signer)


@pytest.mark.parametrize("prefix", ["VAULT_", "BAO_"])
@pytest.mark.parametrize("name", ["CACERT", "CACERT_BYTES", "CAPATH"])
def test_authorities(
    server: vault.Vault,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prefix: str,
    name: str,
) -> None:
    folder, other = tmp_path / "authorities", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    another, _ = self_signed(other)
    shutil.copy(server.ca_file, folder / "one.pem")
    shutil.copy(another, folder / "two.pem")
    os.mkfifo(folder / "fifo")
    values = {
        "CACERT": str(server.ca_file),
        "CACERT_BYTES": server.ca_file.read_text(),
        "CAPATH": str(folder),
    }
    monkeypatch.setenv(prefix + name, values[name])
    with open_signer("hashivault://d1", address=server.tls_url) as signer:
        signs(signer)
    wrong = {"CACERT": str(another), "CACERT_BYTES": another.read_text(), "CAPATH": str(other)}
    monkeypatch.setenv(prefix + name, wrong[name])
    with pytest.raises(errors.SignerUnavailable, match="TLS failed") as refused:
        open_signer("hashivault://d1", address=server.tls_url)
    assert not refused.value.retryable


@pytest.mark.parametrize(
    ("name", "value"),
    [("CACERT", "/missing.pem"), ("CACERT_BYTES", "no PEM"), ("CAPATH", "/missing")],
)
def test_authorities_that_cannot_be_read(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"VAULT_{name}", value)
    with pytest.raises(errors.ConfigurationError):
        open_signer("hashivault://d1", address=server.tls_url)


def test_ca_file_in_the_uri(server: vault.Vault) -> None:
    with open_signer(f"hashivault://d1?ca-file={server.ca_file}", address=server.tls_url) as signer:
        signs(signer)


@pytest.mark.parametrize("prefix", ["VAULT_", "BAO_"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SKIP_VERIFY", "true"),
        ("SKIP_VERIFY", "1"),
        ("SRV_LOOKUP", "T"),
        ("TLS_SERVER_NAME", "vault.example.com"),
        ("PROXY_ADDR", "http://proxy:3128"),
        ("HTTP_PROXY", "http://proxy:3128"),
    ],
)
def test_what_is_set_and_not_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, prefix: str, name: str, value: str
) -> None:
    monkeypatch.setenv(prefix + name, value)
    with pytest.raises(errors.ConfigurationError, match=prefix + name) as refused:
        open_signer("hashivault://d1")
    assert "Unset" in refused.value.hint


def test_verification_that_is_not_to_be_skipped_is_no_contradiction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VAULT_SKIP_VERIFY", "false")
    with open_signer("hashivault://d1") as signer:
        signs(signer)


# -- client certificates --------------------------------------------------------------------------


def test_client_certificate(
    server: vault.Vault, client_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_CACERT", str(server.ca_file))
    with open_signer("hashivault://d1", address=server.mutual_url, **client_files) as signer:
        signs(signer)
    monkeypatch.setenv("VAULT_CLIENT_CERT", client_files["client_cert"])
    monkeypatch.setenv("VAULT_CLIENT_KEY", client_files["client_key"])
    with open_signer("hashivault://d1", address=server.mutual_url) as signer:
        signs(signer)


def test_missing_client_certificate_is_told_as_that(server: vault.Vault) -> None:
    with pytest.raises(errors.SignerUnavailable) as refused:
        open_signer("hashivault://d1", address=server.mutual_url, ca_file=str(server.ca_file))
    assert not refused.value.retryable
    assert "VAULT_CLIENT_CERT" in refused.value.hint


def test_client_certificate_that_is_renewed_serves_new_connections(
    server: vault.Vault, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    issue = server.authority.issue

    def renew(days: tuple[float, float]) -> None:
        for new, place in zip(issue("d1-signer", days=days), (certificate, key), strict=True):
            new.replace(place)

    renew((-1, 90))
    with open_signer(
        "hashivault://d1",
        address=server.mutual_url,
        ca_file=str(server.ca_file),
        client_cert=str(certificate),
        client_key=str(key),
    ) as signer:
        signs(signer)
        http: Any = signer._backend._clients.get().http._http  # type: ignore[attr-defined]
        renew((-9, -8))  # one that the server refuses shows that it is used
        http.forget()
        with pytest.raises(errors.SignerUnavailable, match="TLS failed"):
            signer.sign(b"m")
        certificate.write_text("half-written")
        http.forget()
        with pytest.raises(errors.SignerUnavailable, match="TLS failed"):
            signer.sign(b"m")
        renew((-1, 90))
        http.forget()
        signs(signer)


def _used_up_by_halves(certificate: Path, key: Path, issue: Callable[..., Any]) -> Iterator[str]:
    """States of the files in which no new pair can be used; each is told as what it is."""
    new_certificate, new_key = issue("d1-signer")
    certificate.write_bytes(new_certificate.read_bytes())
    yield "does not belong"
    key.write_text(new_key.read_text()[:90])
    yield "cannot be read"
    certificate.unlink()
    yield "No such file"
    os.mkfifo(certificate)
    yield "not a regular file"
    certificate.unlink()
    certificate.write_text(new_certificate.read_text())
    key.write_text(new_key.read_text())
    key.chmod(0o644)
    yield "0644"


def test_half_written_client_certificate_leaves_the_good_one_in_use_and_is_told_once(
    server: vault.Vault, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    for new, place in zip(server.authority.issue("d1-signer"), (certificate, key), strict=True):
        new.replace(place)
    with open_signer(
        "hashivault://d1",
        address=server.mutual_url,
        ca_file=str(server.ca_file),
        client_cert=str(certificate),
        client_key=str(key),
    ) as signer:
        http: Any = signer._backend._clients.get().http._http  # type: ignore[attr-defined]
        for told in _used_up_by_halves(certificate, key, server.authority.issue):
            caplog.clear()
            for _ in range(4):
                http.forget()  # a new connection, for which the server demands the certificate
                signs(signer)
            (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
            assert told in warning.getMessage()
            assert "Thales" not in warning.getMessage()
        assert "PRIVATE KEY" not in caplog.text
        key.chmod(0o600)
        caplog.clear()
        http.forget()
        signs(signer)
        assert not [each for each in caplog.records if each.levelname == "WARNING"]
        certificate.unlink()
        os.mkfifo(certificate)
        with pytest.raises(errors.SecretSourceError, match="not a regular file"):
            open_signer(
                "hashivault://d1",
                address=server.mutual_url,
                ca_file=str(server.ca_file),
                client_cert=str(certificate),
                client_key=str(key),
            )


def test_client_key_of_another_user_needs_that_user_to_be_trusted(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = server.authority.issue("d1-signer")
    owner = give_away(key, monkeypatch)
    options: dict[str, Any] = {
        "address": server.mutual_url,
        "ca_file": str(server.ca_file),
        "client_cert": str(certificate),
        "client_key": str(key),
    }
    with pytest.raises(errors.SecretSourceError, match="another user") as refused:
        open_signer("hashivault://d1", **options)
    assert "trusted_owner" in refused.value.hint
    with open_signer(f"hashivault://d1?trusted-owner={owner}", **options) as signer:
        signs(signer)
    with open_signer("hashivault://d1", trusted_owner=owner, **options) as signer:
        signs(signer)


_FORKED = """
import os, sys
from d1_signer import open_signer
address, ca_file, certificate, key = sys.argv[1:]
signer = open_signer(
    "hashivault://d1", address=address, ca_file=ca_file, client_cert=certificate, client_key=key
)
os.unlink(certificate), os.unlink(key)
child = os.fork()
if child == 0:
    signer.public_key.verify(signer.sign(b"m"), b"m")
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_child_shows_the_client_certificate_whose_files_are_gone(
    server: vault.Vault,
) -> None:
    certificate, key = server.authority.issue("d1-signer")
    arguments = [server.mutual_url, str(server.ca_file), str(certificate), str(key)]
    ran = subprocess.run(
        [sys.executable, "-c", _FORKED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"client_key": None},
        {"client_cert": None},
        {"client_cert": "/missing.pem"},
        {"client_key": "other"},
        {"address": "http://127.0.0.1:8200"},
    ],
    ids=str,
)
def test_client_certificate_that_cannot_be_used(
    server: vault.Vault, client_files: dict[str, Any], change: dict[str, str | None]
) -> None:
    if change.get("client_key") == "other":
        change = {"client_key": str(server.authority.issue("another")[1])}
    options: dict[str, Any] = {"address": server.mutual_url, **client_files, **change}
    with pytest.raises((errors.ConfigurationError, errors.SecretSourceError)) as refused:
        open_signer("hashivault://d1", ca_file=str(server.ca_file), **options)
    assert "Thales" not in refused.value.hint


def test_client_key_that_others_may_read_is_refused(server: vault.Vault) -> None:
    certificate, key = server.authority.issue("d1-signer")
    key.chmod(0o644)
    with pytest.raises(errors.SecretSourceError, match="0644"):
        open_signer(
            "hashivault://d1",
            address=server.mutual_url,
            ca_file=str(server.ca_file),
            client_cert=str(certificate),
            client_key=str(key),
        )


def test_client_certificate_of_the_environment_is_no_obstacle_without_tls(
    proxy: FaultProxy, client_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_CLIENT_CERT", client_files["client_cert"])
    monkeypatch.setenv("VAULT_CLIENT_KEY", client_files["client_key"])
    with open_signer("hashivault://d1", address=proxy.url) as signer:
        signs(signer)


# -- the endpoint in errors -----------------------------------------------------------------------


def test_endpoint_is_named_without_its_path() -> None:
    assert read_settings("https://vault.example.com:8200/x").endpoint == "vault.example.com:8200"
    assert read_settings("unix:///run/vault/agent%20x.sock").endpoint == "/run/vault/agent x.sock"


@pytest.mark.stress
def test_answers_over_a_unix_socket_end_by_the_time_limit(tmp_path: Path) -> None:
    # The same limits as over TCP: the one connection class.
    path = str(tmp_path / "slow.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            open_signer("hashivault://d1", address=f"unix://{path}", timeout=0.5)
        assert time.monotonic() - started < 5.0


def test_a_public_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "public.pem"
    for size in (0, 1 << 20):
        file.write_bytes(b"x" * size)
        assert len(read_public_file(str(file))) == size
    file.write_bytes(b"x" * ((1 << 20) + 1))
    for path in (file, tmp_path):
        with pytest.raises(OSError, match=r"larger|regular|directory"):
            read_public_file(str(path))

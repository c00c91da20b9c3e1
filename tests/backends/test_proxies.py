# SPDX-License-Identifier: Apache-2.0
"""AWS, Google Cloud and Vault through a proxy that asks for a password: it is sent, and once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest

from d1_signer import SignerError, SignerUnavailable, errors, open_signer
from d1_signer.backends.gcp_kms.place import read_uri
from tests.backends.test_aws import endpoint, key, tls_endpoint
from tests.backends.test_gcp import own_client, tls
from tests.servers import aws, vault
from tests.servers.connect_proxy import ConnectProxy

__all__ = ["endpoint", "key", "own_client", "tls", "tls_endpoint"]  # fixtures

PAIR = "kms-user:p@ss:word/é 100%"
WRONG = "kms-user:another-pass-word"


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    with ConnectProxy(credentials=PAIR).running() as proxy:
        yield proxy


@pytest.fixture
def aws_key(
    monkeypatch: pytest.MonkeyPatch, tls_endpoint: tuple[int, Path], key: str
) -> tuple[str, str]:
    for name, value in aws.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    port, certificate = tls_endpoint
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    return f"awskms:///{key}?endpoint=https://localhost:{port}", f"localhost:{port}"


@pytest.fixture
def gcp_key(own_client: tuple[Any, str]) -> tuple[str, str]:
    server, uri = own_client
    return uri, f"localhost:{server.tls_port}"


@pytest.fixture
def vault_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    with vault.vault(tmp_path) as server:
        server.make_key("d1")
        monkeypatch.setenv("VAULT_ADDR", server.tls_url)
        monkeypatch.setenv("VAULT_TOKEN", vault.ROOT_TOKEN)
        monkeypatch.setenv("VAULT_CACERT", str(server.ca_file))
        yield "hashivault://d1?mount=transit", f"localhost:{server.tls_port}"


@pytest.fixture(params=["aws_key", "gcp_key", "vault_key"])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The URI of a key, and the host that its proxy is asked for."""
    uri, target = request.getfixturevalue(request.param)
    return uri, target


def signs(uri: str, **options: Any) -> None:
    with open_signer(uri, **options) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")


def test_credentials_open_the_tunnel(
    place: tuple[str, str], proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, target = place
    signs(uri, proxy=proxy.url, proxy_credentials_source=lambda: PAIR)
    monkeypatch.setenv("KMS_PROXY", PAIR)
    signs(f"{uri}&proxy={proxy.url}&proxy-credentials-source=env:KMS_PROXY")
    assert set(proxy.asked) == {target}
    assert set(proxy.sent) == {PAIR}
    assert proxy.refused == 0


def test_refused_credentials_are_sent_once(place: tuple[str, str], proxy: ConnectProxy) -> None:
    uri, _ = place
    with pytest.raises(SignerError) as failure:
        signs(uri, proxy=proxy.url, proxy_credentials_source=lambda: WRONG, timeout=8.0)
    error = failure.value
    assert isinstance(error, SignerUnavailable)
    assert not error.retryable
    assert "HTTP 407, it refuses the credentials" in error.message
    assert f"127.0.0.1:{proxy.port}" in error.message
    assert error.details["status"] == 407
    # gRPC would ask again by itself, after a second.
    stays_at(lambda: proxy.refused, 1, seconds=2.5)


def test_a_password_that_was_changed_is_refused_twice_at_most(
    place: tuple[str, str], proxy: ConnectProxy, tmp_path: Path
) -> None:
    uri, _ = place
    file = tmp_path / "proxy"
    file.touch(mode=0o600)
    file.write_text(PAIR)
    with open_signer(
        uri, proxy=proxy.url, proxy_credentials_source=f"file:{file}", timeout=8.0
    ) as signer:
        signer.sign(b"m")
        proxy.credentials = WRONG
        close_connections(signer)
        for _ in range(4):
            with contextlib.suppress(errors.SignerError):
                signer.sign(b"m")
        assert proxy.refused <= 2
        file.write_text(WRONG)
        signer.public_key.verify(signer.sign(b"m"), b"m")


def test_a_new_password_is_judged_by_its_own_answer(
    gcp_key: tuple[str, str], proxy: ConnectProxy, tmp_path: Path
) -> None:
    """gRPC keeps a tunnel open, and shows on its next one what its channel was made with."""
    file = tmp_path / "proxy"
    file.touch(mode=0o600)
    file.write_text(PAIR)
    uri, _ = gcp_key
    with open_signer(
        uri, proxy=proxy.url, proxy_credentials_source=f"file:{file}", timeout=8.0
    ) as signer:
        signer.sign(b"m")
        file.write_text(WRONG)
        for _ in range(3):
            with pytest.raises(SignerUnavailable, match="refuses the credentials"):
                signer.sign(b"m")
        assert proxy.sent.count(WRONG) == 1
        file.write_text(PAIR)
        signer.public_key.verify(signer.sign(b"m"), b"m")


def close_connections(signer: Any) -> None:
    client = signer._backend._clients.made_here()
    for name in ("_let_go", "close"):
        if hasattr(client, name):
            getattr(client, name)()
            return


@pytest.mark.parametrize("status", [403, 503])
def test_other_answers_are_told(place: tuple[str, str], proxy: ConnectProxy, status: int) -> None:
    uri, _ = place
    proxy.status = status
    with pytest.raises(SignerUnavailable, match=f"HTTP {status}") as failure:
        signs(uri, proxy=proxy.url, timeout=4.0)
    assert failure.value.retryable is (status == 503)
    if status == 403:
        stays_at(lambda: len(proxy.asked), 1, seconds=2.5)


def stays_at(look: Callable[[], int], value: int, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert look() == value
        threading.Event().wait(0.05)


@pytest.mark.parametrize(
    "query", ["proxy=http://u:p@127.0.0.1:1", "proxy-credentials-source=env:KMS_PROXY"]
)
def test_settings_that_cannot_be_used(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_PROXY", PAIR)
    monkeypatch.setenv("VAULT_TOKEN", "root")
    for uri in ("awskms:///alias/d1", "hashivault://d1"):
        with pytest.raises(errors.ConfigurationError, match="proxy"):
            open_signer(f"{uri}?{query}")
    with pytest.raises(errors.ConfigurationError, match="proxy"):
        read_uri(f"gcpkms://projects/p/locations/l/keyRings/r/cryptoKeys/k?{query}")

# SPDX-License-Identifier: Apache-2.0
"""One OpenBao for the tests of the Vault backend, and an environment that names it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.servers import vault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.fault_proxy import FaultProxy


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vault.Vault]:
    with vault.vault(tmp_path_factory.mktemp("vault")) as running:
        running.make_key("d1")
        running.make_key("other")
        yield running


@pytest.fixture(scope="session")
def token(server: vault.Vault) -> str:
    return server.make_token()


@pytest.fixture(autouse=True)
def environment(
    server: vault.Vault, token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in os.environ:
        if name.startswith(("VAULT_", "BAO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VAULT_ADDR", server.url)
    monkeypatch.setenv("VAULT_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that stay are told at once: no pause before another attempt fits in."""
    monkeypatch.setattr("d1_signer.backends.vault.http._PAUSES", (1000.0,))


@pytest.fixture
def proxy(server: vault.Vault) -> Iterator[FaultProxy]:
    with server.proxy() as running:
        yield running


@pytest.fixture
def signer(proxy: FaultProxy) -> Iterator[Signer]:
    with open_signer("hashivault://d1", address=proxy.url) as opened:
        yield opened


def signs(signer: Signer) -> None:
    signer.public_key.verify(signer.sign(b"m"), b"m")

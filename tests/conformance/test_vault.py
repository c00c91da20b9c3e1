# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in the Transit engine of OpenBao."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from tests.conformance.interop import PrivateKeyInterop
from tests.servers import vault

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vault.Vault]:
    with vault.vault(tmp_path_factory.mktemp("vault")) as running:
        running.make_key("d1")
        yield running


@pytest.fixture(scope="module")
def approle(server: vault.Vault) -> tuple[str, str]:
    return server.make_approle("app")


class TestVault(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def secrets(self, approle: tuple[str, str]) -> tuple[str, ...]:
        return (approle[1],)

    @pytest.fixture
    def signer(self, server: vault.Vault, approle: tuple[str, str]) -> Signer:
        return open_signer(
            "hashivault://d1",
            address=server.tls_url,
            ca_file=str(server.ca_file),
            role_id=approle[0],
            secret_id_source=lambda: approle[1],
        )

# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in Google Cloud KMS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from tests.conformance.interop import PrivateKeyInterop
from tests.servers import gcp

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server() -> Iterator[gcp.Gcp]:
    with gcp.cloud_kms() as running:
        yield running


class TestGcp(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def signer(self, server: gcp.Gcp) -> Signer:
        return open_signer(f"gcpkms://{gcp.VERSION}", client=server.client)

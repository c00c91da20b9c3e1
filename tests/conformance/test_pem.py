# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in a PEM file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from tests.conformance.interop import PrivateKeyInterop

if TYPE_CHECKING:
    from pathlib import Path


class TestPem(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def secrets(self) -> tuple[str, ...]:
        return ("correct horse battery staple",)

    @pytest.fixture
    def signer(self, tmp_path: Path, secrets: tuple[str, ...]) -> Signer:
        uri = f"file://{tmp_path}/key.pem"
        generate_key(uri, passphrase_source=lambda: secrets[0])
        return open_signer(uri, passphrase_source=lambda: secrets[0])

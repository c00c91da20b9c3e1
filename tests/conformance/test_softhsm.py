# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in SoftHSM, through the fixture that users get."""

from __future__ import annotations

import pytest

from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance, SoftHsmToken
from tests.conformance.interop import PrivateKeyInterop


class TestSoftHsm(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def secrets(self, softhsm_token: SoftHsmToken) -> tuple[str, ...]:
        return (softhsm_token.pin, softhsm_token.so_pin)

    @pytest.fixture
    def signer(self, softhsm_token: SoftHsmToken) -> Signer:
        generate_key(softhsm_token.uri)
        return open_signer(softhsm_token.uri)

# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in SoftHSM."""

from __future__ import annotations

from typing import Any

import pytest

from d1_signer.events import Event, SignEvent
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance, SoftHsmToken


class TestPkcs11(SignerConformance):
    @pytest.fixture
    def secrets(self, softhsm_token: SoftHsmToken) -> tuple[str, ...]:
        return (softhsm_token.pin,)

    @pytest.fixture
    def signer(self, softhsm_token: SoftHsmToken) -> Signer:
        generate_key(softhsm_token.uri)
        return open_signer(softhsm_token.uri)


class TestPkcs11WithDeadline(TestPkcs11):
    """The same with every call handed to another thread."""

    @pytest.fixture
    def signer(self, softhsm_token: SoftHsmToken) -> Signer:
        generate_key(softhsm_token.uri)
        return open_signer(softhsm_token.uri, timeout=30)


class TestPkcs11WithOneLock(TestPkcs11):
    """The same with one lock around every call, for a module that does not lock by itself."""

    @pytest.fixture
    def signer(self, softhsm_token: SoftHsmToken) -> Signer:
        generate_key(softhsm_token.uri)
        return open_signer(softhsm_token.uri, locking="lock")


class TestPkcs11Isolated(TestPkcs11):
    """The same with the module in a process of its own."""

    @pytest.fixture
    def signer(self, softhsm_token: SoftHsmToken) -> Signer:
        generate_key(softhsm_token.uri)
        return open_signer(softhsm_token.uri, isolation="process")


@pytest.mark.parametrize("options", [{}, {"isolation": "process", "processes": 2}], ids=str)
def test_the_use_of_sessions_is_told(softhsm_token: SoftHsmToken, options: dict[str, Any]) -> None:
    generate_key(softhsm_token.uri)
    told: list[Event] = []
    with open_signer(
        softhsm_token.uri, max_sessions=3, observers=[told.append], **options
    ) as signer:
        signer.sign(b"message")
    (event,) = told
    assert isinstance(event, SignEvent)
    assert event.pool_use in {(0, 3), (0, 6)}

# SPDX-License-Identifier: Apache-2.0
"""A token that gives fewer sessions than there may be."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from d1_signer.backends.pkcs11.session import pool
from d1_signer.errors import SignerUnavailable
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim


@pytest.fixture
def signer(token: SoftHsmToken, shim: Shim) -> Iterator[Signer]:
    with open_signer(token.uri, module_path=shim.path) as opened:
        yield opened


def _sign_in_threads(signer: Signer) -> None:
    with ThreadPoolExecutor(16) as threads:
        for turn, signature in enumerate(
            threads.map(lambda turn: signer.sign(b"%d" % turn), range(200))
        ):
            signer.public_key.verify(signature, b"%d" % turn)


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_no_signature_fails_while_a_session_works(signer: Signer, shim: Shim, limit: int) -> None:
    shim.limit_sessions(limit)
    _sign_in_threads(signer)
    assert shim.most_sessions <= limit
    tried = shim.calls(Call.OPEN_SESSION)
    _sign_in_threads(signer)
    assert shim.calls(Call.OPEN_SESSION) - tried < 10, "the limit was learnt"
    shim.fail(Call.SIGN, 0x30, times=1)
    _sign_in_threads(signer)  # they all open their sessions anew


def test_custody_needs_no_session_of_its_own(signer: Signer, shim: Shim) -> None:
    shim.limit_sessions(2)
    assert signer.custody().evidence.location
    signer.sign(b"message")


def test_more_are_taken_when_the_token_gives_them(
    signer: Signer, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_SECONDS_OF_REST", 0.0)
    shim.limit_sessions(2)
    _sign_in_threads(signer)
    shim.limit_sessions(0)
    _sign_in_threads(signer)
    assert shim.most_sessions > 2


def test_none_at_all_is_told_and_tried_again(signer: Signer, shim: Shim) -> None:
    shim.limit_sessions(1)
    shim.fail(Call.SIGN, 0xB3, times=1)
    for _ in range(2):
        with pytest.raises(SignerUnavailable) as raised:
            signer.sign(b"message")
        assert raised.value.details["pkcs11"] == "CKR_SESSION_COUNT"
        assert raised.value.retryable
        signer._backend._circuit.closed_by_success()  # type: ignore[attr-defined]
    shim.limit_sessions(0)
    signer.sign(b"message")

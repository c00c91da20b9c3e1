# SPDX-License-Identifier: Apache-2.0
"""Answers that a gateway gives in Vault's place, and a user without a home."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from d1_signer.backends.vault.failures import TO_LOG_IN, refused, service_at
from d1_signer.backends.vault.held import _token_of_the_user


@pytest.mark.parametrize(
    ("told", "judged"),
    [
        ({"errors": ["invalid role or secret ID"]}, "secret"),
        ({"errors": []}, None),
        ({"message": "invalid role or secret ID"}, None),
        (None, None),
    ],
)
def test_only_vaults_own_words_judge_a_secret(told: object, judged: str | None) -> None:
    failure = refused(service_at("vault:8200"), TO_LOG_IN, 400, told, headers={}, sent=[])
    assert failure.error.details.get("refused") == judged


@pytest.mark.parametrize("failure", [RuntimeError("no home"), PermissionError(13, "denied")])
def test_user_without_a_home(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> NoReturn:
        raise failure

    monkeypatch.setattr(Path, "home", fails)
    assert _token_of_the_user() == "none"

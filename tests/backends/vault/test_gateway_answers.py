# SPDX-License-Identifier: Apache-2.0
"""Answers that a gateway gives in Vault's place, and a user without a home."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from d1_signer.backends.vault.failures import OWN_WORDS, TO_LOG_IN, refused, service_at
from d1_signer.backends.vault.held import _token_of_the_user


@pytest.mark.parametrize(
    ("told", "own"),
    [
        ({"errors": ["invalid role or secret ID"]}, True),
        ({"errors": []}, True),
        ({"message": "blocked"}, False),
        (None, False),
    ],
)
def test_whose_words_a_refusal_is_in(told: object, own: bool) -> None:
    failure = refused(service_at("vault:8200"), TO_LOG_IN, 400, told, headers={}, sent=[])
    assert (OWN_WORDS in failure.error.details) is own


@pytest.mark.parametrize("failure", [RuntimeError("no home"), PermissionError(13, "denied")])
def test_user_without_a_home(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> NoReturn:
        raise failure

    monkeypatch.setattr(Path, "home", fails)
    assert _token_of_the_user() == "none"

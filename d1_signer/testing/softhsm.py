# SPDX-License-Identifier: Apache-2.0
"""A SoftHSM token in a folder of its own, made for one test."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from d1_signer.errors import ConfigurationError
from d1_signer.sandbox.softhsm import SoftHsmToken, make_token


def make_softhsm_token(directory: Path, *, label: str | None = None) -> SoftHsmToken:
    """Make a token below a directory; the caller sets ``SOFTHSM2_CONF`` to its configuration.

    Args:
        directory: Empty, and not shared with another token.
        label: The token's label, at most 32 bytes; None: one that no other token has.

    Raises:
        pytest.fail.Exception: SoftHSM is not installed, or made no token. Never skipped: a test
            that did not run must not look like one that passed.
    """
    try:
        return make_token(directory, label or f"test-{secrets.token_hex(6)}")
    except ConfigurationError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def softhsm_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsmToken:
    """A fresh `SoftHsmToken` for this test, with ``SOFTHSM2_CONF`` set to it.

    The module reads that variable when it is initialised, so a signer on another token of the same
    module must be closed before this one's is opened.
    """
    directory = tmp_path / "softhsm"
    directory.mkdir(mode=0o700)
    token = make_softhsm_token(directory)
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.configuration))
    return token

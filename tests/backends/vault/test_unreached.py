# SPDX-License-Identifier: Apache-2.0
"""A Vault that is not there is told as that and not as one that is slow."""

from __future__ import annotations

import pytest

from d1_signer import errors
from d1_signer.signing.opening import open_signer
from tests.servers.process import closed_port


@pytest.mark.parametrize("kind", ["refused", "unknown host"])
def test_an_address_where_no_vault_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "unused")
    with closed_port() as port:
        host = f"127.0.0.1:{port}" if kind == "refused" else "no-vault.invalid:8200"
        monkeypatch.setenv("VAULT_ADDR", f"https://{host}")
        with pytest.raises(errors.SignerUnavailable) as raised:
            open_signer("hashivault://d1", timeout=1.0)
    error = raised.value
    assert (error.code, error.retryable) == ("signer_unavailable", True)
    assert f"Vault at {host}" in error.message
    assert error.details["endpoint"] == host
    assert "VAULT_ADDR" in error.hint

# SPDX-License-Identifier: Apache-2.0
"""The table of errors in docs/cloud/vault.md is what happens, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from d1_signer import errors
from d1_signer.backends.vault.failures import MEANINGS, Again, Meaning, meaning_of
from tests.servers.vault import calls, on_sign, refusal

if TYPE_CHECKING:
    from d1_signer.signing.signer import Signer
    from tests.servers.fault_proxy import FaultProxy

PAGE = Path(__file__).parents[3] / "docs" / "cloud" / "vault.md"
AGAIN = {Again.NEVER: "no", Again.UNSEEN: "yes", Again.HARMLESS: "yes, no login"}


def _row(meaning: Meaning) -> tuple[str, ...]:
    return (
        f"`{meaning.error.code}`",
        str(meaning.status or "other"),
        meaning.text or "anything else",
        meaning.refused or "-",
        "yes" if meaning.error.default_retryable else "no",
        AGAIN[meaning.again],
        meaning.hint,
    )


def _rows_of_the_page() -> list[tuple[str, ...]]:
    section = PAGE.read_text().partition("### What Vault answers")[2].partition("\n##")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]


def test_page_has_the_table_of_the_code() -> None:
    assert _rows_of_the_page() == [_row(meaning) for meaning in MEANINGS]


def test_no_line_hides_another() -> None:
    for number, meaning in enumerate(MEANINGS):
        assert meaning.hint
        assert meaning.text == meaning.text.lower()
        for before in MEANINGS[:number]:
            assert before.status != meaning.status or before.text not in meaning.text


@pytest.mark.parametrize("meaning", MEANINGS, ids=lambda m: f"{m.status}-{m.text or 'other'}")
def test_line_is_what_happens(
    signer: Signer, proxy: FaultProxy, meaning: Meaning, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One more attempt at once, and none after it.
    monkeypatch.setattr("d1_signer.backends.vault.http._PAUSES", (0.0, 1000.0))
    said = f"1 error occurred: * {meaning.text.title() or 'something new'}"
    proxy.fault = on_sign(refusal(meaning.status or 418, said))
    with pytest.raises(meaning.error) as refused:
        signer.sign(b"m", timeout=60)
    error = refused.value
    assert type(error) is meaning.error
    assert error.retryable is meaning.error.default_retryable
    assert error.hint == meaning.hint
    assert error.details["status"] == (meaning.status or 418)
    assert said in error.message
    asked = len([call for call in calls(proxy) if "/sign/" in call])
    assert asked == (1 if meaning.again is Again.NEVER else 2)


@pytest.mark.parametrize("status", [505, 520, 521, 598])
def test_status_of_a_gateway_is_a_passing_fault(status: int) -> None:
    meaning = meaning_of(status, "")
    assert meaning.error is errors.SignerUnavailable
    assert meaning.again is Again.HARMLESS

# SPDX-License-Identifier: Apache-2.0
"""Statements with changed bits, cut, swapped and encoded anew: the same verdict, or none."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings, strategies as st

from d1_signer.attestation import AttestationError
from tests.fuzz.statements import MADE, PARTS, changed, put_together

FUZZ = settings.get_profile("fuzz")
# A nonce would tell most changes of a TPM's statement before anything else looks at them.
WITHOUT_NONCE = [replace(made, asked={**made.asked, "nonce": None}) for made in MADE]
VERDICTS = [made.verify() for made in WITHOUT_NONCE]


def test_parts_make_the_statement_again() -> None:
    for made, parts, verdict in zip(WITHOUT_NONCE, PARTS, VERDICTS, strict=True):
        again = replace(made, statement=put_together(made.statement.format, parts))
        assert again.verify() == verdict


@FUZZ
@given(st.data())
def test_a_changed_statement_proves_the_same_or_nothing(data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(MADE) - 1))
    made, verdict = WITHOUT_NONCE[which], VERDICTS[which]
    statement = data.draw(changed(which))
    try:
        verified = replace(made, statement=statement).verify()
    except AttestationError:
        return
    assert verified == verdict

# SPDX-License-Identifier: Apache-2.0
"""What other systems say, as our errors repeat it."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, strategies as st

from d1_signer.transport.foreign import quoted

TOKEN = "hvs.CAESIJq9s3cr3tT0kenThatIsLong0123456789"


def test_plain_words_are_repeated() -> None:
    said = "1 error occurred:\n\t* permission denied on transit/sign/d1\n\n"
    assert quoted(said) == '"1 error occurred: * permission denied on transit/sign/d1"'


def test_quotes_do_not_end_the_quotation() -> None:
    assert quoted('say "no"') == "\"say 'no'\""


def test_a_log_line_cannot_be_forged() -> None:
    shown = quoted("x\r\n2026-01-01 INFO all is well\x1b[31m\u2028\u202e")
    assert "\n" not in shown
    assert shown.isprintable()
    assert shown.isascii()


def test_it_is_short() -> None:
    assert len(quoted("word " * 100_000)) <= 202


@pytest.mark.parametrize(
    "said",
    [
        f"token {TOKEN} is not known here",
        f"token={TOKEN[5:]}",
        f"begins with {TOKEN[:12]}",
        " ".join(TOKEN),
        f"{TOKEN[:20]}\n{TOKEN[20:]}",
        f'"{TOKEN}"',
        f"<b>{TOKEN}</b>",
    ],
)
def test_what_was_sent_is_masked(said: str) -> None:
    shown = quoted(said, [TOKEN])
    assert "[masked]" in shown
    assert "s3cr3t" not in shown.replace(" ", "")


def test_a_short_secret_is_masked() -> None:
    assert quoted("PIN 1234 was wrong", ["1234"]) == '"[masked]"'


def test_a_long_word_is_masked_whosever_it_is() -> None:
    other = base64.b64encode(bytes(range(60))).decode()
    assert other not in quoted(f"got {other}", [TOKEN])


@given(st.text(max_size=300), st.text(min_size=1, max_size=60))
def test_any_text_is_printable_short_and_without_the_secret(around: str, secret: str) -> None:
    shown = quoted(f"{around} {secret} {around}"[:1900], [secret])
    assert shown.isprintable()
    assert len(shown) <= 202
    if len(secret) >= 8 and secret.isascii() and secret.isalnum() and len(around) < 90:
        assert secret not in shown

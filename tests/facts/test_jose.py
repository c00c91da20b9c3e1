# SPDX-License-Identifier: Apache-2.0
"""base64url and JSON, against the standard library's decoder and an own one of a few lines."""

from __future__ import annotations

import json
import math
from types import MappingProxyType

import pytest
from hypothesis import example, given, strategies as st
from joserfc.util import urlsafe_b64decode as joserfc_decode, urlsafe_b64encode as joserfc_encode

from d1_signer import jose

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def decoded(text: str) -> bytes | None:
    """RFC 4648 section 5 bit by bit, None for anything but the canonical form without padding."""
    if any(character not in ALPHABET for character in text):
        return None
    bits = "".join(f"{ALPHABET.index(character):06b}" for character in text)
    rest = len(bits) % 8
    if rest == 6 or "1" in bits[len(bits) - rest :]:
        return None
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits) - rest, 8))


@given(st.binary(max_size=200))
def test_encoding_round_trips_and_agrees_with_joserfc(data: bytes) -> None:
    text = jose.b64url_encode(data)
    assert text == joserfc_encode(data)
    assert joserfc_decode(text) == data
    assert decoded(text.decode()) == data
    assert jose.b64url_decode(text) == data
    assert jose.b64url_decode(text.decode()) == data


@given(st.one_of(st.text(ALPHABET, max_size=12), st.text(ALPHABET + "=+/ \n.é", max_size=8)))
@example("")
@example("A")
@example("AB")  # stray bits
@example("AA==")
def test_decoding_is_as_strict_as_the_rfc(text: str) -> None:
    expected = decoded(text)
    if expected is None:
        with pytest.raises(ValueError, match="base64url"):
            jose.b64url_decode(text)
    else:
        assert jose.b64url_decode(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *[
            "AA==",
            "AAA=",
            "AAAA====",
            "A",
            "AAAAA",
            "AB",
            "AAB",
            "A+AA",
            "A/AA",
            "AAé",
            chr(0xFF21) + "AAA",
            "AA.A",
        ],
        *(" AAAA", "AAAA\n", "AA AA", "AA\r\nAA", "AA\ud800A", "AAAA\0"),
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64url"):
        jose.b64url_decode(text)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nested", [False, True])
def test_json_has_no_nan(number: float, nested: bool) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        jose.compact_json({"n": [{"n": number}] if nested else number})


def test_json_is_compact_ordered_utf8() -> None:
    value = {"z": "é", "a": [1, {"b": None}], "c": "\u2028\U0001f511", "d": 'a"b\\'}
    written = jose.compact_json(value)
    assert written.startswith('{"z":"é","a":[1,{"b":null}],"c":'.encode())
    assert json.loads(written) == value
    assert jose.compact_json(MappingProxyType(value)) == written
    assert jose.compact_json({}) == b"{}"


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}])
def test_what_json_cannot_say_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        jose.compact_json({"v": value})


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        jose.compact_json({"v": "\ud800"})


@given(st.binary(max_size=50), st.binary(max_size=70))
def test_compact_form_has_three_parts(payload: bytes, signature: bytes) -> None:
    unsigned = jose.signing_input(b"eyJ9", payload)
    token = jose.compact(unsigned, signature)
    head, body, tail = token.split(".")
    assert (head, joserfc_decode(body.encode()), joserfc_decode(tail.encode())) == (
        "eyJ9",
        payload,
        signature,
    )
    assert unsigned == f"{head}.{body}".encode()

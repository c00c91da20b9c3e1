# SPDX-License-Identifier: Apache-2.0
"""Records: one way to write each, and nothing else is read."""

from __future__ import annotations

import ctypes
import json

import pytest
from hypothesis import given, settings, strategies as st

from d1_signer.audit import moments, record
from d1_signer.errors import AuditError, InvalidInputError
from d1_signer.events import Recordable

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.integers(-(2**53) + 1, 2**53 - 1)
scalars = st.one_of(texts, numbers, st.booleans(), st.none())
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.lists(st.lists(texts, max_size=2)))


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.dictionaries(names, values, max_size=6))
def test_what_is_written_is_read_again_and_is_json(value: dict[str, Recordable]) -> None:
    line = record.encode(value)
    assert b"\n" not in line
    assert record.decode(line) == value == json.loads(line)
    assert record.encode(dict(reversed(value.items()))) == line


def test_the_form_is_that_of_rfc_8785() -> None:
    # Section 3.2.2.2: what is escaped, and how; its other characters stand for themselves.
    text = '\u20ac$\u000f\u000aA\'B"\\\\"/\u007f\u2028\U0001f600'
    line = record.encode({"b": text, "a": [1, True, None]})
    expected = (
        '{"a":[1,true,null],"b":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\u007f\u2028\U0001f600"}'
    )
    assert line.decode() == expected


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"a": 1}', id="a blank"),
        pytest.param(b' {"a":1}', id="a blank before"),
        pytest.param(b'{"a":1}\r', id="a carriage return"),
        pytest.param(b'{"b":1,"a":1}', id="not sorted"),
        pytest.param(b'{"a":1,"a":1}', id="twice"),
        pytest.param(b'{"a":1.0}', id="a fraction"),
        pytest.param(b'{"a":1e3}', id="an exponent"),
        pytest.param(b'{"a":NaN}', id="no number"),
        pytest.param(b'{"a":-Infinity}', id="infinite"),
        pytest.param(b'{"a":-0}', id="minus zero"),
        pytest.param(b'{"a":9007199254740992}', id="beyond 2**53"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", id="digits without end"),
        pytest.param(b'{"a":{}}', id="an object inside"),
        pytest.param(b'{"a":[[[1]]]}', id="lists too deep"),
        pytest.param(b'{"a":' + b"[" * 60_000, id="lists without end"),
        pytest.param(b'{"A":1}', id="a name in upper case"),
        pytest.param('{"ä":1}'.encode(), id="a name beyond ASCII"),
        pytest.param(b'{"a":"\\u00e4"}', id="escaped without need"),
        pytest.param(b'{"a":"\\ud800"}', id="a lone surrogate"),
        pytest.param(b'{"a":"\xff"}', id="not UTF-8"),
        pytest.param('\ufeff{"a":1}'.encode(), id="a byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"a":"' + b"x" * 65_535 + b'"}', id="too long"),
    ],
)
def test_everything_else_is_refused(line: bytes) -> None:
    with pytest.raises(AuditError):
        record.decode(line)


def test_the_longest_record_is_written_and_a_longer_one_is_not() -> None:
    room = record.LONGEST - len(record.encode({"a": ""}))
    assert len(record.encode({"a": "x" * room})) == record.LONGEST
    with pytest.raises(InvalidInputError, match="65535 at most"):
        record.encode({"a": "x" * (room + 1)})
    with pytest.raises(InvalidInputError, match="surrogate"):
        record.encode({"a": "\ud800"})


def test_the_kernel_is_asked_for_the_state_of_its_clock() -> None:
    # Linux has the call in every C library; only a sandbox may forbid it.
    adjtimex = moments._adjtimex()
    assert adjtimex is not None
    allowed = adjtimex(ctypes.create_string_buffer(moments._TIMEX_BYTES)) >= 0
    assert (moments.clock_state() in {"synchronized", "unsynchronized"}) is allowed

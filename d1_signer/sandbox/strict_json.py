# SPDX-License-Identifier: Apache-2.0
"""JSON objects as RFC 8259 has them, where Python's reader is more generous."""

from __future__ import annotations

import json
from typing import Any


def read_object(text: bytes) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        ValueError: Not JSON in UTF-8, not an object, nested too deeply, ``NaN`` or ``Infinity``, or
            a member name that stands twice (RFC 7519 section 4 wants those refused).
    """
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique_members, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 (a value from outside, no type error)
    return value


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member name stands twice")
    return members


def _no_constant(_name: str) -> float:
    raise ValueError("NaN and Infinity are not JSON")

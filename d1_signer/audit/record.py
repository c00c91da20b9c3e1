# SPDX-License-Identifier: Apache-2.0
"""One record: a JSON object in canonical form on a line of its own. Pure code, no I/O.

The form is that of RFC 8785, of which this is the part that records need: member names in ASCII and
sorted, texts, whole numbers below 2**53, true, false, null, and lists of these. There is one way to
write a record, so its bytes can be hashed and told apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from d1_signer.errors import AuditError, InvalidInputError
from d1_signer.events import Recordable

LONGEST = 65_535
"""Bytes of a record at most, without its line feed: what a C2SP tlog-tiles entry may have."""

_LARGEST_NUMBER = (1 << 53) - 1  # what every JSON reader keeps exactly (RFC 7493 section 2.2)
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode


def encode(record: Mapping[str, Recordable]) -> bytes:
    """Write a record.

    Args:
        record: Member names (lower case, digits, underscores) and values.

    Returns:
        The canonical bytes in UTF-8, without a line feed; at most `LONGEST`.

    Raises:
        InvalidInputError: A value is none that a record holds, a text has no UTF-8 form, or it is
            all too long for one record.
    """
    for name, value in record.items():
        if not _NAME.fullmatch(name) or not (isinstance(value, str) or _is_value(value)):
            raise InvalidInputError(
                f"The member {name!r} of what is to be recorded is neither a text, a whole number "
                "below 2**53, true, false, nothing, nor a list of these.",
                hint="Look at the purpose and the references of the signature's use: texts.",
            )
    try:
        line = _encode(record).encode()
    except UnicodeEncodeError:
        raise InvalidInputError(
            "A text for the audit trail is not Unicode (a lone surrogate).",
            hint="Look at the purpose and the references of the signature's use.",
        ) from None
    if len(line) > LONGEST:
        raise InvalidInputError(
            f"What is to be recorded takes {len(line)} bytes, and a record has {LONGEST} at most.",
            hint="Shorten the purpose and the references of the signature's use.",
        )
    return line


def text(value: str) -> bytes:
    """A text as it stands in a record."""
    return _encode(value).encode(errors="surrogatepass")


def decode(line: bytes) -> dict[str, Any]:
    """Read a record strictly.

    Args:
        line: One line without its line feed.

    Raises:
        AuditError: Not a record in its canonical form; the text says why.
    """
    if len(line) > LONGEST:
        raise AuditError(f"It is longer than {LONGEST} bytes.")
    try:
        record = json.loads(line, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError):  # UnicodeError is a ValueError
        raise AuditError("It is not a JSON object of texts and whole numbers.") from None
    if not isinstance(record, dict):
        raise AuditError("It is not a JSON object.")
    for name, value in record.items():
        if not _NAME.fullmatch(name):
            raise AuditError("A member's name is not lower case ASCII.")
        if not isinstance(value, str) and not _is_value(value):
            raise AuditError(
                "A member holds an object, lists in lists of lists, or a number above 2**53 - 1."
            )
    try:
        canonical = _encode(record).encode() == line
    except UnicodeEncodeError:  # a lone surrogate that was escaped
        canonical = False
    if not canonical:
        raise AuditError("It is not in its canonical form (RFC 8785).")
    return record


def _is_value(value: object, depth: int = 0) -> bool:
    """Whether a record may hold it: what JSON readers would not keep exactly is refused."""
    if isinstance(value, list | tuple):
        return depth < 2 and all(_is_value(part, depth + 1) for part in value)  # noqa: PLR2004 (pairs in a list)
    if isinstance(value, int):
        return abs(value) <= _LARGEST_NUMBER
    return value is None or isinstance(value, str)


def _refuse(number: str) -> float:
    msg = f"{number} is no whole number"
    raise ValueError(msg)

# SPDX-License-Identifier: Apache-2.0
"""Search everything that a log or a crash reporter can reach from an exception."""

from __future__ import annotations

import traceback


def reachable_text(error: BaseException) -> str:
    """The texts and attributes of an error, its causes and its contexts, as one string."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    parts: list[str] = []
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.append(current)
        waiting += [current.__cause__, current.__context__]
        parts += [str(current), repr(current), repr(current.args), repr(vars(current))]
        parts += getattr(current, "__notes__", [])
        # What a UnicodeError or a JSONDecodeError carries beside its text.
        parts += [repr(getattr(current, name, "")) for name in ("object", "doc", "filename")]
    parts += traceback.format_exception(error)
    return "\n".join(parts)


def assert_hidden(secret: str, error: BaseException) -> None:
    shown = secret in reachable_text(error)
    assert not shown, f"a secret can be reached from {type(error).__name__}"

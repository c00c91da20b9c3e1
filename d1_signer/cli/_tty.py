# SPDX-License-Identifier: Apache-2.0
"""Whether a stream is a terminal, and how wide it is."""

from __future__ import annotations

import os
from typing import TextIO

_DEFAULT_COLUMNS = 80
_FEWEST_COLUMNS = 24


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads it; None is a stream that was closed at the start."""
    return stream is not None and not stream.closed and stream.isatty()


def columns_of(stream: TextIO) -> int:
    """How many columns a terminal has; COLUMNS wins, as in other programs."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return max(int(named), _FEWEST_COLUMNS)
    try:
        found = os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except (OSError, ValueError):
        found = _DEFAULT_COLUMNS
    return max(found, _FEWEST_COLUMNS)

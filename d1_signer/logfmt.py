# SPDX-License-Identifier: Apache-2.0
"""Lines of the log: names and values (logfmt), each of which can be read back."""

from __future__ import annotations

import json
from collections.abc import Mapping

_QUOTED = frozenset(" \"'=\\")  # what makes a value be written as JSON writes a text


def told(facts: Mapping[str, object]) -> str:
    """Names and values for a line of the log.

    A value that others chose neither ends the line nor adds a name to it.
    """
    return " ".join(f"{name}={_shown(value)}" for name, value in facts.items())


def _shown(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and text and not set(text) & _QUOTED
    return text if plain else json.dumps(text)

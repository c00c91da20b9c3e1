# SPDX-License-Identifier: Apache-2.0
"""What others say, as our errors may repeat it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST = 200
_LOOKED_AT = 10 * _LONGEST
# Of a secret that was sent: this many characters in a row are one piece of it, and not chance.
_PIECE = 8
# A word of this length is a token or a key, whosever it is.
_LONG_WORD = 64
_WORD = re.compile(r"[A-Za-z0-9_=+/.~-]{8,}", re.ASCII)
_SEPARATORS = re.compile(r"[^A-Za-z0-9]", re.ASCII)
_MASK = "[masked]"


def quoted(text: str, sent: Iterable[str] = ()) -> str:
    """A text of another system in quotes: printable, short, without what was sent to it.

    Args:
        text: What it said.
        sent: The secrets of the request, which a server or a gateway may repeat.

    Returns:
        At most 200 characters between quotes.
    """
    secrets = [secret for secret in sent if secret]

    def masked(match: re.Match[str]) -> str:
        word = match[0]
        strange = len(word) > _LONG_WORD or any(_shares(word, one, _PIECE) for one in secrets)
        return _MASK if strange else word

    plain = "".join(c if c.isascii() and c.isprintable() else " " for c in text[:_LOOKED_AT])
    shown = " ".join(_WORD.sub(masked, plain).split())
    # Shorter secrets, and pieces that were wrapped or spaced out.
    together = _SEPARATORS.sub("", shown)
    for secret in secrets:
        bare = _SEPARATORS.sub("", secret)
        if secret in shown or _shares(together, bare, min(2 * _PIECE, len(bare))):
            return f'"{_MASK}"'
    return '"' + shown.replace('"', "'")[:_LONGEST] + '"'


def _shares(text: str, secret: str, length: int) -> bool:
    """Whether any ``length`` characters of a secret stand in a text."""
    if not 0 < length <= len(secret):
        return False
    return any(text[i : i + length] in secret for i in range(len(text) - length + 1))

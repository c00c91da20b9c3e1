# SPDX-License-Identifier: Apache-2.0
"""How a statement is refused, and how foreign text is told."""

from __future__ import annotations

from d1_signer.errors import AttestationError

_LONGEST = 120


def refused(reason: str, hint: str = "") -> AttestationError:
    """The error for a statement that does not prove what it should."""
    return AttestationError(f"The statement is refused: {reason}.", hint=hint)


def plain(text: str) -> str:
    """Text of a certificate or a device: on one line, printable, of bounded length."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= _LONGEST else f"{printable[:_LONGEST]}…"

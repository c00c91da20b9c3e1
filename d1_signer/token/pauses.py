# SPDX-License-Identifier: Apache-2.0
"""How long is waited after an error: between attempts of a renewal, and between renewals."""

from __future__ import annotations

import random

from d1_signer.errors import D1SignerError, TokenUnavailable

LONGEST_BACK_OFF = 15.0
"""Seconds, but for what a server asks for."""

# A server that asks for more would let a token expire which the next attempt may well save.
_MOST_RETRY_AFTER = 60.0
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 5.0
_TOO_MANY = 429
_LEAST_AFTER_TOO_MANY = 1.0


def passes(error: D1SignerError) -> bool:
    """Whether an error is one that waiting ends, of D1's or of the way there."""
    return isinstance(error, TokenUnavailable) and error.retryable


def asked_pause(error: D1SignerError) -> float:
    """Seconds that whoever refused asks to wait: its ``Retry-After``, and a second after a 429."""
    asked = error.details.get("retry_after")
    if not isinstance(asked, int | float):  # a plug-in may say it in its own words
        asked = 0.0
    too_many = error.details.get("status") == _TOO_MANY
    return max(asked, _LEAST_AFTER_TOO_MANY if too_many else 0.0)


def pause_before(attempt: int, *, asked: float, chance: float) -> float:
    """Seconds to wait before an attempt: twice as long each time, up to five, with jitter.

    Args:
        attempt: 1 for the first repetition.
        asked: What the server asked for, which is the least; see `asked_pause`.
        chance: Random number from 0 to 1. The pause has a half of its length at least, so that
            pauses grow; and a fleet that was asked to wait does not come back in one moment.
    """
    # The power alone would be too large a number some day.
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt - 1, 10))
    return max(longest * (1 + chance) / 2, asked * (1 + chance / 4))


def pause_after(error: D1SignerError, *, failures: int, least: float) -> float:
    """Seconds from a renewal that failed to the next one.

    Args:
        error: Why it failed.
        failures: How many failed in a row before it.
        least: Seconds after the first; twice as many after each that follows.
    """
    back_off = min(least * 2.0 ** min(failures, 10), LONGEST_BACK_OFF)
    asked = min(asked_pause(error), _MOST_RETRY_AFTER)
    return max(back_off, asked) * (1 + random.random() / 4)  # noqa: S311 (spreads load)

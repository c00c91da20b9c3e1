# SPDX-License-Identifier: Apache-2.0
"""The errors for those who wait for a token, and wait in vain."""

from __future__ import annotations

from collections.abc import Sequence

from d1_signer.errors import ConfigurationError, D1SignerError, TokenTimeout
from d1_signer.token.flight import Flight


def not_in_time(patience: float, failure: D1SignerError | None) -> D1SignerError:
    """The error for who waited for so long: why there is no token, where that is known."""
    if failure is not None:
        return failure.fresh()
    return TokenTimeout(
        f"No token within {patience:g} seconds.", hint="The renewal goes on; call again."
    )


def none_that_lives(patience: float) -> TokenTimeout:
    """The error for who waited for so long and got tokens that had ended."""
    return TokenTimeout(
        f"No token that still lives within {patience:g} seconds.",
        hint="D1's tokens live too short, or this machine's clock is being set.",
    )


def hangs(flight: Flight, total: float) -> TokenTimeout:
    """The error of a flight that is past its deadline: where it hangs."""
    return TokenTimeout(
        f"No token within {total:g} seconds: the renewal hangs in {flight.place}.",
        hint="It is tried again by itself; where it stays, look there.",
        details={"hanging_in": flight.place},
    )


def all_hang(flights: Sequence[Flight]) -> TokenTimeout:
    """The error where no other flight may begin, since so many hang."""
    places = " and ".join(sorted({flight.place for flight in flights}))
    return TokenTimeout(
        f"{len(flights)} renewals hang in {places} and keep no time limit.",
        hint="Look there, for a signer at its device or service; start the process anew.",
        details={"hanging_in": places},
    )


def waits_for_itself() -> ConfigurationError:
    """The error for whoever would wait for what waits for this thread."""
    return ConfigurationError(
        "The renewal waits for itself: its observer, PIN source or correlation_id, or a handler of "
        "the log or of a signal, asked this fetcher for a token.",
        hint="Do not call the fetcher from what it calls.",
    )

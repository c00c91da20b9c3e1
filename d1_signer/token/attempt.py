# SPDX-License-Identifier: Apache-2.0
"""One assertion that was sent, by the names under which others know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt of a renewal.

    Attributes:
        number: 1 for the first of its renewal.
        kid: Of the key that signed.
        jti: Of the assertion; it stands in the audit trail too.
        correlation_id: Of the request; it stands in D1's log.
        status: HTTP status of the answer; None where none came.
        seconds: From sending to the end of the answer.
    """

    number: int
    kid: str
    jti: str
    correlation_id: str
    status: int | None
    seconds: float

    def details(self) -> dict[str, str | int | float]:
        """Its names and figures, for an error or a line of the log."""
        told: dict[str, str | int | float] = {
            "kid": self.kid,
            "jti": self.jti,
            "correlation_id": self.correlation_id,
            "attempt": self.number,
        }
        return told if self.status is None else {**told, "status": self.status}

# SPDX-License-Identifier: Apache-2.0
"""What a child answers to a request for a signature, and what is told where it does not."""

from __future__ import annotations

import struct

from d1_signer.errors import D1SignerError, SignerTimeout, SignerUnavailable

_OPENINGS = struct.Struct("!Q")


def answer_of(signature: bytes, openings: int) -> bytes:
    """A signature, and how often the child has opened the key."""
    return _OPENINGS.pack(openings) + signature


def signed(answer: bytes) -> tuple[bytes, bytes]:
    """The signature of an answer, and how often the child has opened the key, to compare."""
    return answer[_OPENINGS.size :], answer[: _OPENINGS.size]


class Again(Exception):
    """The child was killed for another caller's deadline, or cannot be helped for this reason."""

    def __init__(self, reason: D1SignerError | None = None) -> None:
        super().__init__()
        self.reason = reason


def died(token: str) -> SignerUnavailable:
    """The error for a child that is gone, and the token that it served."""
    return SignerUnavailable(
        "The process that hosts the PKCS#11 module has ended; it is replaced.",
        hint="If it happens again, look at what the vendor's library writes to standard error.",
        details={"step": "signature", "token": token},
    )


def too_late(token: str) -> SignerTimeout:
    """The error for an answer of a token that is not there in time."""
    return SignerTimeout(
        "The HSM gave no answer within the deadline.",
        hint="Check the HSM and its connection, or allow more time.",
        details={"token": token},
    )

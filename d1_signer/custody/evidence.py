# SPDX-License-Identifier: Apache-2.0
"""Evidence of where a private key lives.

It lists facts, each with its source. *Claimed* is what a token or a service says of itself;
*attested* is what a signed statement proves. Whether that is enough is the reader's judgement, or a
`CustodyPolicy`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FactValue = bool | int | str | None


class Assurance(StrEnum):
    """How well a fact is founded."""

    CLAIMED = "claimed"
    ATTESTED = "attested"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One statement about a key.

    Attributes:
        name: What is stated, in the source's own terms, such as ``CKA_EXTRACTABLE``.
        value: The value; None where the source does not say. Binary values are base64.
        source: Who says so, such as ``"PKCS#11 attribute"``.
        assurance: Claimed or attested.
    """

    name: str
    value: FactValue
    source: str
    assurance: Assurance = Assurance.CLAIMED


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a backend knows about the custody of its key.

    Attributes:
        location: Where the key is, for people and without secrets: a URI without its query.
        exportable: Whether the private key can leave its place; None where unknown.
        generated_in_place: Whether the key was made where it lives; None where unknown.
        hardware: Whether a hardware device holds the key; None where unknown.
        facts: All that was found, the three answers above resting on them.
    """

    location: str
    exportable: bool | None
    generated_in_place: bool | None
    hardware: bool | None
    facts: tuple[Fact, ...]

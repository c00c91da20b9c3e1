# SPDX-License-Identifier: Apache-2.0
"""Evidence of where a private key lives, and the policy on it.

A report lists facts, each with its source. *Claimed* is what a token or a service says of itself;
*attested* is what a signed statement proves. Whether that is enough is the reader's judgement, or a
`CustodyPolicy`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from d1_signer.errors import CustodyError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyReport:
    """The evidence about one signer's key at one moment.

    Attributes:
        backend: Name of the backend, such as ``"pkcs11"``.
        kid: Key identifier.
        thumbprint: RFC 7638 thumbprint of the public key.
        collected_at: Seconds since the epoch.
        evidence: What the backend found.
    """

    backend: str
    kid: str
    thumbprint: str
    collected_at: int
    evidence: Evidence

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        evidence = self.evidence
        return {
            "backend": self.backend,
            "kid": self.kid,
            "thumbprint": self.thumbprint,
            "collected_at": self.collected_at,
            "location": evidence.location,
            "exportable": evidence.exportable,
            "generated_in_place": evidence.generated_in_place,
            "hardware": evidence.hardware,
            "facts": [
                {
                    "name": fact.name,
                    "value": fact.value,
                    "source": fact.source,
                    "assurance": str(fact.assurance),
                }
                for fact in evidence.facts
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyPolicy:
    """What a key must be before it may be used; an unknown answer does not meet a demand.

    Attributes:
        non_exportable: The private key cannot leave its place.
        generated_in_place: The key was made where it lives.
        hardware: A hardware device holds the key.
    """

    non_exportable: bool = False
    generated_in_place: bool = False
    hardware: bool = False

    def check(self, evidence: Evidence) -> None:
        """Hold evidence against the policy.

        Raises:
            CustodyError: A demand is not met, or the evidence does not say.
        """
        demands = (
            (self.non_exportable, evidence.exportable is False, "not exportable"),
            (self.generated_in_place, evidence.generated_in_place is True, "generated in place"),
            (self.hardware, evidence.hardware is True, "held by hardware"),
        )
        unmet = [name for demanded, met, name in demands if demanded and not met]
        if unmet:
            raise CustodyError(
                f"The key {evidence.location} is not shown to be {', '.join(unmet)}.",
                hint="Use a key that meets the custody policy; d1-signer custody shows the facts.",
            )

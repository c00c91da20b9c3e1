# SPDX-License-Identifier: Apache-2.0
"""Evidence of where a private key lives.

It lists facts, each with its source. *Claimed* is what a token or a service says of itself;
*attested* is what a device has signed and `d1_signer.attestation` has verified under an anchor that
is trusted. Whether that is enough is the reader's judgement, or a `CustodyPolicy`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from d1_signer.attestation import Statement, Verified

FactValue = bool | int | str | None

# The questions that are answered: which answer is the good one, and how it is told.
ANSWERS = {
    "exportable": (False, "not exportable"),
    "never_exportable": (True, "never exportable"),
    "generated_in_place": (True, "generated in place"),
    "hardware": (True, "held by hardware"),
    "fips_mode": (True, "in FIPS mode"),
}


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
        format: Of an attested fact: the format of the statement.
        anchor: Of an attested fact: SHA-256 of the trusted key that it rests on, hexadecimal.
    """

    name: str
    value: FactValue
    source: str
    assurance: Assurance = Assurance.CLAIMED
    format: str | None = None
    anchor: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attestation:
    """A statement about the key, and what it was verified to prove.

    Attributes:
        statement: As it was given.
        verified: What it proves.
    """

    statement: Statement
    verified: Verified

    def answer(self, name: str) -> bool | None:
        """Its answer to one of `ANSWERS`; None where it does not say."""
        told: bool | None = getattr(self.verified, name)
        return told

    def facts(self) -> list[Fact]:
        """What it says, in its own terms, as attested facts."""
        told = {"device": self.verified.device, **self.verified.facts}
        return [
            Fact(
                name=name,
                value=value,
                source=f"{self.statement.format} statement",
                assurance=Assurance.ATTESTED,
                format=self.statement.format,
                anchor=self.verified.anchor,
            )
            for name, value in told.items()
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known about the custody of a key.

    Attributes:
        location: Where the key is, for people and without secrets: a URI without its query.
        exportable: Whether the private key can leave its place; None where unknown.
        generated_in_place: Whether the key was made where it lives; None where unknown.
        hardware: Whether a hardware device holds the key; None where unknown.
        facts: All that was found, the answers resting on them.
        never_exportable: Whether it could never leave its place, at no time since it was made;
            None where unknown. A key that was exportable once may have a copy.
        fips_mode: Whether its device works in FIPS mode; None where unknown.
        statements: What the backend fetched from its service, not verified. None: nothing.
        attestations: What was verified. A backend leaves it out: the `Signer` verifies.
        claimed: Where something was verified: what the backend alone says.
    """

    location: str
    exportable: bool | None
    generated_in_place: bool | None
    hardware: bool | None
    facts: tuple[Fact, ...]
    never_exportable: bool | None = None
    fips_mode: bool | None = None
    statements: tuple[Statement, ...] | None = None
    attestations: tuple[Attestation, ...] | None = None
    claimed: Evidence | None = None

    def attested_by(self, name: str) -> Attestation | None:
        """The statement that answers one of `ANSWERS` as it is answered here; None: a claim."""
        answer = getattr(self, name)
        if answer is None:
            return None
        found = (a for a in self.attestations or () if a.answer(name) is answer)
        return next(found, None)

    def claims(self) -> Evidence:
        """The same with nothing attested: a fact is attested by our verifier or not at all."""
        return replace(
            self,
            facts=tuple(
                replace(fact, assurance=Assurance.CLAIMED, format=None, anchor=None)
                for fact in self.facts
            ),
            statements=None,
            attestations=None,
            claimed=None,
        )

    def with_attestations(self, attestations: tuple[Attestation, ...]) -> Evidence:
        """These claims together with what was verified.

        Where one of them says what is worse for the key, that is the answer.
        """
        if not attestations:
            return self
        answers: dict[str, bool | None] = {}
        for name, (good, _) in ANSWERS.items():
            told = [getattr(self, name), *(one.answer(name) for one in attestations)]
            known = [answer for answer in told if answer is not None]
            answers[name] = (good if all(a is good for a in known) else not good) if known else None
        facts = [fact for one in attestations for fact in one.facts()]
        return replace(
            self,
            exportable=answers["exportable"],
            never_exportable=answers["never_exportable"],
            generated_in_place=answers["generated_in_place"],
            hardware=answers["hardware"],
            fips_mode=answers["fips_mode"],
            facts=(*self.facts, *facts),
            attestations=attestations,
            claimed=self,
        )

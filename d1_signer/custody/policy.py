# SPDX-License-Identifier: Apache-2.0
"""What a key must be before it may be used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from d1_signer.custody.evidence import ANSWERS, Assurance, Evidence
from d1_signer.errors import ConfigurationError, CustodyError

VARIABLE = "D1_CUSTODY_POLICY"

# The words of a policy as text; each names a field.
WORDS = {
    "non-exportable": "non_exportable",
    "never-exportable": "never_exportable",
    "generated-in-place": "generated_in_place",
    "hardware": "hardware",
    "attested": "attested",
    "fips": "fips_mode",
}

Demand = bool | Assurance


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyPolicy:
    """What a key must be before it may be used; an unknown answer does not meet a demand.

    Each demand is False, True (a claim is enough), or ``Assurance.ATTESTED``: a device must have
    signed it, under an anchor that is trusted.

    Attributes:
        non_exportable: The private key cannot leave its place.
        generated_in_place: The key was made where it lives.
        hardware: A hardware device holds the key.
        never_exportable: The private key could never leave its place.
        fips_mode: The device works in FIPS mode.
        attested: Every answer that is demanded must be attested; where none is demanded, there must
            be a statement about the key that was verified.
    """

    non_exportable: Demand = False
    generated_in_place: Demand = False
    hardware: Demand = False
    never_exportable: Demand = False
    fips_mode: Demand = False
    attested: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no demand: a policy that demands nothing by mistake would hold nobody."""
        for name in WORDS.values():
            value = getattr(self, name)
            if not isinstance(value, Demand) or (name == "attested" and value not in {True, False}):
                raise ConfigurationError(
                    f"{name} of the custody policy is no demand.",
                    hint="Give True, False, or Assurance.ATTESTED (not for attested).",
                )

    @classmethod
    def parse(cls, text: str, *, where: str = "The custody policy") -> Self:
        """Read a policy from its words, separated by commas, such as ``"hardware,attested"``.

        Raises:
            ConfigurationError: A word that is unknown, or none at all.
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words or not all(word in WORDS for word in words):
            raise ConfigurationError(
                f"{where} has a word that is not known, or none.",
                hint=f"It takes these words, separated by commas: {', '.join(WORDS)}.",
            )
        return cls(**{WORDS[word]: True for word in words})

    @classmethod
    def from_environment(cls) -> Self | None:
        """The policy that ``D1_CUSTODY_POLICY`` holds; None where it is not set or is empty.

        Raises:
            ConfigurationError: As for `parse`.
        """
        text = os.environ.get(VARIABLE, "")
        return cls.parse(text, where=VARIABLE) if text.strip() else None

    @property
    def words(self) -> tuple[str, ...]:
        """What is demanded, in words; ``(attested)`` where that is demanded of one answer."""
        named = []
        for word, name in WORDS.items():
            demand = getattr(self, name)
            if demand is not False:
                named.append(f"{word}(attested)" if demand is Assurance.ATTESTED else word)
        return tuple(named)

    def _signed(self, demand: Demand) -> bool:
        return self.attested or demand is Assurance.ATTESTED

    def unmet(self, evidence: Evidence) -> tuple[str, ...]:
        """What is demanded and not shown, as the ends of a sentence."""
        missing: list[str] = []
        demanded = False
        for answer, (wanted, told) in ANSWERS.items():
            demand = getattr(self, _FIELDS.get(answer, answer))
            if demand is False:
                continue
            demanded = True
            if getattr(evidence, answer) is not wanted:
                missing.append(told)
            elif self._signed(demand) and evidence.attested_by(answer) is None:
                missing.append(f"{told} (attested: it is only claimed)")
        if self.attested and not demanded and not evidence.attestations:
            missing.append("attested by a statement that was verified")
        return tuple(missing)

    def check(self, evidence: Evidence) -> None:
        """Hold evidence against the policy.

        Raises:
            CustodyError: A demand is not met, or the evidence does not say.
        """
        unmet = self.unmet(evidence)
        if unmet:
            raise CustodyError(
                f"The key {evidence.location} is not shown to be {', '.join(unmet)}.",
                hint="Use a key that meets the custody policy; d1-signer custody shows the facts.",
                details={"policy": ",".join(self.words)},
            )


_FIELDS = {"exportable": "non_exportable"}

# SPDX-License-Identifier: Apache-2.0
"""What a key must be before it may be used."""

from __future__ import annotations

from dataclasses import dataclass

from d1_signer.custody.evidence import Evidence
from d1_signer.errors import CustodyError


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

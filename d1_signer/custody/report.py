# SPDX-License-Identifier: Apache-2.0
"""The report on the custody of one key."""

from __future__ import annotations

from dataclasses import dataclass

from d1_signer.custody.evidence import Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyReport:
    """The evidence about one signer's key at one moment.

    Attributes:
        backend: Name of the backend, such as ``"pkcs11"``.
        kid: Key identifier.
        thumbprint: RFC 7638 thumbprint of the public key.
        collected_at: Seconds since the epoch.
        evidence: What the backend found.
        plug_in: Distribution, version and class of a backend that is not built in; else None.
    """

    backend: str
    kid: str
    thumbprint: str
    collected_at: int
    evidence: Evidence
    plug_in: str | None = None

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        evidence = self.evidence
        return {
            "backend": self.backend,
            "plug_in": self.plug_in,
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

# SPDX-License-Identifier: Apache-2.0
"""The certificates that a statement rests on, as they are told to people."""

from __future__ import annotations

from dataclasses import dataclass

from asn1crypto import x509

from d1_signer.attestation import Verified


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A certificate.

    Attributes:
        subject: Whom it is about.
        issuer: Who has signed it.
        until: Its last day, as ISO 8601 has it.
    """

    subject: str
    issuer: str
    until: str


def links(verified: Verified) -> list[Link]:
    """The certificates from the lowest upwards: those that were judged, and no others."""
    return [_link(x509.Certificate.load(each)) for each in verified.certificates]


def _link(certificate: x509.Certificate) -> Link:
    return Link(
        subject=certificate.subject.human_friendly,
        issuer=certificate.issuer.human_friendly,
        until=certificate.not_valid_after.date().isoformat(),
    )

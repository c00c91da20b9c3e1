# SPDX-License-Identifier: Apache-2.0
"""The certificates that came with a statement, as they are told to people; nothing is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from asn1crypto import cms, pem, x509

from d1_signer.attestation import Statement

_MOST = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A certificate.

    Attributes:
        subject: Whom it is about.
        issuer: Who has signed it.
        until: Its last day, as ISO 8601 has it; empty where it cannot be read.
    """

    subject: str
    issuer: str
    until: str


def links(statement: Statement) -> list[Link]:
    """The certificates from the device's own upwards, as far as they can be read."""
    found: dict[tuple[str, str], Link] = {}
    for der in _certificates(statement):
        try:
            certificate = x509.Certificate.load(der)
            subject = certificate.subject.human_friendly
            issuer = certificate.issuer.human_friendly
            until = certificate.not_valid_after.date().isoformat()
        except Exception:  # noqa: BLE001 S112 (asn1crypto raises many things; this only draws)
            continue
        found.setdefault((subject, issuer), Link(subject=subject, issuer=issuer, until=until))
        if len(found) == _MOST:
            break
    return _ordered([*found.values()])


def _certificates(statement: Statement) -> Iterator[bytes]:
    pieces = list(statement.certificates)
    if statement.format in {"yubihsm", "yubikey-piv"}:
        pieces.insert(0, statement.content)
    for piece in pieces:
        try:
            yield from (
                (der for _, _, der in pem.unarmor(piece, multiple=True))
                if pem.detect(piece)
                else (piece,)
            )
        except ValueError:
            continue
    if statement.format == "luna-pkc":
        try:
            signed = cms.ContentInfo.load(statement.content)["content"]
            yield from (one.chosen.dump() for one in signed["certificates"])
        except Exception:  # noqa: BLE001 (as above)
            return


def _ordered(given: list[Link]) -> list[Link]:
    """Each one before its issuer, as far as there is such an order."""
    left, ordered = given, []
    while left:
        issuers = {link.issuer for link in left if link.issuer != link.subject}
        lowest = [link for link in left if link.subject not in issuers] or left[:1]
        ordered += lowest
        left = [link for link in left if link not in lowest]
    return ordered

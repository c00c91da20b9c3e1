# SPDX-License-Identifier: Apache-2.0
"""From a certificate up to a trusted key.

Written for statements: anchors are keys, so a root's certificate is never judged; everything below
it is, and time only by the moment that the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm

from d1_signer.attestation import keys
from d1_signer.attestation.anchors import Anchor
from d1_signer.attestation.certificates import (
    BASIC_CONSTRAINTS,
    KEY_USAGE,
    V3,
    Certificate,
)
from d1_signer.attestation.refusals import refused
from d1_signer.errors import AttestationError

_MOST_SIGNATURES = 64


@dataclass(frozen=True, slots=True)
class Chain:
    """A certificate, those above it, and the key that all rests on."""

    certificates: tuple[Certificate, ...]
    anchor: Anchor

    @property
    def encodings(self) -> tuple[bytes, ...]:
        """The certificates in DER."""
        return tuple(each.encoding for each in self.certificates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a vendor's chains are like.

    Attributes:
        may_issue: Raises where a certificate may not stand above the others, given from the lowest
            up, the certificate itself being the last.
        understood: OIDs of extensions that the format looks at, so that they may be critical,
            beside basic constraints and key usage.
        of_luna: See `keys.verify_certified`.
        longest: Certificates in a chain, the root's not counted.
    """

    may_issue: Callable[[tuple[Certificate, ...]], None]
    understood: frozenset[str] = frozenset()
    of_luna: bool = False
    longest: int = 6


@dataclass(slots=True)
class _Search:
    pool: tuple[Certificate, ...]
    anchors: tuple[Anchor, ...]
    at: float | None
    rules: Rules
    left: int = _MOST_SIGNATURES
    reasons: list[AttestationError] = field(default_factory=list)


def chain_of(
    leaf: Certificate,
    pool: tuple[Certificate, ...],
    *,
    anchors: tuple[Anchor, ...],
    at: float | None,
    rules: Rules,
) -> Chain:
    """Find the chain from a certificate to an anchor.

    Args:
        leaf: The lowest certificate.
        pool: Certificates that may stand above it.
        anchors: Trusted keys.
        at: The moment that all certificates of the chain must be valid at; None: not judged.
        rules: The vendor's.

    Raises:
        AttestationError: There is none.
    """
    search = _Search(pool, anchors, at, rules)
    chain = _climb(search, (leaf,))
    if chain is None:
        raise most_telling(search.reasons)
    return chain


def most_telling(reasons: list[AttestationError]) -> AttestationError:
    """What is wrong with a certificate tells more than that a chain ends, which has a hint."""
    return min(reasons, key=lambda reason: bool(reason.hint))


def _climb(search: _Search, path: tuple[Certificate, ...]) -> Chain | None:
    try:
        _judge(search, path)
    except AttestationError as reason:
        search.reasons.append(reason)
        return None
    top = path[-1]
    for anchor in search.anchors:
        spki = _key_of(search, anchor)
        if spki is not None and _signed(search, top, spki):
            return Chain(path, anchor)
    if len(path) < search.rules.longest:
        for above in search.pool:
            if (
                above.subject == top.issuer
                and above not in path
                and _signed(search, top, above.spki)
            ):
                chain = _climb(search, (*path, above))
                if chain is not None:
                    return chain
    search.reasons.append(
        refused(
            f"no trusted key stands above {top.name}",
            "Give the certificates between it and the vendor's root; compare the anchors with the"
            " vendor's page.",
        )
    )
    return None


def _key_of(search: _Search, anchor: Anchor) -> bytes | None:
    """An anchor's key, which a certificate may bring where the anchor is a hash alone."""
    if anchor.spki is not None:
        return anchor.spki
    spkis = (each.spki for each in search.pool if each.spki_sha256 == anchor.spki_sha256)
    return next(spkis, None)


def _signed(search: _Search, certificate: Certificate, spki: bytes) -> bool:
    if not search.left:
        raise refused("its certificates take too many signatures to verify")
    search.left -= 1
    try:
        return keys.verify_certified(
            keys.load(spki),
            certificate.algorithm,
            certificate.parameters,
            certificate.signature,
            certificate.signed,
            of_luna=search.rules.of_luna,
        )
    except (AttestationError, ValueError, UnsupportedAlgorithm) as reason:
        # A certificate that came along in vain does not keep the others from being looked at.
        if isinstance(reason, AttestationError):
            search.reasons.append(reason)
        return False


def _judge(search: _Search, path: tuple[Certificate, ...]) -> None:
    certificate, at = path[-1], search.at
    if at is not None and not certificate.not_before <= at <= certificate.not_after:
        raise refused(f"{certificate.name} is not valid at the given time")
    judged = {BASIC_CONSTRAINTS, KEY_USAGE} | search.rules.understood
    for oid, extension in certificate.extensions.items():
        if extension.critical and oid not in judged:
            raise refused(f"{certificate.name} has the critical extension {oid}, not known here")
    if len(path) > 1:
        search.rules.may_issue(path)


def authority(path: tuple[Certificate, ...]) -> None:
    """Refuse an issuer that is no authority (RFC 5280 section 6.1.4, k to n).

    Args:
        path: From the lowest certificate to the issuer.
    """
    issuer, below = path[-1], len(path) - 2
    is_authority, longest = issuer.constraints()
    if issuer.version != V3 or not is_authority:
        raise refused(f"{issuer.name} is not an authority's and signs another")
    if longest is not None and below > longest:
        raise refused(f"{issuer.name} does not admit {below} authorities below it")
    usages = issuer.usages()
    if usages is not None and "key_cert_sign" not in usages:
        raise refused(f"{issuer.name} may not sign certificates")


def may_sign(certificate: Certificate) -> None:
    """Refuse a certificate whose key usage, where it has one, is not to sign."""
    usages = certificate.usages()
    if usages is not None and "digital_signature" not in usages:
        raise refused(f"{certificate.name} is for a key that may not sign")

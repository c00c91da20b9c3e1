# SPDX-License-Identifier: Apache-2.0
"""``luna-pkc``: public key confirmations of Thales Luna HSMs, the file of ``cmu getpkc``.

A PKCS #7 package of certificates. Thales: "A Luna HSM will issue confirmations only for private
keys that were created by the HSM and that can never exist outside of the HSM" (Confirm the HSM's
Authenticity). What a certificate is for stands in its extended key usage, in Luna's own OIDs.
"""

from __future__ import annotations

from asn1crypto import cms

from d1_signer.attestation import chains, der, keys
from d1_signer.attestation.certificates import (
    EXTENDED_KEY_USAGE,
    MOST_CERTIFICATES,
    Certificate,
    armoured,
    read_certificate,
    read_certificates,
)
from d1_signer.attestation.chains import Rules, chain_of
from d1_signer.attestation.refusals import plain, refused
from d1_signer.attestation.statement import Asked, FactValue, Statement, Verified

_ARC = "1.3.6.1.4.1.12383"
_CONFIRMATION = f"{_ARC}.1.13"
# The device: its authentication key (RSA), or its hardware origin key (ECC).
_DEVICE = frozenset({f"{_ARC}.1.12", f"{_ARC}.1.15"})
# Above it: hardware origin, manufacturing integrity (RSA; ECC).
_ABOVE = frozenset({f"{_ARC}.1.8", f"{_ARC}.1.7", f"{_ARC}.1.14"})
_SERIAL = f"{_ARC}.2.1"
_LIMITS = (
    "A Luna HSM confirms keys that it made and that cannot leave it: no attribute says so.",
    "It does not say when it was made, and carries no nonce: an old one looks the same.",
    "It does not say whether the key may be cloned to another Luna HSM.",
    "It does not say whether the HSM is in FIPS mode, nor who may use the key.",
)


def verify_luna(statement: Statement, asked: Asked) -> Verified:
    """Verify a public key confirmation.

    Raises:
        AttestationError: Not exactly one confirmation in the package, or no chain of a Luna HSM
            above it.
    """
    pool = _package(statement.content) + read_certificates(statement.certificates)
    confirmations = [each for each in pool if _CONFIRMATION in each.purposes()]
    if len(confirmations) != 1:
        raise refused(f"the package has {len(confirmations)} public key confirmations, not one")
    (confirmation,) = confirmations
    chains.may_sign(confirmation)
    rules = Rules(
        may_issue=_luna_authority, understood=frozenset({EXTENDED_KEY_USAGE}), of_luna=True
    )
    chain = chain_of(confirmation, pool, anchors=asked.anchors, at=asked.at, rules=rules)
    serial = _little_endian(confirmation, _SERIAL)
    if len(chain.certificates) < 2 or not _names(chain.certificates[1], serial):  # noqa: PLR2004
        raise refused("the confirmation is not by the HSM whose serial number it has")
    facts: dict[str, FactValue] = {
        "serial number": serial,
        "handle in hexadecimal": plain(confirmation.common_name),
    }
    return Verified(
        spki=keys.encoded(keys.load(confirmation.spki)),
        device=f"Thales Luna HSM {serial}",
        exportable=False,
        never_exportable=True,
        generated_in_place=True,
        hardware=chain.anchor.hardware,
        fips_mode=None,
        stated_at=None,
        anchor=chain.anchor.spki_sha256,
        facts=facts,
        limits=_LIMITS,
        certificates=chain.encodings,
    )


def _package(content: bytes) -> tuple[Certificate, ...]:
    """Certificates of a PKCS #7 package, which signs nothing itself."""
    if content[:1] != bytes((der.SEQUENCE,)):
        (content,) = armoured(content, "PKCS7")
    der.check(content)
    package = cms.ContentInfo.load(content, strict=True)
    if package["content_type"].native != "signed_data":
        raise refused("the package is not a PKCS #7 one of certificates")
    certificates = package["content"]["certificates"]
    if len(certificates) > MOST_CERTIFICATES:
        raise refused(f"there are more than {MOST_CERTIFICATES} certificates")
    return tuple({each.dump(): read_certificate(each.dump()) for each in certificates}.values())


def _luna_authority(path: tuple[Certificate, ...]) -> None:
    chains.authority(path)
    issuer, allowed = path[-1], _DEVICE if len(path) == 2 else _ABOVE  # noqa: PLR2004
    if not issuer.purposes() & allowed:
        raise refused(f"{issuer.name} is not for what it stands for in a Luna HSM's chain")


def _little_endian(certificate: Certificate, oid: str) -> int:
    value = certificate.value(oid)
    if value is None or len(value) != 4:  # noqa: PLR2004 (a C unsigned int)
        raise refused(f"{certificate.name} has no number in {oid}")
    return int.from_bytes(value, "little")


def _names(device: Certificate, serial: int) -> bool:
    """Whether the device's certificate is of this serial number ("521174", "Luna K7-521174")."""
    return device.common_name.rpartition("-")[2] == str(serial)

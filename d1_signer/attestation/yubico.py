# SPDX-License-Identifier: Apache-2.0
"""``yubihsm`` and ``yubikey-piv``: certificates that a Yubico device signs for its keys.

Extensions: docs.yubico.com, "YubiHSM 2: Attestation" (arc 1.3.6.1.4.1.41482.4) and "PIV
attestation" (arc .3).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from d1_signer.attestation import chains, der, keys
from d1_signer.attestation.certificates import BASIC_CONSTRAINTS, Certificate, read_certificates
from d1_signer.attestation.chains import Chain, Rules, chain_of
from d1_signer.attestation.refusals import plain, refused
from d1_signer.attestation.statement import Asked, FactValue, Statement, Verified

_HSM = "1.3.6.1.4.1.41482.4"
_HSM_FIRMWARE, _HSM_SERIAL, _ORIGIN = f"{_HSM}.1", f"{_HSM}.2", f"{_HSM}.3"
_DOMAINS, _CAPABILITIES, _OBJECT_ID, _LABEL = (f"{_HSM}.{each}" for each in (4, 5, 6, 9))
_HSM_FIPS = (f"{_HSM}.10", f"{_HSM}.12")
_GENERATED, _IMPORTED, _WRAPPED = 0x01, 0x02, 0x10
_EXPORTABLE_UNDER_WRAP = 1 << 0x10

_PIV = "1.3.6.1.4.1.41482.3"
_PIV_FIRMWARE, _PIV_SERIAL, _POLICIES, _FORM = (f"{_PIV}.{each}" for each in (3, 7, 8, 9))
_PIV_FIPS = f"{_PIV}.10"
_SLOT = re.compile(r"YubiKey PIV Attestation ([0-9a-f]{2})")

_HSM_LIMITS = (
    "It does not say when it was made.",
    "It does not say who may use the key, nor whether the device is in FIPS mode.",
    "It says nothing of who may change other objects of the device.",
)
_PIV_LIMITS = (
    "A YubiKey attests keys that it made and that cannot leave it: no attribute says so.",
    "It does not say when it was made, and carries no nonce: an old one looks the same.",
    "It does not say whether the device is in FIPS mode.",
)


def verify_yubihsm(statement: Statement, asked: Asked) -> Verified:
    """Verify the attestation certificate of a YubiHSM 2.

    A nonce is found where the key's label is it, as text or in hexadecimal: who asks for a key
    with a label of their own knows that it was made since.

    Raises:
        AttestationError: No chain of a YubiHSM, an extension is missing, or another label.
    """
    leaf, chain = _certified(statement, asked, chains.authority)
    device = _issuer(chain)
    serial = _number(leaf, _HSM_SERIAL)
    if _number(device, _HSM_SERIAL) != serial:
        raise refused("key and device have different serial numbers")
    label = _label(leaf)
    for nonce in asked.nonces:
        if label.encode() != nonce and label.lower() != nonce.hex():
            raise refused(
                "the key's label is not the nonce", "Make the key with the nonce as its label."
            )
    origin, capabilities = der.bits(_value(leaf, _ORIGIN)), der.bits(_value(leaf, _CAPABILITIES))
    inside = origin == _GENERATED
    confined = inside and not capabilities & _EXPORTABLE_UNDER_WRAP
    facts: dict[str, FactValue] = {
        "origin": _named_origin(origin),
        "capabilities": f"{capabilities:#018x}",
        "exportable-under-wrap": bool(capabilities & _EXPORTABLE_UNDER_WRAP),
        "domains": f"{der.bits(_value(leaf, _DOMAINS)):#06x}",
        "object id": _number(leaf, _OBJECT_ID),
        "label": plain(label),
        "firmware": _version(leaf, _HSM_FIRMWARE),
        "certified for FIPS": any(each in leaf.extensions for each in _HSM_FIPS),
    }
    return Verified(
        spki=keys.encoded(keys.load(leaf.spki)),
        device=f"YubiHSM 2 {serial}",
        exportable=not confined,
        never_exportable=confined,
        generated_in_place=inside,
        hardware=chain.anchor.hardware,
        fips_mode=None,
        stated_at=None,
        anchor=chain.anchor.spki_sha256,
        facts=facts,
        limits=_HSM_LIMITS,
        certificates=chain.encodings,
    )


def verify_piv(statement: Statement, asked: Asked) -> Verified:
    """Verify the attestation certificate of a key in a YubiKey's PIV application.

    Raises:
        AttestationError: No chain of a YubiKey, or not the certificate of a PIV key.
    """
    leaf, chain = _certified(statement, asked, _piv_issuer)
    device = _issuer(chain)
    slot = _SLOT.fullmatch(leaf.common_name)
    policies = _value(leaf, _POLICIES)
    if slot is None or len(policies) != 2:  # noqa: PLR2004 (PIN and touch)
        raise refused(f"{leaf.name} is not that of a key in a PIV slot")
    if _version(leaf, _PIV_FIRMWARE) != _version(device, _PIV_FIRMWARE):
        raise refused("key and device have different firmware")
    serial = str(_number(leaf, _PIV_SERIAL)) if _PIV_SERIAL in leaf.extensions else None
    facts: dict[str, FactValue] = {
        "slot": slot[1],
        "firmware": _version(leaf, _PIV_FIRMWARE),
        "PIN policy": policies[0],
        "touch policy": policies[1],
        "serial number": serial,
        "certified for FIPS": _PIV_FIPS in leaf.extensions,
    }
    return Verified(
        spki=keys.encoded(keys.load(leaf.spki)),
        device=f"YubiKey {serial or '(no serial number stated)'}, PIV slot {slot[1]}",
        exportable=False,
        never_exportable=True,
        generated_in_place=True,
        hardware=chain.anchor.hardware,
        fips_mode=None,
        stated_at=None,
        anchor=chain.anchor.spki_sha256,
        facts=facts,
        limits=_PIV_LIMITS,
        certificates=chain.encodings,
    )


def _certified(
    statement: Statement, asked: Asked, may_issue: Callable[[tuple[Certificate, ...]], None]
) -> tuple[Certificate, Chain]:
    """The key's certificate and its chain."""
    content = read_certificates([statement.content])
    if len(content) != 1:
        raise refused("its content is not the one certificate of the key")
    pool = read_certificates(statement.certificates)
    (leaf,) = content
    return leaf, chain_of(
        leaf, pool, anchors=asked.anchors, at=asked.at, rules=Rules(may_issue=may_issue)
    )


def _piv_issuer(path: tuple[Certificate, ...]) -> None:
    """A device's certificate of firmware 4.3 has no basic constraints.

    Those of keys in its slots have none either, and a key that is attested by a device must not
    attest another: what issues for a key and is no authority's is no key's in a slot.
    """
    issuer = path[-1]
    first = len(path) == 2  # noqa: PLR2004 (the key and its device)
    if first and BASIC_CONSTRAINTS not in issuer.extensions and _POLICIES not in issuer.extensions:
        return
    chains.authority(path)


def _issuer(chain: Chain) -> Certificate:
    """The device's certificate: right below an anchor, where it is no authority's."""
    above = chain.certificates[1:]
    if not above:
        raise refused("a trusted key signed it, and no device")
    if BASIC_CONSTRAINTS not in above[0].extensions and len(above) > 1:
        raise refused(f"{above[0].name} is not that of a device")
    return above[0]


def _value(certificate: Certificate, oid: str) -> bytes:
    value = certificate.value(oid)
    if value is None:
        raise refused(f"{certificate.name} lacks the extension {oid}")
    return value


def _number(certificate: Certificate, oid: str) -> int:
    return der.unsigned(_value(certificate, oid))


def _label(certificate: Certificate) -> str:
    (content,) = der.values(_value(certificate, _LABEL), der.UTF8_STRING)
    return content.decode()


def _version(certificate: Certificate, oid: str) -> str:
    """Three octets; the YubiHSM wraps them in an OCTET STRING."""
    value = _value(certificate, oid)
    if oid == _HSM_FIRMWARE:
        (value,) = der.values(value, der.OCTET_STRING)
    if len(value) != 3:  # noqa: PLR2004 (major, minor, patch)
        raise refused(f"{certificate.name} has no firmware version")
    return ".".join(map(str, value))


def _named_origin(origin: int) -> str:
    bits = {_GENERATED: "generated", _IMPORTED: "imported", _WRAPPED: "imported under wrap"}
    named = [name for bit, name in bits.items() if origin & bit]
    rest = origin & ~(_GENERATED | _IMPORTED | _WRAPPED)
    return ", ".join(named + [f"{rest:#04x}"] * bool(rest)) or "not stated"

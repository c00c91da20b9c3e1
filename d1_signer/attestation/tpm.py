# SPDX-License-Identifier: Apache-2.0
"""``tpm2``: what a TPM 2.0 signs by TPM2_CertifyCreation or TPM2_Certify.

References are to the TCG's "TPM 2.0 Library", part 1 (architecture) and part 2 (structures).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from d1_signer.attestation import chains, keys
from d1_signer.attestation.certificates import (
    EXTENDED_KEY_USAGE,
    SUBJECT_ALT_NAME,
    read_certificates,
)
from d1_signer.attestation.chains import Chain, Rules, chain_of
from d1_signer.attestation.refusals import refused
from d1_signer.attestation.statement import Asked, FactValue, Statement, Verified
from d1_signer.attestation.tpm_structures import (
    DECRYPT,
    ECDSA,
    FIXED_PARENT,
    FIXED_TPM,
    RESTRICTED,
    RSASSA,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    Public,
    Reader,
    read_public,
    sized,
)

_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE: no restricted key signs foreign bytes that begin so
_CERTIFY, _CREATION = 0x8017, 0x801A
_DIGESTS: dict[int, type[HashAlgorithm]] = {0x000B: SHA256, 0x000C: SHA384, 0x000D: SHA512}
_AIK_CERTIFICATE = "2.23.133.8.3"  # tcg-kp-AIKCertificate
_LIMITS = (
    "That the attestation key is a TPM's, and restricted, is the word of who trusted it.",
    "It does not say when it was made: a TPM has no wall clock.",
    "It does not say whether the TPM is in FIPS mode, nor whether it is a chip or software.",
    "It does not say who may use the key.",
)
_NO_NONCE = "It was not asked for a nonce: an old one looks the same."
_LOADED = "TPM2_Certify says that the key is loaded there, and nothing of how it was made."


@dataclass(frozen=True, slots=True)
class _Attest:
    """TPMS_ATTEST (part 2, 10.12.12), as far as it is used."""

    kind: int
    extra: bytes
    clock: int
    resets: int
    restarts: int
    firmware: int
    name: bytes
    creation_hash: bytes


def verify_tpm(statement: Statement, asked: Asked) -> Verified:
    """Verify a TPM's statement about a key.

    Raises:
        AttestationError: The attestation key is not trusted, or not a restricted signing key; the
            signature, the nonce, the key's name or the creation data do not fit.
    """
    parts = dict(statement.parts or {})
    attested, signature = _part(parts, "attest"), _part(parts, "signature")
    if statement.content not in {b"", attested}:
        raise refused("it has content beside its parts")
    public, ak = (read_public(_part(parts, each)) for each in ("public", "ak_public"))
    chain = _trusted(statement, asked, ak)
    _verify_signature(ak, signature, attested)
    attest = _read_attest(attested)
    for nonce in asked.nonces:
        if attest.extra != nonce:
            raise refused("it does not carry the nonce", "Ask the TPM again with the new nonce.")
    if attest.name != public.name():
        raise refused("the public area that comes with it is of another key")
    if attest.kind == _CREATION:
        _check_creation(attest, public, sized(_part(parts, "creation_data")))
    return _verified(attest, public, chain, asked)


def _verified(attest: _Attest, public: Public, chain: Chain, asked: Asked) -> Verified:
    anchor = chain.anchor
    fixed = bool(public.attributes & FIXED_TPM)
    origin = bool(public.attributes & SENSITIVE_DATA_ORIGIN)
    # Clear: the key was given to the TPM. Set, in a key that can move: made in some TPM.
    generated = origin and (fixed or attest.kind == _CREATION or None)
    facts: dict[str, FactValue] = {
        "statement": "TPM2_CertifyCreation" if attest.kind == _CREATION else "TPM2_Certify",
        "fixedTPM": fixed,
        "fixedParent": bool(public.attributes & FIXED_PARENT),
        "sensitiveDataOrigin": origin,
        "name": public.name().hex(),
        "clock in milliseconds": attest.clock,
        "resets": attest.resets,
        "restarts": attest.restarts,
        "firmware": f"{attest.firmware:#018x}",
        "nonce": attest.extra.hex(),
    }
    limits = list(_LIMITS)
    if not asked.nonces:
        limits.append(_NO_NONCE)
    if attest.kind == _CERTIFY:
        limits.append(_LOADED)
    return Verified(
        spki=keys.encoded(public.key),
        device=f"TPM 2.0 of the attestation key under {anchor.name or anchor.spki_sha256}",
        exportable=not fixed,
        never_exportable=fixed and bool(generated),
        generated_in_place=generated,
        hardware=anchor.hardware,
        fips_mode=None,
        stated_at=None,
        anchor=anchor.spki_sha256,
        facts=facts,
        limits=tuple(limits),
        certificates=chain.encodings,
    )


def _part(parts: dict[str, bytes], name: str) -> bytes:
    part = parts.get(name)
    if not part:
        raise refused(f"its part {name} is missing")
    return part


def _trusted(statement: Statement, asked: Asked, ak: Public) -> Chain:
    """To the anchor of the attestation key: itself, or one above its certificate."""
    needed = RESTRICTED | SIGN | FIXED_TPM | SENSITIVE_DATA_ORIGIN
    if ak.attributes & needed != needed or ak.attributes & DECRYPT:
        raise refused(
            "the attestation key is not a restricted signing key that was made in its TPM:"
            " it could sign any bytes"
        )
    spki = keys.encoded(ak.key)
    digest = hashlib.sha256(spki).hexdigest()
    for anchor in asked.anchors:
        if anchor.spki_sha256 == digest:
            return Chain((), anchor)
    pool = read_certificates(statement.certificates)
    own = [each for each in pool if each.spki == spki]
    if len(own) != 1:
        raise refused(
            "the attestation key is neither trusted nor certified",
            "Trust it by the SHA-256 of its SubjectPublicKeyInfo once the TPM has shown that it is"
            " its own (tpm2_activatecredential), or give its certificate. That of the endorsement"
            " key does not certify it.",
        )
    (leaf,) = own
    chains.may_sign(leaf)
    # An authority may certify keys of software too, for other purposes.
    if _AIK_CERTIFICATE not in leaf.purposes():
        raise refused(f"{leaf.name} is not that of an attestation key")
    understood = frozenset({EXTENDED_KEY_USAGE, SUBJECT_ALT_NAME})
    rules = Rules(may_issue=chains.authority, understood=understood)
    return chain_of(leaf, pool, anchors=asked.anchors, at=asked.at, rules=rules)


def _verify_signature(ak: Public, signature: bytes, attested: bytes) -> None:
    """By the key's own scheme: TPMT_SIGNATURE (part 2, 11.3.4), or what it holds, plain."""
    if ak.scheme not in {ECDSA, RSASSA} or ak.scheme_hash not in _DIGESTS:
        raise refused("the attestation key signs by another scheme than ECDSA or RSASSA with SHA-2")
    if signature.startswith(ak.scheme.to_bytes(2, "big")):
        reader = Reader(signature)
        if (reader.number(2), reader.number(2)) != (ak.scheme, ak.scheme_hash):
            raise refused("its signature is not by the scheme of the attestation key")
        numbers = [reader.sized() for _ in range(2 if ak.scheme == ECDSA else 1)]
        reader.end()
        signature = numbers[0]
        if ak.scheme == ECDSA:
            r, s = (int.from_bytes(each, "big") for each in numbers)
            signature = utils.encode_dss_signature(r, s)
    if not keys.verify_plain(ak.key, signature, attested, _DIGESTS[ak.scheme_hash]()):
        raise refused("its signature is not by the attestation key")


def _read_attest(attested: bytes) -> _Attest:
    reader = Reader(attested)
    if reader.number(4) != _MAGIC:
        raise refused("it does not begin as what a TPM made itself")
    kind = reader.number(2)
    if kind not in {_CERTIFY, _CREATION}:
        raise refused("it is neither a TPM2_Certify nor a TPM2_CertifyCreation")
    reader.sized()  # the signer's qualified name, which holds its parents' names
    extra = reader.sized()
    clock, resets, restarts, safe = (reader.number(each) for each in (8, 4, 4, 1))
    if safe not in {0, 1}:
        raise refused("its clock is not one of a TPM")
    firmware, name, last = reader.number(8), reader.sized(), reader.sized()
    reader.end()
    creation_hash = last if kind == _CREATION else b""
    return _Attest(kind, extra, clock, resets, restarts, firmware, name, creation_hash)


def _check_creation(attest: _Attest, public: Public, data: bytes) -> None:
    """TPMS_CREATION_DATA (part 2, 15.1) is what the TPM hashed when it made the key."""
    if public.digest(data) != attest.creation_hash:
        raise refused("the creation data that comes with it is of another key")

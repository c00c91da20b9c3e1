# SPDX-License-Identifier: Apache-2.0
"""What is verified, and what is then known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from d1_signer.attestation.anchors import Anchor

FactValue = bool | int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A signed statement about a key, as its device gave it, with what is needed to verify it.

    Attributes:
        format: One of `d1_signer.attestation.FORMATS`.
        content: The statement. ``marvell``: as Google gives it, gzip or plain; ``luna-pkc``: the
            file of ``cmu getpkc``; ``yubihsm`` and ``yubikey-piv``: the key's certificate, PEM or
            DER; ``securosys``: the JSON; ``tpm2``: empty, `parts` has it.
        certificates: Certificates that may be needed, in any order, each entry PEM with one or
            many, or DER. None of them is trusted for standing here.
        nonce: What the verifier had chosen, where it is kept with the statement; the statement
            must carry it, as that of `verify`.
        parts: ``tpm2``: ``attest`` (TPMS_ATTEST), ``signature`` (TPMT_SIGNATURE, or what
            ``tpm2_certify --format plain`` writes), ``public`` and ``ak_public`` (TPM2B_PUBLIC or
            TPMT_PUBLIC), and for TPM2_CertifyCreation ``creation_data`` (TPM2B_CREATION_DATA or
            TPMS_CREATION_DATA).
    """

    format: str
    content: bytes = b""
    certificates: tuple[bytes, ...] = ()
    nonce: bytes | None = None
    parts: Mapping[str, bytes] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a statement proves, under the anchor that is named.

    Attributes:
        spki: The key it is about, SubjectPublicKeyInfo in DER.
        device: The device that holds it, for people, with its serial number where it says so.
        exportable: Whether the private key can leave the device; None where it does not say.
        never_exportable: Whether it never could; None where it does not say.
        generated_in_place: Whether the key was made in the device; None where it does not say.
        hardware: Whether the device is hardware; None where nobody vouches for that.
        fips_mode: Whether the device stated to be in FIPS mode; None where it does not say.
        stated_at: Seconds since the epoch, by the device's clock; None where it does not say.
        anchor: SHA-256 of the trusted key's SubjectPublicKeyInfo that all rests on, hexadecimal.
        facts: What the statement says in its own terms, such as ``CKA_EXTRACTABLE``.
        limits: What it does not say, or not prove, in plain words.
        certificates: Those that it rests on, in DER, from the lowest up to the anchor: of all that
            came along only these were judged. ``marvell``: the owner's after the manufacturer's.
    """

    spki: bytes
    device: str
    exportable: bool | None
    never_exportable: bool | None
    generated_in_place: bool | None
    hardware: bool | None
    fips_mode: bool | None
    stated_at: int | None
    anchor: str
    facts: Mapping[str, FactValue] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    certificates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a statement is held against.

    Attributes:
        anchors: Keys that vouch for its format.
        at: The moment that all certificates must be valid at; None: not judged.
        nonces: What it must carry.
    """

    anchors: tuple[Anchor, ...]
    at: float | None
    nonces: tuple[bytes, ...]

# SPDX-License-Identifier: Apache-2.0
"""Answers of ``C_Sign`` that are no r||s of 64 bytes (PKCS#11 v2.40 mechanisms, section 2.3.1).

They are refused and named: none is taken for what it might mean.
"""

from __future__ import annotations

from d1_signer.errors import InvalidSignatureError
from d1_signer.es256 import COORDINATE_LENGTH, SIGNATURE_LENGTH, raw_from_der

_SEQUENCE = 0x30
_FEWEST = 56  # bytes; that more than eight are zeros at the front does not happen


def is_stripped(signature: bytes) -> bool:
    """Whether it is shorter than r||s, as where leading zeros of r or s are left out."""
    return _FEWEST <= len(signature) < SIGNATURE_LENGTH and not _is_der(signature)


def odd_form(signature: bytes) -> InvalidSignatureError:
    """The error for an answer in another form; it tells the form, not the signature."""
    return InvalidSignatureError(
        f"The token answered a signature of {len(signature)} bytes, {_form(signature)}, where "
        f"CKM_ECDSA has {SIGNATURE_LENGTH}.",
        hint="The module does not keep to PKCS#11; update the vendor's software.",
        retryable=is_stripped(signature),
        details={
            "step": "signature",
            "call": "C_Sign",
            "pkcs11": "CKR_OK",
            "signature_length": len(signature),
        },
    )


def _form(signature: bytes) -> str:
    if _is_der(signature):
        return "in DER"
    if is_stripped(signature):
        return "as where leading zeros of r or s are left out"
    half, odd = divmod(len(signature), 2)
    padding = half - COORDINATE_LENGTH
    if not odd and padding > 0 and not any(signature[:padding] + signature[half : half + padding]):
        return "r and s with leading zeros"
    return "in no form that is known"


def _is_der(signature: bytes) -> bool:
    if signature[:1] != bytes((_SEQUENCE,)):
        return False
    try:
        raw_from_der(signature)
    except InvalidSignatureError:
        return False
    return True

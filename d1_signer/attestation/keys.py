# SPDX-License-Identifier: Apache-2.0
"""Public keys and signatures of statements and of their certificates."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from d1_signer.attestation import der
from d1_signer.attestation.refusals import refused

AnyKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

# SHA-1 and MD5 stand in no chain, but for a root's signature on itself, which nobody looks at.
_RSA: dict[str, type[SHA256 | SHA384 | SHA512]] = {
    "1.2.840.113549.1.1.11": SHA256,
    "1.2.840.113549.1.1.12": SHA384,
    "1.2.840.113549.1.1.13": SHA512,
}
_ECDSA: dict[str, type[SHA256 | SHA384 | SHA512]] = {
    "1.2.840.10045.4.3.2": SHA256,
    "1.2.840.10045.4.3.3": SHA384,
    "1.2.840.10045.4.3.4": SHA512,
}
_NULL = b"\x05\x00"
_SHORTEST_RSA, _LONGEST_RSA = 2048, 8192
_LONGEST_EXPONENT = 64  # bits; vendors have 3 and 65537, and the longer, the slower
CURVES: dict[str, ec.EllipticCurve] = {
    curve.name: curve for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
}


def load(spki: bytes) -> AnyKey:
    """A key from its SubjectPublicKeyInfo: RSA, or EC on a NIST curve.

    Raises:
        AttestationError: Another kind of key, or one that costs too much to use.
    """
    key = load_der_public_key(spki)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size <= _LONGEST_RSA:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
        return key
    raise refused("a key is neither RSA of at most 8192 bits nor on P-256, P-384 or P-521")


def encoded(key: AnyKey) -> bytes:
    """The key's SubjectPublicKeyInfo in DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def rsa_key(modulus: int, exponent: int) -> rsa.RSAPublicKey:
    """An RSA key from its numbers."""
    if modulus.bit_length() > _LONGEST_RSA:
        raise refused(f"its RSA key is longer than {_LONGEST_RSA} bits")
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def verify_plain(key: AnyKey, signature: bytes, data: bytes, digest: HashAlgorithm) -> bool:
    """Whether a signature is by this key: PKCS #1 v1.5, or ECDSA in strict DER.

    Raises:
        AttestationError: The key is too weak to sign statements, RSA below 2048 bits, or its
            exponent costs too much.
    """
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if key.key_size < _SHORTEST_RSA:
                raise refused(f"a signing key is RSA of {key.key_size} bits, below {_SHORTEST_RSA}")
            if key.public_numbers().e.bit_length() > _LONGEST_EXPONENT:
                raise refused(f"a signing key's exponent has more than {_LONGEST_EXPONENT} bits")
            key.verify(signature, data, padding.PKCS1v15(), digest)
        else:
            key.verify(signature, data, ec.ECDSA(digest))
    except InvalidSignature:
        return False
    return True


def verify_certified(
    key: AnyKey,
    algorithm: str,
    parameters: bytes,
    signature: bytes,
    data: bytes,
    *,
    of_luna: bool = False,
) -> bool:
    """Whether a certificate's signature is by this key.

    Args:
        key: The issuer's key.
        algorithm: The OID of the signature algorithm.
        parameters: Its parameters in DER; empty where there are none.
        signature: The signature.
        data: What is signed.
        of_luna: Read both INTEGERs of ECDSA as unsigned and admit NULL as its parameters, which
            RFC 5758 forbids; certificates made in a Luna HSM have both.

    Raises:
        AttestationError: A weak or unknown algorithm.
    """
    if algorithm not in _RSA and algorithm not in _ECDSA:
        raise refused(f"a certificate's signature algorithm {algorithm} is weak or not known")
    if isinstance(key, rsa.RSAPublicKey):
        # Absent parameters are in Yubico's certificates of 2025; RFC 4055 has verifiers take them.
        known = algorithm in _RSA and parameters in {b"", _NULL}
        return known and verify_plain(key, signature, data, _RSA[algorithm]())
    if algorithm not in _ECDSA or (parameters and not (of_luna and parameters == _NULL)):
        return False
    if of_luna:
        signature = utils.encode_dss_signature(*der.unsigned_pair(signature))
    return verify_plain(key, signature, data, _ECDSA[algorithm]())

# SPDX-License-Identifier: Apache-2.0
"""Structures of TPM 2.0 (TCG, "TPM 2.0 Library", part 2), as far as statements have them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer.attestation import keys
from d1_signer.attestation.refusals import refused

RSA, ECC = 0x0001, 0x0023
RSASSA, ECDSA, NOTHING = 0x0014, 0x0018, 0x0010
# Bits of TPMA_OBJECT, part 2 section 8.3
FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN = 1 << 1, 1 << 4, 1 << 5
RESTRICTED, DECRYPT, SIGN = 1 << 16, 1 << 17, 1 << 18

_DIGESTS = {0x000B: hashlib.sha256, 0x000C: hashlib.sha384, 0x000D: hashlib.sha512}
_CURVES = {0x0003: "secp256r1", 0x0004: "secp384r1", 0x0005: "secp521r1"}
_SYMMETRIC = {0x0006, 0x0013, 0x0026}  # AES, SM4, Camellia: followed by key bits and mode
_DEFAULT_EXPONENT = 65537


class Reader:
    """Bytes that are read from the front, big-endian, and must end with what is due."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        """The next octets."""
        taken = self._data[self._at : self._at + length]
        if len(taken) != length:
            raise refused("a TPM structure is cut")
        self._at += length
        return taken

    def number(self, length: int) -> int:
        """An unsigned number."""
        return int.from_bytes(self.take(length), "big")

    def sized(self) -> bytes:
        """A TPM2B: a length of two octets and so many octets."""
        return self.take(self.number(2))

    def end(self) -> None:
        """Nothing is left."""
        if self._at != len(self._data):
            raise refused("something stands behind a TPM structure")


def sized(data: bytes) -> bytes:
    """What a TPM2B holds; other bytes as they are, since tools write either."""
    length = int.from_bytes(data[:2], "big")
    return data[2:] if length == len(data) - 2 else data


@dataclass(frozen=True, slots=True)
class Public:
    """TPMT_PUBLIC (12.2.4) of an RSA or ECC key.

    Attributes:
        encoding: All of it.
        name_algorithm: What its name is hashed by.
        attributes: TPMA_OBJECT.
        scheme: How it signs; `NOTHING` where that is open.
        scheme_hash: The hash of the scheme, 0 where that is open.
        key: The key.
    """

    encoding: bytes
    name_algorithm: int
    attributes: int
    scheme: int
    scheme_hash: int
    key: keys.AnyKey

    def digest(self, data: bytes) -> bytes:
        """A hash by the algorithm of its name."""
        return _DIGESTS[self.name_algorithm](data).digest()

    def name(self) -> bytes:
        """Its name (part 1, 16): the algorithm, and the hash of the public area by it."""
        return self.name_algorithm.to_bytes(2, "big") + self.digest(self.encoding)


def read_public(data: bytes) -> Public:
    """Read TPM2B_PUBLIC, or TPMT_PUBLIC.

    Raises:
        AttestationError: Not one of an RSA or ECC key that is named by SHA-2.
    """
    encoding = sized(data)
    reader = Reader(encoding)
    kind, name_algorithm, attributes = reader.number(2), reader.number(2), reader.number(4)
    if kind not in {RSA, ECC} or name_algorithm not in _DIGESTS:
        raise refused("a public area is not of an RSA or ECC key that is named by SHA-2")
    reader.sized()  # the policy of its use
    if reader.number(2) in _SYMMETRIC:
        reader.take(4)
    scheme = reader.number(2)
    scheme_hash = 0 if scheme == NOTHING else reader.number(2)
    key = _rsa(reader) if kind == RSA else _ecc(reader)
    reader.end()
    return Public(encoding, name_algorithm, attributes, scheme, scheme_hash, key)


def _rsa(reader: Reader) -> keys.AnyKey:
    bits, exponent, modulus = reader.number(2), reader.number(4), reader.sized()
    if len(modulus) * 8 != bits:
        raise refused("an RSA key in a public area is not as long as it says")
    return keys.rsa_key(int.from_bytes(modulus, "big"), exponent or _DEFAULT_EXPONENT)


def _ecc(reader: Reader) -> keys.AnyKey:
    curve = _CURVES.get(reader.number(2))
    if reader.number(2) != NOTHING:  # the KDF, which no TPM has there
        raise refused("an ECC key in a public area has a key derivation scheme")
    x, y = (int.from_bytes(reader.sized(), "big") for _ in range(2))
    if curve is None:
        raise refused("an ECC key in a public area is not on P-256, P-384 or P-521")
    return ec.EllipticCurvePublicNumbers(x, y, keys.CURVES[curve]).public_key()

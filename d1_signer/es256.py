# SPDX-License-Identifier: Apache-2.0
"""ES256: signature forms, the public key and its verification.

ES256 is ECDSA on P-256 with SHA-256, the signature being the 64 bytes r||s (RFC 7518 section 3.4).
Nothing else is supported: no other curve, no other hash. Pure code, no I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import final

from asn1crypto.algos import DSASignature
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from d1_signer import jose
from d1_signer.errors import InvalidInputError, InvalidKeyError, InvalidSignatureError
from d1_signer.frames import without_locals

ALGORITHM = "ES256"
"""The JWS algorithm name (RFC 7518 section 3.1)."""

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""n, the order of P-256's base point (NIST SP 800-186 section 3.2.1.3)."""

COORDINATE_LENGTH = 32
SIGNATURE_LENGTH = 2 * COORDINATE_LENGTH
DIGEST_LENGTH = 32

_ZERO, _ORDER = (number.to_bytes(COORDINATE_LENGTH, "big") for number in (0, ORDER))
_LONGEST_DER = 72  # SEQUENCE of two 33-byte INTEGERs, each with its two bytes of tag and length
_UNCOMPRESSED = 0x04
_ECDSA_SHA256 = ec.ECDSA(SHA256())
_ECDSA_PREHASHED = ec.ECDSA(utils.Prehashed(SHA256()))


def raw_from_der(der: bytes) -> bytes:
    """Convert an ECDSA signature from DER to raw r||s.

    Args:
        der: ``Ecdsa-Sig-Value`` (RFC 3279 section 2.2.3): SEQUENCE of INTEGER r, INTEGER s, in
            strict DER, 8 to 72 bytes.

    Returns:
        64 bytes: r and s, big-endian, each padded to 32 bytes (RFC 7518 section 3.4).

    Raises:
        InvalidSignatureError: Not strict DER (trailing bytes, indefinite length, non-minimal
            length or integer), or r or s outside 1..n-1.
    """
    if not isinstance(der, bytes) or len(der) > _LONGEST_DER:
        raise _malformed("it is not a DER signature of at most 72 bytes")
    try:
        parsed = DSASignature.load(der, strict=True)
        r, s = parsed["r"].native, parsed["s"].native
        raw: bytes = r.to_bytes(COORDINATE_LENGTH, "big") + s.to_bytes(COORDINATE_LENGTH, "big")
    except (ValueError, TypeError, OverflowError, KeyError, AttributeError):
        raise _malformed("it is not the DER form of two positive integers") from None
    # asn1crypto reads BER that DER forbids even with strict=True; one value has one DER form.
    if der_from_raw(raw) != der:
        raise _malformed("it is BER and not DER")
    return raw


def der_from_raw(raw: bytes) -> bytes:
    """Convert an ECDSA signature from raw r||s to DER.

    Args:
        raw: 64 bytes, r||s.

    Returns:
        ``Ecdsa-Sig-Value`` in DER, 8 to 72 bytes.

    Raises:
        InvalidSignatureError: Not 64 bytes, or r or s outside 1..n-1.
    """
    check_raw(raw)
    content = _der_integer(raw[:COORDINATE_LENGTH]) + _der_integer(raw[COORDINATE_LENGTH:])
    return bytes((0x30, len(content))) + content


def check_raw(raw: bytes) -> None:
    """Refuse what cannot be an ES256 signature.

    Args:
        raw: 64 bytes, r||s.

    Raises:
        InvalidSignatureError: Not 64 bytes, or r or s outside 1..n-1.
    """
    if not isinstance(raw, bytes) or len(raw) != SIGNATURE_LENGTH:
        raise _malformed("it is not 64 bytes of r||s")
    # Big-endian numbers of one length are in the order of their bytes.
    if not (_ZERO < raw[:COORDINATE_LENGTH] < _ORDER and _ZERO < raw[COORDINATE_LENGTH:] < _ORDER):
        raise _malformed("r or s is outside 1..n-1")


def _der_integer(coordinate: bytes) -> bytes:
    magnitude = coordinate.lstrip(b"\0")
    if magnitude[0] >= 0x80:  # noqa: PLR2004 (DER integers are signed: X.690 section 8.3)
        magnitude = b"\0" + magnitude
    return bytes((0x02, len(magnitude))) + magnitude


def _malformed(reason: str) -> InvalidSignatureError:
    return InvalidSignatureError(f"The signature is refused: {reason}.")


@final
class PublicKey:
    """A public key on P-256. Immutable, hashable, comparable by value.

    Build one with `from_pem`, `from_der`, `from_jwk` or `from_point`; each raises
    `InvalidKeyError` for anything that is not a point on P-256.
    """

    __slots__ = ("_der", "_key", "_thumbprint", "_xy")

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        """Wrap a key of the ``cryptography`` package.

        Raises:
            InvalidKeyError: Not such a key, or on another curve.
        """
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _not_p256(f"it is a {type(key).__name__.removesuffix('PublicKey')} key")
        if not isinstance(key.curve, ec.SECP256R1):
            raise _not_p256(f"its curve is {key.curve.name}")
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self._key = key
        self._der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._xy = (point[1:33], point[33:65])
        # RFC 7638 section 3.2: the required members only, in lexicographic order.
        digest = hashlib.sha256(jose.compact_json(self.jwk())).digest()
        self._thumbprint = jose.b64url_encode(digest).decode("ascii")

    @classmethod
    @without_locals  # what is given by mistake may be a private key
    def from_pem(cls, pem: str | bytes) -> PublicKey:
        """Read a SubjectPublicKeyInfo in PEM (RFC 7468 section 13).

        Raises:
            InvalidKeyError: Not a public key in PEM, or not on P-256.
        """
        try:
            key = load_pem_public_key(pem.encode() if isinstance(pem, str) else pem)
        except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
            raise _not_p256("it is not a public key in PEM") from None
        return cls(key)  # type: ignore[arg-type]

    @classmethod
    @without_locals  # what is given by mistake may be a private key
    def from_der(cls, der: bytes) -> PublicKey:
        """Read a SubjectPublicKeyInfo in DER (RFC 5480 section 2).

        Raises:
            InvalidKeyError: Not a public key in DER, or not on P-256.
        """
        try:
            key = load_der_public_key(der)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise _not_p256("it is not a SubjectPublicKeyInfo in DER") from None
        return cls(key)  # type: ignore[arg-type]

    @classmethod
    @without_locals  # what is given by mistake may be a private key
    def from_jwk(cls, jwk: Mapping[str, object]) -> PublicKey:
        """Read a JWK (RFC 7518 section 6.2.1); members beside the key itself are ignored.

        Raises:
            InvalidKeyError: Not an EC key on P-256 with coordinates of 32 bytes each, or a JWK
                that holds the private key (``d``), which must not travel here.
        """
        if not isinstance(jwk, Mapping) or jwk.get("kty") != "EC" or jwk.get("crv") != "P-256":
            raise _not_p256('the JWK is not of kty "EC" and crv "P-256"')
        if "d" in jwk:
            raise _not_p256("the JWK holds a private key")
        try:
            x, y = (jose.b64url_decode(jwk[name]) for name in ("x", "y"))  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError, AttributeError):
            raise _not_p256("the JWK's coordinates are not base64url") from None
        if len(x) != COORDINATE_LENGTH or len(y) != COORDINATE_LENGTH:
            raise _not_p256("the JWK's coordinates are not 32 bytes each")
        return cls.from_point(bytes((_UNCOMPRESSED,)) + x + y)

    @classmethod
    def from_point(cls, point: bytes) -> PublicKey:
        """Read an EC point as PKCS#11 modules give it in ``CKA_EC_POINT``.

        Args:
            point: SEC 1 form (65 bytes uncompressed, 33 compressed), bare or inside a DER OCTET
                STRING (67 or 35 bytes); PKCS#11 v2.40 asks for the latter, modules differ.

        Raises:
            InvalidKeyError: None of these forms, or not a point on P-256.
        """
        if not isinstance(point, bytes | bytearray | memoryview):
            raise _not_p256("the point is not bytes")
        try:
            if len(point) in {35, 67} and point[:2] == bytes((0x04, len(point) - 2)):
                point = point[2:]
            key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes(point))
        except (ValueError, TypeError):
            raise _not_p256("the point is not on P-256") from None
        return cls(key)

    def pem(self) -> str:
        """SubjectPublicKeyInfo in PEM, with a final line feed."""
        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def der(self) -> bytes:
        """SubjectPublicKeyInfo in DER, 91 bytes, the point uncompressed."""
        return self._der

    def jwk(self) -> dict[str, str]:
        """The JWK's required members ``crv``, ``kty``, ``x``, ``y`` (RFC 7518 section 6.2.1)."""
        x, y = self._xy
        return {
            "crv": "P-256",
            "kty": "EC",
            "x": jose.b64url_encode(x).decode("ascii"),
            "y": jose.b64url_encode(y).decode("ascii"),
        }

    def thumbprint(self) -> str:
        """JWK thumbprint with SHA-256 (RFC 7638): 43 characters of base64url."""
        return self._thumbprint

    def verify(self, signature: bytes, message: bytes) -> None:
        """Verify an ES256 signature over a message.

        Args:
            signature: 64 bytes, r||s.
            message: Bytes of any length, not hashed yet.

        Raises:
            InvalidSignatureError: Malformed, or not made by this key over this message.
            InvalidInputError: ``message`` is not bytes.
        """
        self._verify(signature, message, _ECDSA_SHA256)

    def verify_digest(self, signature: bytes, digest: bytes) -> None:
        """Verify an ES256 signature over a digest.

        Args:
            signature: 64 bytes, r||s.
            digest: SHA-256 digest, 32 bytes.

        Raises:
            InvalidSignatureError: Malformed, or not made by this key over this digest.
            InvalidInputError: ``digest`` is not 32 bytes.
        """
        if not isinstance(digest, bytes) or len(digest) != DIGEST_LENGTH:
            raise InvalidInputError("The digest to verify is not 32 bytes.")
        self._verify(signature, digest, _ECDSA_PREHASHED)

    def _verify(self, signature: bytes, data: bytes, algorithm: ec.ECDSA) -> None:
        der = der_from_raw(signature)
        try:
            self._key.verify(der, data, algorithm)
        except (TypeError, BufferError):
            raise InvalidInputError("The message to verify is not bytes.") from None
        except InvalidSignature:
            raise InvalidSignatureError(
                "The signature was not made by this key over this message.",
                hint=f"The key's thumbprint is {self._thumbprint}.",
            ) from None

    def cryptography_key(self) -> ec.EllipticCurvePublicKey:
        """The same key as an object of the ``cryptography`` package."""
        return self._key

    def __eq__(self, other: object) -> bool:
        return self._der == other._der if isinstance(other, PublicKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._der)

    def __repr__(self) -> str:
        # A crash reporter that shows local variables meets one whose key was refused in __init__.
        return f"<PublicKey P-256 {getattr(self, '_thumbprint', 'refused')}>"


def _not_p256(reason: str) -> InvalidKeyError:
    return InvalidKeyError(
        f"The key is refused: {reason}.", hint="D1 takes ES256 only: use a key on P-256."
    )

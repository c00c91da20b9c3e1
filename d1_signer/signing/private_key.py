# SPDX-License-Identifier: Apache-2.0
"""A signer in the shape of a private key of the ``cryptography`` package.

``cryptography``'s builders of certificates and signing requests, PyJWT, MSAL and others take any
`EllipticCurvePrivateKey` and only call its ``sign``. Libraries that export the private numbers
(joserfc, Authlib) cannot work with a key that stays in an HSM.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    PrivateFormat,
)

from d1_signer.errors import InvalidInputError, SignerError
from d1_signer.es256 import PublicKey, der_from_raw


class _Signs(Protocol):
    @property
    def public_key(self) -> PublicKey: ...

    def sign(self, message: bytes) -> bytes: ...

    def sign_digest(self, digest: bytes) -> bytes: ...


class SignerPrivateKey(ec.EllipticCurvePrivateKey):
    """Signs with ECDSA on P-256 and SHA-256; everything else is refused.

    It is good as long as its signer is open, and does not close it.
    """

    def __init__(self, signer: _Signs) -> None:
        """Use ``signer``, which stays the caller's."""
        self._signer = signer

    def sign(
        self,
        data: bytes | bytearray | memoryview,
        signature_algorithm: ec.EllipticCurveSignatureAlgorithm,
    ) -> bytes:
        """Sign a message or its digest.

        Args:
            data: The message; with ``Prehashed`` its SHA-256 digest, 32 bytes.
            signature_algorithm: ``ECDSA(SHA256())`` or ``ECDSA(Prehashed(SHA256()))``.

        Returns:
            The signature in DER (RFC 3279 section 2.2.3), 8 to 72 bytes.

        Raises:
            InvalidInputError: Not bytes, another algorithm, or deterministic signing, which no HSM
                promises.
            SignerError: As for `Signer.sign`.
        """
        # bytes(5) would be five zero bytes, and a signature over them.
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidInputError("The data to sign is not bytes.")
        if not isinstance(signature_algorithm, ec.ECDSA) or getattr(
            signature_algorithm, "deterministic_signing", False
        ):
            raise _unsupported(type(signature_algorithm).__name__)
        algorithm = signature_algorithm.algorithm
        if isinstance(algorithm, SHA256):
            return der_from_raw(self._signer.sign(bytes(data)))
        # cryptography shows no public way to ask what was hashed.
        if isinstance(algorithm, utils.Prehashed) and isinstance(algorithm._algorithm, SHA256):  # noqa: SLF001
            return der_from_raw(self._signer.sign_digest(bytes(data)))
        raise _unsupported(f"ECDSA with {getattr(algorithm, 'name', 'another hash')}")

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._signer.public_key.cryptography_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        """256 bits."""
        return self.curve.key_size

    def exchange(
        self,
        algorithm: ec.ECDH,  # noqa: ARG002 (the interface of cryptography)
        peer_public_key: ec.EllipticCurvePublicKey,  # noqa: ARG002
    ) -> NoReturn:
        """Refused: the key signs and does nothing else."""
        raise _stays()

    def private_numbers(self) -> NoReturn:
        """Refused: the private key stays where it is."""
        raise _stays()

    def private_bytes(
        self,
        encoding: Encoding,  # noqa: ARG002 (the interface of cryptography)
        format: PrivateFormat,  # noqa: A002, ARG002
        encryption_algorithm: KeySerializationEncryption,  # noqa: ARG002
    ) -> NoReturn:
        """Refused: the private key stays where it is."""
        raise _stays()

    def __copy__(self) -> SignerPrivateKey:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> SignerPrivateKey:
        return self

    def __reduce__(self) -> NoReturn:
        msg = "the private key of a signer cannot be pickled"
        raise TypeError(msg)

    def __repr__(self) -> str:
        return f"<SignerPrivateKey of {self._signer!r}>"


def _stays() -> SignerError:
    return SignerError(
        "The private key cannot leave its place, and signs only.",
        hint="Use a library that calls the key's sign() and does not export it.",
    )


def _unsupported(algorithm: str) -> InvalidInputError:
    return InvalidInputError(
        f"The key does not sign with {algorithm}.",
        hint="Use ECDSA(SHA256()), without deterministic signing.",
    )

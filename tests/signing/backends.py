# SPDX-License-Identifier: Apache-2.0
"""Backends as a third party could write them: the inputs of `Signer`, good and bad."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import SignatureEncoding


class KeyBackend:
    """Signs with a key in memory, in the encoding it is told; notes what it is asked."""

    name = "unit"

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        encoding: SignatureEncoding = SignatureEncoding.DER,
        *,
        evidence: Evidence | None = None,
    ) -> None:
        self.key = key
        self.encoding = encoding
        self.evidence = evidence or Evidence(
            location="unit:key",
            exportable=True,
            generated_in_place=None,
            hardware=False,
            facts=(Fact(name="storage", value="memory", source="unit"),),
        )
        self.asked: list[tuple[bytes, float | None]] = []
        self.closed = 0

    def public_key(self) -> PublicKey:
        return PublicKey(self.key.public_key())

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        self.asked.append((digest, deadline))
        der = self.key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256())))
        if self.encoding is SignatureEncoding.DER:
            return der
        r, s = utils.decode_dss_signature(der)
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def custody(self) -> Evidence:
        return self.evidence

    def close(self) -> None:
        self.closed += 1


class AnsweringBackend(KeyBackend):
    """Answers what a function makes of the digest, or raises what it raises."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        answer: Callable[[bytes], bytes],
        encoding: SignatureEncoding = SignatureEncoding.RAW,
    ) -> None:
        super().__init__(key, encoding)
        self.answer = answer

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        self.asked.append((digest, deadline))
        return self.answer(digest)

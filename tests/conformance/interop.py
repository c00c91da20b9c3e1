# SPDX-License-Identifier: Apache-2.0
"""`Signer.as_private_key` in the hands of other people's libraries; derived for every backend."""

from __future__ import annotations

import copy
import datetime as dt
import pickle

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, Hash
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.auth.crypt.es import EsSigner
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import ECKey
from msal.oauth2cli.assertion import JwtAssertionCreator

from d1_signer import errors
from d1_signer.signing.signer import Signer

_NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "TLSMA-TEST/issuer/PPR")])
_CLAIMS = {"iss": "issuer", "sub": "issuer", "exp": 4102444800}


class PrivateKeyInterop:
    """Needs the fixture ``signer`` of `SignerConformance`."""

    def test_message_and_prehashed_digest(self, signer: Signer) -> None:
        key = signer.as_private_key()
        assert key.curve.name == "secp256r1"
        assert key.key_size == 256
        public = key.public_key()
        public.verify(key.sign(b"message", ec.ECDSA(SHA256())), b"message", ec.ECDSA(SHA256()))
        digest = Hash(SHA256())
        digest.update(b"message")
        prehashed = ec.ECDSA(utils.Prehashed(SHA256()))
        public.verify(key.sign(digest.finalize(), prehashed), b"message", ec.ECDSA(SHA256()))
        buffer = memoryview(bytearray(b"message"))
        public.verify(key.sign(buffer, ec.ECDSA(SHA256())), b"message", ec.ECDSA(SHA256()))

    def test_everything_but_es256_is_refused(self, signer: Signer) -> None:
        key = signer.as_private_key()
        for algorithm in (
            ec.ECDSA(SHA384()),
            ec.ECDSA(utils.Prehashed(SHA384())),
            ec.ECDSA(SHA256(), deterministic_signing=True),
        ):
            with pytest.raises(errors.InvalidInputError):
                key.sign(bytes(32), algorithm)
        with pytest.raises(errors.InvalidInputError):
            key.sign(b"31 bytes are not a SHA-256 hash", ec.ECDSA(utils.Prehashed(SHA256())))
        for leave in (
            key.private_numbers,
            lambda: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            lambda: key.exchange(ec.ECDH(), key.public_key()),
        ):
            with pytest.raises(errors.SignerError):
                leave()
        with pytest.raises(TypeError):
            pickle.dumps(key)
        assert copy.deepcopy(key) is key

    def test_signing_request(self, signer: Signer) -> None:
        builder = x509.CertificateSigningRequestBuilder().subject_name(_NAME)
        request = builder.sign(signer.as_private_key(), SHA256())
        read = x509.load_pem_x509_csr(request.public_bytes(Encoding.PEM))
        assert read.is_signature_valid
        assert read.public_key() == signer.public_key.cryptography_key()

    def test_certificate(self, signer: Signer) -> None:
        now = dt.datetime.now(dt.UTC)
        key = signer.as_private_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_NAME)
            .issuer_name(_NAME)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + dt.timedelta(days=1))
            .sign(key, SHA256())
        )
        certificate.verify_directly_issued_by(certificate)

    def test_pyjwt(self, signer: Signer) -> None:
        token = jwt.encode(_CLAIMS, signer.as_private_key(), algorithm="ES256")
        _verify(signer, token)

    def test_msal_assertion(self, signer: Signer) -> None:
        creator = JwtAssertionCreator(signer.as_private_key(), algorithm="ES256")
        token = creator.create_normal_assertion("https://d1.example/token", "issuer")
        claims = _verify(signer, token)
        assert claims["aud"] == "https://d1.example/token"

    def test_google_auth_signer(self, signer: Signer) -> None:
        # Answers r||s, as a JWS wants it.
        signature = EsSigner(signer.as_private_key()).sign(b"message")
        signer.public_key.verify(signature, b"message")

    def test_closed_signer_ends_the_key(self, signer: Signer) -> None:
        key = signer.as_private_key()
        signer.close()
        with pytest.raises(errors.SignerClosedError):
            key.sign(b"message", ec.ECDSA(SHA256()))


def _verify(signer: Signer, token: str | bytes) -> dict[str, object]:
    text = token.decode() if isinstance(token, bytes) else token
    public = ECKey.import_key(signer.public_key.pem())
    return joserfc_jwt.decode(text, public, algorithms=["ES256"]).claims

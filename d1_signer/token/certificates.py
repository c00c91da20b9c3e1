# SPDX-License-Identifier: Apache-2.0
"""What D1 demands of a client certificate."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from d1_signer.errors import ConfigurationError
from d1_signer.signing.signer_set import SignerSet
from d1_signer.token.d1 import Environment


def require_certificate(environment: Environment, certificate: object) -> None:
    """Refuse to go to Thales' own environments without one."""
    if environment.is_thales and certificate is None:
        raise ConfigurationError(
            "D1 needs a client certificate (mutual TLS) and none is given.",
            hint="Give client_certificate, or proxy_adds_certificate=True where an outgoing "
            "proxy adds it.",
        )


def require_another_key(signers: SignerSet, certificate: x509.Certificate) -> None:
    """Refuse a client certificate of a key that signs assertions: D1 wants two keys."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        key = certificate.public_key().public_bytes(*form)
    except (ValueError, UnsupportedAlgorithm):
        return  # no key of ES256
    if any(key == public_key.der() for public_key in signers.public_keys()):
        raise ConfigurationError(
            "The client certificate is for the key that signs assertions.",
            hint="Make another key for mutual TLS (generate-key, csr) and have Thales sign that.",
        )

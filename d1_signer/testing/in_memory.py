# SPDX-License-Identifier: Apache-2.0
"""A signer whose key is made for the test, and a sandbox of D1 that knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.errors import SignerClosedError
from d1_signer.es256 import PublicKey
from d1_signer.events import Observer
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.signing.signer import Signer
from d1_signer.token.fetcher import TokenFetcher
from d1_signer.transport.credentials import ClientCertificate

if TYPE_CHECKING:
    from d1_signer.sandbox import Sandbox

_ALGORITHM = ec.ECDSA(utils.Prehashed(SHA256()))
_ISSUER = "test-issuer"


class _InMemoryBackend:
    """A new key in this process's memory, for as long as the backend is open."""

    name = "memory"
    encoding = SignatureEncoding.DER

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self._key: ec.EllipticCurvePrivateKey | None = key
        self._public_key = PublicKey(key.public_key())

    def public_key(self) -> PublicKey:
        return self._public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:  # noqa: ARG002
        key = self._key
        if key is None:
            raise SignerClosedError("The signer in memory is closed.")
        return key.sign(digest, _ALGORITHM)

    def custody(self) -> Evidence:
        storage = Fact(name="storage", value="this process's memory", source="d1_signer.testing")
        return Evidence(
            location="memory",
            exportable=True,
            generated_in_place=True,
            hardware=False,
            facts=(storage,),
        )

    def close(self) -> None:
        self._key = None


def make_in_memory_signer(kid: str | None = None, *, observers: Sequence[Observer] = ()) -> Signer:
    """Make a signer with a new key in memory: a real one, for tests that need no HSM.

    Args:
        kid: Key identifier; None: the RFC 7638 thumbprint.
        observers: Told of each signature.
    """
    return Signer(_InMemoryBackend(), kid=kid, observers=observers)


@pytest.fixture
def in_memory_signer() -> Iterator[Signer]:
    """A signer with a new key in memory, under the kid ``test-key``."""
    with make_in_memory_signer("test-key") as signer:
        yield signer


@pytest.fixture
def d1_sandbox(in_memory_signer: Signer) -> Iterator[Sandbox]:
    """A D1 on loopback with mutual TLS, which knows the key of `in_memory_signer`.

    The issuer is ``test-issuer``.
    """
    from d1_signer.sandbox import Sandbox  # late: a conformance suite needs no sandbox

    with Sandbox(_ISSUER) as sandbox:
        sandbox.register_key(in_memory_signer.kid, in_memory_signer.public_key.jwk())
        yield sandbox


@pytest.fixture
def d1_fetcher(d1_sandbox: Sandbox, in_memory_signer: Signer) -> Iterator[TokenFetcher]:
    """A token fetcher of the sandbox, signing with `in_memory_signer`."""
    with TokenFetcher(
        in_memory_signer,
        issuer_id=_ISSUER,
        environment=d1_sandbox.base_url,
        client_certificate=ClientCertificate(d1_sandbox.client_certificate, d1_sandbox.client_key),
        ca_file=d1_sandbox.ca_file,
    ) as fetcher:
        yield fetcher

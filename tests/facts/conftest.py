# SPDX-License-Identifier: Apache-2.0
"""What the unit tests share: repeatable examples, one key for a session, a search for secrets."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, settings

from d1_signer.es256 import PublicKey

# Repeatable on every machine: the same examples each time, no database, no clock.
settings.register_profile(
    "unit",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="session")
def public_key(private_key: ec.EllipticCurvePrivateKey) -> PublicKey:
    return PublicKey(private_key.public_key())

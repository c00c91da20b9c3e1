# SPDX-License-Identifier: Apache-2.0
"""A running sandbox and a client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from joserfc.jwk import ECKey

from d1_signer.sandbox import Sandbox
from tests.sandbox.client import ISSUER, KID, Client, Clock, public_jwk

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def key() -> ECKey:
    return ECKey.generate_key("P-256")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sandbox(key: ECKey, clock: Clock) -> Iterator[Sandbox]:
    with Sandbox(issuer_id=ISSUER, clock=clock) as running:
        running.register_key(KID, public_jwk(key))
        yield running


@pytest.fixture
def client(sandbox: Sandbox, key: ECKey) -> Iterator[Client]:
    client = Client(sandbox, key)
    yield client
    client.session.close()

# SPDX-License-Identifier: Apache-2.0
"""How many cases: the same ones each time in `make test`, others each time in `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.leaks import hooks

CASES = int(os.environ.get("D1_SIGNER_FUZZ_CASES", "0"))

settings.register_profile(
    "fuzz",
    derandomize=CASES == 0,
    deadline=None,
    database=None,
    max_examples=CASES or 400,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def leak_watch() -> Iterator[None]:
    """Not the suite's: a mutation moves a PIN to where nobody can know that it is one."""
    hooks.ignore()
    yield
    hooks.end()

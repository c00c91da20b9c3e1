# SPDX-License-Identifier: Apache-2.0
"""Statements are public, and a million bytes of them in frames take seconds to search."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leaks import hooks


@pytest.fixture(autouse=True)
def leak_watch() -> Iterator[None]:
    """Not the suite's: there is no secret here."""
    hooks.ignore()
    yield
    hooks.end()

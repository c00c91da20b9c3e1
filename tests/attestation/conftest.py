# SPDX-License-Identifier: Apache-2.0
"""Statements are public, and a million bytes of them in frames take seconds to search."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def leak_watch() -> None:
    """Not the suite's: there is no secret here."""

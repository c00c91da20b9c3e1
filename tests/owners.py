# SPDX-License-Identifier: Apache-2.0
"""Files of another user, whoever runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def give_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have a file belong to another user; returns whose it is then."""
    if os.geteuid() == 0:
        os.chown(file, 100, 1000)
        return 100
    # Only root can give a file away: instead this process takes itself for somebody else's.
    mine = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    return mine

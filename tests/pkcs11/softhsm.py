# SPDX-License-Identifier: Apache-2.0
"""Tokens for these tests: one is made, the others are copies of it (2 ms instead of 9)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from d1_signer.testing import SoftHsmToken


def copy_token(prepared: SoftHsmToken, directory: Path) -> SoftHsmToken:
    """Copy a token with its keys to an empty directory; the caller sets ``SOFTHSM2_CONF``."""
    source = prepared.configuration.parent
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "tokens", directory / "tokens")
    shutil.copy2(prepared.pin_file, directory / "pin")
    configuration = directory / "softhsm2.conf"
    configuration.write_text(
        prepared.configuration.read_text().replace(str(source), str(directory))
    )
    return dataclasses.replace(prepared, configuration=configuration, pin_file=directory / "pin")

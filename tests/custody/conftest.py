# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from d1_signer import generate_key


@pytest.fixture(scope="session")
def key_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("keys") / "key.pem"
    return generate_key(path.as_uri()).uri + "#bank-2026"

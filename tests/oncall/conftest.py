# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.oncall.site import Prepared


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared.make(tmp_path_factory.mktemp("prepared"))

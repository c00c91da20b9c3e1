# SPDX-License-Identifier: Apache-2.0
"""Made before uWSGI forks, with a renewal under way that its workers do not have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fleet_fetcher import new_fetcher

fetcher = new_fetcher()
session = fetcher.session()
if "D1_TEST_GO" in os.environ:
    fetcher.prefetch()
    while not Path(os.environ["D1_TEST_GO"]).exists():
        time.sleep(0.01)


def application(_: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    started = time.monotonic()
    answer = session.get(f"{fetcher.environment.banking_url}/ping", timeout=20)
    start_response(f"{answer.status_code} from D1", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {time.monotonic() - started:.3f}".encode()]

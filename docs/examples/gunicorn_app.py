# SPDX-License-Identifier: Apache-2.0
"""A WSGI application with one fetcher for each worker:

gunicorn --preload --workers 4 --threads 8 gunicorn_app:application

With ``--preload`` the fetcher is made once, before the workers are forked, and works in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fleet_fetcher import new_fetcher

fetcher = new_fetcher()
session = fetcher.session()


def application(_: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    answer = session.get(f"{fetcher.environment.banking_url}/ping", timeout=10)
    start_response(f"{answer.status_code} from D1", [("Content-Type", "application/json")])
    return [answer.content]

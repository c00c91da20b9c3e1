# SPDX-License-Identifier: Apache-2.0
"""A health check of the token fetcher, for WSGI and for ASGI; nothing is asked of D1 for it:

gunicorn healthz:wsgi_application
uvicorn healthz:asgi_application
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from fleet_fetcher import new_fetcher

fetcher = new_fetcher()


def health() -> tuple[int, bytes]:
    status = fetcher.status()
    return 200 if status.healthy else 503, json.dumps(status.to_dict()).encode()


def wsgi_application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    if environ["PATH_INFO"] != "/healthz":
        start_response("404 Not Found", [])
        return []
    code, body = health()
    line = {200: "200 OK", 503: "503 Service Unavailable"}[code]
    start_response(line, [("Content-Type", "application/json")])
    return [body]


async def asgi_application(
    scope: MutableMapping[str, Any],
    _receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        return
    code, body = health() if scope["path"] == "/healthz" else (404, b"")
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})

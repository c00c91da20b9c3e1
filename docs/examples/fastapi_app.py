# SPDX-License-Identifier: Apache-2.0
"""A FastAPI service: signing and fetching never happen on the event loop:

uvicorn --workers 2 fastapi_app:app
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request, Response
from fleet_fetcher import new_fetcher

from d1_signer import HttpxD1Auth


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # In each worker process, and closed with it.
    with new_fetcher() as fetcher:
        fetcher.prefetch()  # the first request will find a token, or a renewal under way
        async with httpx.AsyncClient(
            base_url=fetcher.environment.banking_url,
            auth=HttpxD1Auth(fetcher),
            verify=fetcher.ssl_context,
            trust_env=False,
        ) as app.state.d1:
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/ping")
async def ping(request: Request) -> Response:
    d1: httpx.AsyncClient = request.app.state.d1
    answer = await d1.get("/ping")
    return Response(answer.content, answer.status_code, media_type="application/json")

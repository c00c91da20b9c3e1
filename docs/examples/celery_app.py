# SPDX-License-Identifier: Apache-2.0
"""A Celery worker that calls D1, and a beat that keeps the fleet's token warm:

celery --app celery_app worker
celery --app celery_app beat

The beat's task is for deployments where minutes pass without a call: the first one after the pause
finds a token and does not wait for the HSM.
"""

from __future__ import annotations

import os
from functools import cache

from celery import Celery
from celery.signals import worker_process_shutdown, worker_shutdown
from fleet_fetcher import new_fetcher

from d1_signer import TokenFetcher

app = Celery("d1", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BACKEND_URL"])
warm_every = float(os.environ.get("D1_WARM_SECONDS", "60"))
app.conf.beat_schedule = {"keep the token warm": {"task": "d1.warm", "schedule": warm_every}}


@cache
def fetcher() -> TokenFetcher:
    # When it is first needed: in each worker process, and never in the beat.
    return new_fetcher()


@app.task(name="d1.warm", ignore_result=True)
def warm() -> None:
    fetcher().prefetch()


@app.task(name="d1.ping")
def ping() -> int:
    with fetcher().session() as session:
        answer = session.get(f"{fetcher().environment.banking_url}/ping", timeout=10)
    return answer.status_code


@worker_process_shutdown.connect
@worker_shutdown.connect
def close(**_: object) -> None:
    if fetcher.cache_info().currsize:
        fetcher().close()

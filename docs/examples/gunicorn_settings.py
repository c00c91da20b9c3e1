# SPDX-License-Identifier: Apache-2.0
"""Workers that take new keys, certificates and limits without a restart:

gunicorn --workers 20 --threads 8 gunicorn_settings:application

With ``--preload``, ``fetcher.reload_on`` belongs into ``post_worker_init`` of gunicorn's own
configuration: gunicorn sets its signals after the fork.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

from d1_signer import TokenFetcher

fetcher = TokenFetcher.from_settings(os.environ["D1_CONFIG"])
fetcher.reload_on(signal.SIGHUP)
session = fetcher.session()


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/healthz":
        status = fetcher.status()
        start_response("200 OK" if status.healthy else "503 Service Unavailable", [])
        return [json.dumps({"pid": os.getpid(), **status.to_dict()}).encode()]
    answer = session.get(f"{fetcher.environment.banking_url}/ping", timeout=10)
    start_response(f"{answer.status_code} from D1", [])
    return [answer.content]

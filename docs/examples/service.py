# SPDX-License-Identifier: Apache-2.0
"""What systemd and Kubernetes run: one fetcher, calls of D1, and its health under ``/healthz``.

gunicorn --preload --workers 2 --threads 8 service:application
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

from d1_signer import LoginError

try:
    import healthz
except LoginError as error:
    # Final for who started it: each further start would cost one more try of the PIN.
    print(error, file=sys.stderr)
    raise SystemExit(78) from error  # EX_CONFIG

session = healthz.fetcher.session()


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/healthz":
        return healthz.wsgi_application(environ, start_response)
    answer = session.get(f"{healthz.fetcher.environment.banking_url}/ping", timeout=10)
    start_response(f"{answer.status_code} from D1", [("Content-Type", "application/json")])
    return [answer.content]

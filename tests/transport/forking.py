# SPDX-License-Identifier: Apache-2.0
"""Forks while threads are in handshakes: ``python -m tests.transport.forking COUNT KEY ...``.

A program of its own, so that a hang or a crash is a failed test and not a dead runner.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable

import httpx

from d1_signer import ClientCertificate, TokenFetcher, open_signer

_PATIENCE = 20


def main(count: int, key: str, assertions: str, certificate: str, url: str, ca_file: str) -> int:
    stop, failures = threading.Event(), list[str]()
    with (
        open_signer(key) as client,
        open_signer(assertions) as signer,
        TokenFetcher(
            signer,
            issuer_id="issuer",
            environment=f"{url}/authz/v1",
            client_certificate=ClientCertificate(certificate, client),
            ca_file=ca_file,
        ) as fetcher,
    ):
        kept = fetcher.ssl_context

        def by_requests() -> int:
            with fetcher.session() as session:
                session.auth = None
                return session.get(url).status_code

        def by_httpx(context: ssl.SSLContext) -> int:
            with httpx.Client(verify=context, trust_env=False, timeout=_PATIENCE) as http:
                return http.get(url).status_code

        calls: list[Callable[[], int]] = [
            by_requests,
            lambda: by_httpx(kept),
            lambda: by_httpx(fetcher.ssl_context),
        ]

        def work(call: Callable[[], int]) -> None:
            while not stop.is_set():
                try:
                    failures.extend(str(code) for code in [call()] if code != 200)
                except BaseException as error:  # noqa: BLE001 (counted)
                    failures.append(repr(error))

        # All is imported now: an import that a fork meets stays locked in the child for ever.
        for call in calls:
            call()
        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        good = sum(_child_calls(calls) for _ in range(count))
        stop.set()
        for thread in threads:
            thread.join()
    print(f"{good} of {count} children, failures: {failures}")
    return 0 if good == count and not failures else 1


def _child_calls(calls: list[Callable[[], int]]) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(_PATIENCE)
            status = int([call() for call in calls] != [200] * len(calls))
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))

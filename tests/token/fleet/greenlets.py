# SPDX-License-Identifier: Apache-2.0
"""A program on gevent that patches first: many greenlets, one fetcher, how long all stood still.

``python -m tests.token.fleet.greenlets`` answers one JSON object.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402
from fleet_fetcher import new_fetcher  # noqa: E402

from d1_signer import TokenFetcher  # noqa: E402


def main() -> None:
    stalls = [0.0]

    def tick() -> None:
        while True:
            before = time.monotonic()
            gevent.sleep(0.001)
            stalls.append(time.monotonic() - before)

    gevent.spawn(tick)
    with new_fetcher() as fetcher:
        cold = [gevent.spawn(fetcher.token) for _ in range(50)]
        gevent.joinall(cold, timeout=30)
        calls = [gevent.spawn(ping, fetcher) for _ in range(20)]
        gevent.joinall(calls, timeout=30)
        # Until the renewal in the background has brought another.
        values = {job.value.value for job in cold}
        until = time.monotonic() + 30
        while len(values) == 1 and time.monotonic() < until:
            values.add(fetcher.token().value)
            gevent.sleep(0.01)
        answer = {
            "cold": len({job.value.value for job in cold}),
            "statuses": [job.value for job in calls],
            "tokens": len(values),
            "stall": max(stalls),
        }
    print(json.dumps(answer))


def ping(fetcher: TokenFetcher) -> int:
    with fetcher.session() as session:
        return session.get(f"{fetcher.environment.banking_url}/ping", timeout=20).status_code


if __name__ == "__main__":
    main()

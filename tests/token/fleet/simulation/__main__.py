# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.token.fleet.simulation FIRST [NUMBER]``: run schedules, tell what broke."""

from __future__ import annotations

import json
import logging
import sys
import time

from tests.token.fleet.simulation.schedule import run


def main() -> int:
    first, number = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    logging.disable()
    started = time.monotonic()
    totals = {"schedules": 0, "calls": 0, "errors": 0, "requests": 0}
    broken = 0
    for seed in range(first, first + number):
        outcome = run(seed)
        totals["schedules"] += 1
        for name in ("calls", "errors", "requests"):
            totals[name] += getattr(outcome, name)
        if outcome.problems:
            broken += 1
            print(seed, sorted(set(outcome.problems)), outcome.troubles, file=sys.stderr)
    print(json.dumps({**totals, "broken": broken, "seconds": round(time.monotonic() - started, 1)}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The exercise for readers: a transcript of each fault, in a random order.

python -m tests.oncall FOLDER KEY

FOLDER gets a numbered folder for each fault, with what is shown to whoever is called, under the
names that production has; KEY says afterwards which number is which fault.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d1_signer import Limits
from tests.oncall.faults import FAULTS, Fault
from tests.oncall.seen import Seen
from tests.oncall.site import Pace, Prepared, Site

_AT_ONCE = 4
_PACE = Pace(
    life=24.0,
    calls=3.0,
    healthy=3,
    retry=1.0,
    limits=Limits(total=10.0, sign=4.0, connect=3.0, read=4.0),
)
_MORE_LINES = 2  # that tell of the fault, behind the first
_FAILED_CALLS = 6


def main(folder: Path, key: Path) -> None:
    """Write all of them."""
    order = random.SystemRandom().sample(list(FAULTS), len(FAULTS))
    numbers = {f"{number:02}": name for number, name in enumerate(order, 1)}
    with tempfile.TemporaryDirectory(prefix="d1-") as place:
        made = Path(place)
        (made / "prepared").mkdir()
        prepared = Prepared.make(made / "prepared")

        def write(number: str) -> None:
            (made / number).mkdir()
            fault = FAULTS[numbers[number]]
            with Site(made / number, prepared, fault.needs, _PACE) as site:
                seen = _carried_out(site, fault)
                _write(folder / number, seen, site)

        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(write, numbers))
    key.write_text("".join(f"{number} {name}\n" for number, name in numbers.items()))


def _carried_out(site: Site, fault: Fault) -> Seen:
    site.healthy()
    fault.plant(site)
    seen = site.until(fault.missing)
    told = len(seen.lines(fault.event)) + _MORE_LINES
    renewed = seen.count("", "token.renewed")

    def missing(seen: Seen) -> list[str]:
        lines = len(seen.lines(fault.event)) < told
        calls = seen.log.count(" 503 ") < _FAILED_CALLS
        tokens = seen.count("", "token.renewed") < renewed + _MORE_LINES * len(site.hosts)
        return [fault.event] * lines + ["calls"] * (calls and tokens)

    return site.until(missing)


def _write(folder: Path, seen: Seen, site: Site) -> None:
    folder.mkdir(parents=True)
    shown = {
        "log.txt": seen.log,
        "metrics.txt": seen.metrics,
        "status.json": json.dumps(seen.status, indent=2) + "\n",
    }
    if site.needs.store:
        shown["fleet-status.txt"] = "\n".join(site.fleet_status(host) for host in site.hosts)
    for name, text in shown.items():
        assert not [secret for secret in site.secrets() if secret in text]
        (folder / name).write_text(site.as_in_production(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

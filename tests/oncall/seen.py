# SPDX-License-Identifier: Apache-2.0
"""What is shown to whoever is called: the log, the metrics and the status of all hosts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All of it, at one moment.

    Attributes:
        log: All hosts' lines.
        metrics: In Prometheus' form.
        status: Of each host.
    """

    log: str
    metrics: str
    status: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        status = [json.loads(file.read_text()) for file in sorted(folder.glob("status.*[0-9]"))]
        return cls(
            log=(folder / "log.txt").read_text(),
            metrics="".join(file.read_text() for file in sorted(folder.glob("metrics.*[0-9]"))),
            status={host: each for one in status for host, each in one.items()},
        )

    def lines(self, event: str, host: str = "") -> list[str]:
        """The lines of an event."""
        return [
            line
            for line in self.log.splitlines()
            if f": {event} " in line.replace(f"{event}:", event) and f" {host}" in line
        ]

    def count(self, host: str, event: str) -> int:
        """How many lines of an event a host has written."""
        return len(self.lines(event, host))

    def __str__(self) -> str:
        """For whoever reads why a test has failed."""
        return f"{self.log}\n{self.metrics}\n{json.dumps(self.status, indent=2)}"

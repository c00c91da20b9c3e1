# SPDX-License-Identifier: Apache-2.0
"""What of a trail belongs to one process, and how that is: a forked child has another."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime

from d1_signer.audit.instance import Instance
from d1_signer.audit.sealing import Sealer
from d1_signer.errors import AuditError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrailStatus:
    """How this process's part of a trail is, at one moment.

    Attributes:
        records: How many this process has written.
        instance: Name of the instance that it writes; None before the first record, and once the
            trail is closed.
        sealed: Size of the newest checkpoint of that instance.
        unsealed: How many of its records are not sealed, and can be altered unseen.
        unsealed_for: Seconds since the oldest of them; 0 where there is none, None where it cannot
            be read.
    """

    records: int
    instance: str | None = None
    sealed: int = 0
    unsealed: int = 0
    unsealed_for: float | None = 0.0

    def to_dict(self) -> dict[str, object]:
        """The status as JSON-ready values."""
        return asdict(self)


class Here:
    """The instance of one process, and what goes on with it.

    Attributes:
        lock: Held while an instance is opened or given back.
        opening: Whether one is being opened.
        instance: The one that is written.
        sealer: Seals it.
        missed: Records that could not be written and are not told of yet.
    """

    def __init__(self) -> None:
        """Nothing is opened yet."""
        # Reentrant: a signal's handler that signs while this is opened finds no instance yet, and
        # must not wait for ever.
        self.lock = threading.RLock()
        self.opening = False
        self.instance: Instance | None = None
        self.sealer: Sealer | None = None
        self.missed = 0
        # The instance that was opened last, and the records in those before it: read as one.
        self._counted: tuple[int, Instance | None] = (0, None)

    def use(self, instance: Instance) -> None:
        """Write this one from now on."""
        self._counted = self._records(), instance
        self.instance = instance

    def _records(self) -> int:
        before, last = self._counted
        return before + (0 if last is None else last.written)

    def status(self) -> TrailStatus:
        """How it is now. No lock is taken: a disk that hangs must not hold up a health check."""
        records, instance = self._records(), self.instance
        if instance is None:
            return TrailStatus(records=records)
        sealed = instance.sealed  # first: the number of records only grows
        return TrailStatus(
            records=records,
            instance=instance.path.name,
            sealed=sealed,
            unsealed=max(0, instance.size - sealed),
            unsealed_for=_seconds_since(instance),
        )


def _seconds_since(instance: Instance) -> float | None:
    try:
        oldest = instance.oldest_unsealed()
        began = None if oldest is None else datetime.fromisoformat(oldest).timestamp()
    except (AuditError, OSError, ValueError):
        return None
    return 0.0 if began is None else max(0.0, time.time() - began)

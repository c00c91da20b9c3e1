# SPDX-License-Identifier: Apache-2.0
"""Signs until the disk is full, and again when it has room: run in a process of its own.

Prints as JSON how often the backend was asked in each part, and what the errors were.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path

from d1_signer import AuditTrail, AuditUnavailable
from tests.audit.trails import ORIGIN, findings, records, sealing_signer, watched_signer
from tests.signing.backends import KeyBackend

_LIMIT = 20_001


def main(kind: str, place: Path) -> None:
    filler = place / "filler"
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, resource.RLIM_INFINITY))
    else:
        filler.write_bytes(bytes(100_000))
    with AuditTrail(place / "trail", origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        signer = watched_signer(trail)
        backend = signer._backend
        assert isinstance(backend, KeyBackend)
        signed = 0
        refused: list[tuple[bool, str]] = []
        while len(refused) < 50:
            try:
                signer.sign(b"x")
                signed += 1
            except AuditUnavailable as error:
                refused.append((error.retryable, error.message.rpartition(": ")[2]))
        asked = len(backend.asked)
        with contextlib.suppress(AuditUnavailable):  # there is no room for a checkpoint either
            trail.seal()
        if kind == "limit":
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        else:
            filler.unlink()
        signer.sign(b"again")
        signer.close()
    told = records(place / "trail")
    begun = [record["number"] for record in told if record.get("action") == "sign"]
    print(
        json.dumps(
            {
                "signed": signed,
                "asked": asked,
                "refused": sorted(set(refused)),
                "begun": len(begun),
                "asked in all": len(backend.asked),
                "findings": findings(place / "trail"),
                "instances": sum(record["event"] == "opened" for record in told),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

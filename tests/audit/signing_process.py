# SPDX-License-Identifier: Apache-2.0
"""Eight threads that sign until they are killed: run in a process of its own."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from d1_signer import AuditTrail, Use, open_signer
from tests.audit.trails import ORIGIN, sealing_signer

THREADS = 8


def main(place: Path, uri: str, module: str) -> None:
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer(), seal_records=40)
    signer = open_signer(uri, module_path=module, max_sessions=4, trail=trail)
    use = Use(purpose="d1-assertion", references=(("jti", "j"),))

    def sign() -> None:
        while True:
            signer.sign(b"message", use=use)

    threads = [threading.Thread(target=sign) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    threads[0].join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

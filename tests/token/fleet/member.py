# SPDX-License-Identifier: Apache-2.0
"""One process of a fleet, told what to do line by line.

``tokens N`` asks for a token in N threads at once and answers one JSON object: digests of the
tokens, codes of the errors, and how many signatures this process made so far.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import d1_signer.signing.signer
from d1_signer import D1SignerError, SignEvent, TokenFetcher

ROOT = Path(__file__).parents[3]


class Member:
    """The test's end of such a process."""

    def __init__(self, settings: dict[str, str]) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "docs/examples")])
        self.process = Popen(
            [sys.executable, "-m", "tests.token.fleet.member"],
            env=os.environ | settings | {"PYTHONPATH": path},
            cwd=ROOT,
            stdin=PIPE,
            stdout=PIPE,
            text=True,
        )

    def ready(self) -> None:
        assert self._line() == "ready"

    def ask(self, threads: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"tokens {threads}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def _tokens(fetcher: TokenFetcher, threads: int) -> dict[str, list[str]]:
    barrier = threading.Barrier(threads)

    def one(_: int) -> tuple[str, str]:
        barrier.wait()
        try:
            return "tokens", hashlib.sha256(fetcher.token().value.encode()).hexdigest()
        except D1SignerError as error:
            return "errors", error.code

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(one, range(threads)))
    return {kind: [text for k, text in results if k == kind] for kind in ("tokens", "errors")}


def main() -> None:
    from fleet_fetcher import new_fetcher

    signed = 0
    make = d1_signer.signing.signer.Signer.__init__

    def observed(self: Any, *args: Any, **options: Any) -> None:
        def count(event: object) -> None:
            nonlocal signed
            signed += isinstance(event, SignEvent)

        make(self, *args, **(options | {"observers": [count]}))

    d1_signer.signing.signer.Signer.__init__ = observed  # type: ignore[method-assign]
    with new_fetcher() as fetcher:
        print("ready", flush=True)
        for line in sys.stdin:
            answer = _tokens(fetcher, int(line.split()[1]))
            print(json.dumps({**answer, "signed": signed}), flush=True)


if __name__ == "__main__":
    main()

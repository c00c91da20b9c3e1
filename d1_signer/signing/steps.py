# SPDX-License-Identifier: Apache-2.0
"""What is being waited for: told in detail when it has ended, and before to whoever waits."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from d1_signer.errors import D1SignerError
from d1_signer.logfmt import told
from d1_signer.signing import forks

_log = logging.getLogger("d1_signer.steps")

_under_way: dict[int, Step] = {}


class Step:
    """Something that may take long, with ``with``: told at its end, and for whom waits meanwhile.

    Attributes:
        what: What is waited for, such as ``a connection to host:443``. Never secret.
        began: On ``time.monotonic()``.
        facts: What was found, for the line of the log.
    """

    __slots__ = ("began", "facts", "what")

    def __init__(self, what: str) -> None:
        """Nothing has begun yet."""
        self.what, self.began = what, 0.0
        self.facts: dict[str, object] = {}

    @staticmethod
    def innermost() -> Step | None:
        """What began last, of what has not ended in any thread."""
        return next(reversed(list(_under_way.values())), None)

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        _under_way[id(self)] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _under_way.pop(id(self), None)
        if _log.isEnabledFor(logging.DEBUG):
            outcome = "done"
            if kind is not None:
                outcome = error.code if isinstance(error, D1SignerError) else kind.__name__
            facts = {
                "what": self.what,
                "outcome": outcome,
                "seconds": f"{time.monotonic() - self.began:.3f}",
                **self.facts,
            }
            _log.debug("step.ended %s", told(facts))


# Nobody in the child waits for what threads of the parent began.
forks.in_child(_under_way.clear)

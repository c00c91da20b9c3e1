# SPDX-License-Identifier: Apache-2.0
"""The clock on which tokens age."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

Clock = Callable[[], float]
"""Seconds from some fixed moment."""

# CLOCK_BOOTTIME goes on while the machine is suspended, and a token dies then too. Elsewhere
# CLOCK_MONOTONIC does the same (macOS) or there is nothing better.
_ID: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
token_clock: Clock = time.monotonic if _ID is None else partial(time.clock_gettime, _ID)

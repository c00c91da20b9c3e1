# SPDX-License-Identifier: Apache-2.0
"""The sandbox's memory: counters, token requests and raw exchanges, all bounded."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from d1_signer.sandbox.records import Counters

if TYPE_CHECKING:
    from d1_signer.sandbox.records import Exchange, TokenRequest

MAX_REQUESTS = 10_000
MAX_EXCHANGES = 1_000


class Recorder:
    """Written by the server's thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Counters.__dataclass_fields__, 0)
        self._arrivals = 0
        self._requests: dict[int, TokenRequest] = {}
        self._exchanges: deque[Exchange] = deque(maxlen=MAX_EXCHANGES)

    def count(self, name: str) -> None:
        """Add one to the counter of that name."""
        with self._lock:
            self._counts[name] += 1

    def arrived(self, request: TokenRequest) -> int:
        """Keep a token request that has no answer yet.

        Returns:
            Its number, for `answered`.
        """
        with self._lock:
            self._arrivals += 1
            number = self._arrivals
            self._requests[number] = request
            self._requests.pop(number - MAX_REQUESTS, None)
            return number

    def answered(self, number: int, status: int) -> None:
        """Complete a token request by the status it was answered with."""
        with self._lock:
            request = self._requests.get(number)
            if request is not None:
                self._requests[number] = replace(request, status=status)

    def exchanged(self, exchange: Exchange) -> None:
        """Keep a raw exchange."""
        with self._lock:
            self._exchanges.append(exchange)

    @property
    def counters(self) -> Counters:
        """The counters at this moment."""
        with self._lock:
            return Counters(**self._counts)

    @property
    def requests(self) -> tuple[TokenRequest, ...]:
        """The last token requests in the order of arrival, at most `MAX_REQUESTS`."""
        with self._lock:
            return tuple(self._requests.values())

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The last exchanges in the order of their answers, at most `MAX_EXCHANGES`."""
        with self._lock:
            return tuple(self._exchanges)

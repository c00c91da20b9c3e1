# SPDX-License-Identifier: Apache-2.0
"""HTTP to the services that hold keys: each exchange ends by a moment and has a limit of size."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from urllib3 import HTTPConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection

from d1_signer.errors import IntegrityError
from d1_signer.transport.connections import Connections
from d1_signer.transport.deadlines import no_time_left

# More threads than connections would work too, but warn for each connection thrown away.
_CONNECTIONS = 128
_LARGEST_ANSWER = 1 << 20
_DIGITS = 20

# A firewall forgets idle connections without a word; each one that it forgot would cost a time-out.
_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # Linux: after a minute, and not after two hours
    _KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Http:
    """HTTP to a service: each exchange ends by a moment, and no answer has more than 1 MiB.

    urllib3's own limit is for each read, which a server that sends byte after byte never reaches.
    Nothing of the environment is used, and no redirect is followed. Thread-safe; one for each
    process.
    """

    def __init__(
        self,
        what: str,
        context: ssl.SSLContext,
        *,
        connect_timeout: float,
        read_timeout: float,
        proxy: str | None = None,
    ) -> None:
        """Prepare connections; none is opened yet.

        Args:
            what: The service, for error texts.
            context: For every https connection.
            connect_timeout: Seconds for each attempt to connect.
            read_timeout: Seconds for each wait for bytes.
            proxy: URL of the proxy for https, or None.
        """
        self._what = what
        self._limits = (connect_timeout, read_timeout)
        options: dict[str, Any] = {
            "maxsize": _CONNECTIONS,
            "ssl_context": context,
            "socket_options": [*HTTPConnection.default_socket_options, *_KEEP_ALIVE],
        }
        direct = PoolManager(**options)
        self._managers = {
            "http": direct,
            "https": direct if proxy is None else ProxyManager(proxy, **options),
        }
        self._pools: dict[tuple[str, ...], HTTPConnectionPool] = {}
        self._connections = Connections()
        for manager in self._managers.values():
            manager.pool_classes_by_scheme = self._connections.pools()

    def exchange(
        self, method: str, url: str, *, headers: Mapping[str, Any], body: bytes | None, until: float
    ) -> Answer:
        """Send one request and read the whole answer.

        Args:
            method: HTTP method.
            url: Where to.
            headers: The request's headers.
            body: Its body, or None.
            until: Moment on ``time.monotonic()``.

        Raises:
            SignerTimeout: The moment has passed, and nothing was sent.
            IntegrityError: The answer is too large.
            urllib3.exceptions.HTTPError: Any other failure.
        """
        left = until - time.monotonic()
        if left <= 0:
            raise no_time_left()
        connect, read = (min(limit, left) for limit in self._limits)
        parts = urlsplit(url)
        with self._connections.bounded(until):
            response = self._pool(parts).urlopen(
                method,
                f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}",
                body=body,
                headers=headers,
                redirect=False,
                retries=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=connect, read=read),
            )
            length = response.headers.get("Content-Length", "")
            # What is told counts for nothing where the body comes in chunks.
            told_length = length.isdecimal() and "Transfer-Encoding" not in response.headers
            # Python itself refuses to read a number of thousands of digits.
            bounded = told_length and len(length) < _DIGITS and int(length) <= _LARGEST_ANSWER
            # A read with a limit of its own takes much longer: for answers of no known length.
            told = response.read() if bounded else response.read(_LARGEST_ANSWER + 1)
            if len(told) > _LARGEST_ANSWER:
                response.close()
                raise IntegrityError(
                    f"{self._what} gave an answer of more than 1 MiB.",
                    hint=f"Something between this process and {self._what} alters answers.",
                )
            response.release_conn()
            return Answer(response.status, response.headers, told)

    def _pool(self, parts: SplitResult) -> HTTPConnectionPool:
        # Looking for it in the manager would take a twentieth of a call.
        pool = self._pools.get(parts[:2])
        if pool is None:
            url = f"{parts.scheme}://{parts.netloc}"
            pool = self._pools[parts[:2]] = self._managers[parts.scheme].connection_from_url(url)
        return pool

    def close(self) -> None:
        """Close the connections that are kept."""
        for manager in self._managers.values():
            manager.clear()

# SPDX-License-Identifier: Apache-2.0
"""HTTP to the services that hold keys: each exchange ends by a moment and has a limit of size."""

from __future__ import annotations

import contextlib
import queue
import ssl
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from urllib3 import HTTPConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.exceptions import HTTPError

from d1_signer import frames
from d1_signer.errors import IntegrityError
from d1_signer.transport.connections import SOCKET_OPTIONS, Connections
from d1_signer.transport.deadlines import no_time_left
from d1_signer.transport.proxies import Proxy

# More threads than connections would work too, but warn for each connection thrown away.
_CONNECTIONS = 128
_LARGEST_ANSWER = 1 << 20


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
        proxy: Proxy | None = None,
        socket_path: str | None = None,
    ) -> None:
        """Prepare connections; none is opened yet.

        Args:
            what: The service, for error texts.
            context: For every https connection.
            connect_timeout: Seconds for each attempt to connect.
            read_timeout: Seconds for each wait for bytes.
            proxy: For https, or None.
            socket_path: The Unix socket that http goes to, or None.
        """
        self._what = what
        self._limits = (connect_timeout, read_timeout)
        options: dict[str, Any] = {
            "maxsize": _CONNECTIONS,
            "ssl_context": context,
            "socket_options": SOCKET_OPTIONS,
        }
        direct = PoolManager(**options)
        self._managers = {
            "http": direct,
            "https": direct if proxy is None else ProxyManager(proxy.url, **options),
        }
        self._pools: dict[tuple[str, ...], HTTPConnectionPool] = {}
        self._connections = Connections(proxy=proxy)
        for manager in self._managers.values():
            manager.pool_classes_by_scheme = self._connections.pools(socket_path)

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
        outer = sys.exception()
        try:
            return self._exchange(method, url, headers, body, until)
        except BaseException as error:  # such as a signal's handler raises
            frames.clear(error, outer=outer)
            raise

    def _exchange(
        self, method: str, url: str, headers: Mapping[str, Any], body: bytes | None, until: float
    ) -> Answer:
        left = until - time.monotonic()
        if left <= 0:
            raise no_time_left(self._what)
        connect, read = (min(limit, left) for limit in self._limits)
        parts = urlsplit(url)
        with self._connections.bounded(until), self._forgetting():
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
            bounded = length.isdecimal() and int(length) <= _LARGEST_ANSWER
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

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        # Where one connection is dead, those that were kept beside it are: the next attempt, and
        # those of other threads, shall not have to find that out one after the other.
        try:
            yield
        except HTTPError:
            self.forget()
            raise

    def forget(self) -> None:
        """Close the connections that are kept and not in use: what comes next opens new ones."""
        for pool in list(self._pools.values()):
            with contextlib.suppress(queue.Empty, AttributeError):  # None: the pool is closed
                while True:
                    connection = pool.pool.get(block=False)  # type: ignore[union-attr]
                    if connection is not None:
                        connection.close()

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

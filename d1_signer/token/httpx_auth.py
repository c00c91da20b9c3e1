# SPDX-License-Identifier: Apache-2.0
"""Bearer authentication of calls to D1's banking API, for httpx; needs ``d1-signer[httpx]``.

Use::

    with httpx.Client(
        auth=HttpxD1Auth(fetcher), verify=fetcher.ssl_context, trust_env=False
    ) as client:
        client.get(fetcher.environment.banking_url + "/ping")

``httpx.AsyncClient`` takes the same arguments. ``verify`` brings the mutual TLS that D1 asks for on
every call; ``trust_env=False`` keeps proxies, netrc and CA files of the process environment out.

The connections are those of httpx, and so is what they take for an answer: see docs/tls.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Protocol, final

from d1_signer.errors import D1SignerError, MissingExtraError
from d1_signer.token.access_token import AccessToken
from d1_signer.token.auth import TokenSource

try:
    import httpx

    # What httpx itself rests on, whichever event loop runs.
    from anyio import CapacityLimiter, Event, sleep, to_thread
    from anyio.lowlevel import current_token
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error.name or "httpx", "httpx") from None

_log = logging.getLogger("d1_signer.auth")
_UNAUTHORIZED = 401
# Threads that wait for a token: one for each event loop, and those that cancelled calls left. The
# event loop's shared threads, waiting for D1, would stop a whole web server.
_WAITING_THREADS = 4
_LOOK_AGAIN = 0.01


class _Wait:
    """One task of an event loop that waits for all of them, and the failure it met."""

    def __init__(self) -> None:
        self.ended = Event()
        self.error: D1SignerError | None = None


class WaitlessSource(TokenSource, Protocol):
    """What gives the tokens: a `TokenFetcher`, or a double of it."""

    def token_now(self) -> AccessToken | None:
        """A valid token without waiting, or None."""
        ...


@final
class HttpxD1Auth(httpx.Auth):
    """Adds ``Authorization: Bearer …`` to calls of D1's API host, and to no other host's.

    On a 401 the token is renewed once and the call is sent once more, where its body is in memory;
    streamed bodies, files and multipart forms among them, are not sent again. In an
    ``httpx.AsyncClient`` neither signing nor fetching happens on the event loop: a valid token is
    taken at once, and a thread waits where there is none: one for all tasks of an event loop, which
    share the patience of the one that came first.
    """

    def __init__(self, source: WaitlessSource) -> None:
        """Take tokens from ``source``; one object serves any number of threads and event loops."""
        self._source = source
        self._new_places()

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Authenticate one call; called by httpx.

        Raises:
            D1SignerError: No token can be had.
        """
        if not self._serves(request):
            yield request
            return
        token = self._source.token()
        response = yield _authorized(request, token)
        if self._renews(response, token) and _can_be_sent_again(request):
            yield _authorized(request, self._source.token())

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Authenticate one call without blocking the event loop; called by httpx.

        Raises:
            D1SignerError: No token can be had.
        """
        if not self._serves(request):
            yield request
            return
        token = await self._token()
        response = yield _authorized(request, token)
        if self._renews(response, token) and _can_be_sent_again(request):
            yield _authorized(request, await self._token())

    def _new_places(self) -> None:
        self._owner = os.getpid()
        self._places = threading.BoundedSemaphore(_WAITING_THREADS)
        self._waits: dict[object, _Wait] = {}

    async def _token(self) -> AccessToken:
        while (token := self._source.token_now()) is None:
            if self._owner != os.getpid():
                self._new_places()  # the threads that held them are the parent's
            loop = current_token()
            wait = self._waits.get(loop)
            if wait is None:
                return await self._token_for_all(loop)
            await wait.ended.wait()
            if wait.error is not None:
                raise wait.error.fresh()
        return token

    async def _token_for_all(self, loop: object) -> AccessToken:
        """Wait in a thread, on behalf of all tasks of this event loop."""
        wait = self._waits[loop] = _Wait()
        try:
            return await self._token_in_thread()
        except D1SignerError as error:
            wait.error = error
            raise
        finally:
            # Where this task was cancelled, one of the others takes its turn.
            self._waits.pop(loop, None)
            wait.ended.set()

    async def _token_in_thread(self) -> AccessToken:
        while not self._places.acquire(blocking=False):
            await sleep(_LOOK_AGAIN)
            token = self._source.token_now()
            if token is not None:
                return token
        # Whoever takes it out gives the place back: the thread when it has waited to its end, or
        # the caller that is cancelled before the thread began. Not anyio's limiter, which would
        # count a place as free while an abandoned thread still waits.
        ticket = [self._places]

        def wait() -> AccessToken:
            place = ticket.pop()
            try:
                return self._source.token()
            finally:
                place.release()

        try:
            return await to_thread.run_sync(
                wait, limiter=CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            with contextlib.suppress(IndexError):
                ticket.pop().release()

    def _serves(self, request: httpx.Request) -> bool:
        if self._source.environment.serves(str(request.url)):
            return True
        _log.warning("auth.foreign_host the call is not to D1's API host: no token was added")
        return False

    def _renews(self, response: httpx.Response, token: AccessToken) -> bool:
        # httpx follows redirects below this: the answer may be another host's, without our token.
        answered_by_d1 = self._source.environment.serves(str(response.request.url))
        if response.status_code != _UNAUTHORIZED or not answered_by_d1:
            return False
        self._source.invalidate(token)
        return True


def _authorized(request: httpx.Request, token: AccessToken) -> httpx.Request:
    request.headers["Authorization"] = f"Bearer {token.value}"
    return request


def _can_be_sent_again(request: httpx.Request) -> bool:
    return isinstance(request.stream, httpx.ByteStream)

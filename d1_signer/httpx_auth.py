# SPDX-License-Identifier: Apache-2.0
"""Bearer authentication of calls to D1's banking API, for httpx; needs ``d1-signer[httpx]``.

Use::

    with httpx.Client(
        auth=HttpxD1Auth(fetcher), verify=fetcher.ssl_context, trust_env=False
    ) as client:
        client.get(fetcher.environment.banking_url + "/…")

``httpx.AsyncClient`` takes the same arguments. ``verify`` brings the mutual TLS that D1 asks for on
every call; ``trust_env=False`` keeps proxies, netrc and CA files of the process environment out.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Generator
from typing import Protocol, final

from d1_signer.access_token import AccessToken
from d1_signer.auth import TokenSource
from d1_signer.errors import MissingExtraError

try:
    import httpx

    # What httpx itself rests on, whichever event loop runs.
    from anyio import CapacityLimiter, to_thread
    from anyio.lowlevel import RunVar
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error.name or "httpx", "httpx") from None

_log = logging.getLogger("d1_signer.auth")
_UNAUTHORIZED = 401
# Threads of one event loop that wait for a token. The event loop's own threads serve others too:
# all of them waiting for D1 would stop a whole web server.
_WAITING_THREADS = 4


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
    taken at once, and a thread waits where there is none.
    """

    def __init__(self, source: WaitlessSource) -> None:
        """Take tokens from ``source``; one object serves any number of threads and event loops."""
        self._source = source
        self._waiting: RunVar[CapacityLimiter] = RunVar("d1-signer-token-waiters")

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

    async def _token(self) -> AccessToken:
        token = self._source.token_now()
        if token is not None:
            return token
        waiting = self._waiting.get(None)
        if waiting is None:
            waiting = CapacityLimiter(_WAITING_THREADS)
            self._waiting.set(waiting)
        # A call that was cancelled leaves the renewal to those who still wait.
        return await to_thread.run_sync(self._source.token, limiter=waiting, abandon_on_cancel=True)

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

# SPDX-License-Identifier: Apache-2.0
"""One POST to the token endpoint: bounded in time and size, and nothing secret in its errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import requests
import urllib3

from d1_signer.errors import (
    D1SignerError,
    FetcherClosedError,
    TokenError,
    TokenResponseError,
    TokenTimeout,
)
from d1_signer.secret import Secret
from d1_signer.token.d1 import GRANT_TYPE, Environment
from d1_signer.token.peer import Peer
from d1_signer.token.response import MAX_BODY, Grant, error_from, read_grant, seconds_until
from d1_signer.transport.client import ClientTls
from d1_signer.transport.failures import failure_of
from d1_signer.transport.proxies import Proxy
from d1_signer.transport.session import TlsAdapter, new_session

_OK = 200
# Seconds. It serves the attempts of one renewal; the next comes minutes later, when a firewall may
# have forgotten the connection, which would cost a time-out.
_IDLE = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What became of one POST: a grant, or the error that it ended in.

    Attributes:
        outcome: The grant, or the error.
        status: HTTP status code; None where no usable answer came.
        clock_offset: Seconds by which the server's ``Date`` is ahead of this machine's clock; None
            where it sent none.
        retry_after: Seconds that the server asks to wait; None where it does not.
    """

    outcome: Grant | D1SignerError
    status: int | None = None
    clock_offset: float | None = None
    retry_after: float | None = None


class TokenEndpoint:
    """The token endpoint of one environment, over one pool of connections."""

    def __init__(
        self,
        environment: Environment,
        tls: ClientTls,
        *,
        proxy: Proxy | None,
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            environment: Which D1.
            tls: Gives the TLS contexts with the client certificate.
            proxy: On the way, or None.
            connect_timeout: Seconds to wait for a connection at most.
            read_timeout: Seconds to wait for the next bytes at most.
        """
        self._url = environment.token_endpoint
        self._timeouts = (connect_timeout, read_timeout)
        self._adapter = TlsAdapter(
            tls, timeouts=self._timeouts, pool_size=1, idle=_IDLE, proxy=proxy
        )
        self._closed = False
        self._session = new_session(self._adapter)
        self._peer = Peer(environment=environment, proxy=proxy, tls=tls)

    def post(self, assertion: Secret, *, correlation_id: str, deadline: float) -> Reply:
        """Send one assertion.

        Args:
            assertion: The JWT in compact form.
            correlation_id: For ``x-correlation-id``.
            deadline: Moment on ``time.monotonic()`` by which the answer must be complete.

        Returns:
            A grant, or an error: `TlsError` where either side's certificate is refused,
            `TokenUnavailable` where no whole answer came, `TokenRefusedError` or
            `TokenResponseError` for what the answer says. Its details have the correlation id.

        Raises:
            TokenTimeout: The deadline passed before anything was sent.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TokenTimeout(
                "No token within the deadline: it passed before the assertion was sent.",
                hint="Try again; look at what else is slow: the network, the signer, this machine.",
            )
        connect, read = (min(limit, remaining) for limit in self._timeouts)
        try:
            with self._adapter.bounded(deadline):
                reply = self._exchange(assertion, correlation_id, timeout=(connect, read))
        # The errors of requests hold the request, and with it the assertion, so they end here:
        # ours is made new, with no traceback and no context that leads to theirs.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            reply = Reply(outcome=self._translated(error, connect=connect, read=read))
        except D1SignerError as error:
            reply = Reply(outcome=error.fresh())
        except ValueError as error:
            reply = Reply(
                outcome=TokenResponseError(
                    f"D1's answer is not HTTP ({type(error).__name__}).",
                    hint="Check that the environment's URL is D1's token endpoint.",
                )
            )
        if isinstance(reply.outcome, D1SignerError):
            reply.outcome.details["correlation_id"] = correlation_id
        return reply

    def _exchange(
        self,
        assertion: Secret,
        correlation_id: str,
        *,
        timeout: tuple[float, float],
    ) -> Reply:
        if self._closed:
            raise FetcherClosedError("The token fetcher is closed.")
        sent_at = time.time()
        response = self._session.post(
            self._url,
            data={"grant_type": GRANT_TYPE, "assertion": assertion.reveal()},
            headers={
                "accept": "application/json",
                "accept-encoding": "identity",
                "x-correlation-id": correlation_id,
            },
            allow_redirects=False,
            stream=True,
            timeout=timeout,
        )
        with contextlib.closing(response):
            body = b"".join(_chunks(response))
        now = time.time()
        # The Date was written between sending and receiving; the middle is the best guess.
        clock_offset = seconds_until(response.headers.get("date"), now=(sent_at + now) / 2)
        # A moment that D1 names is one of its own clock.
        d1_now = now + (clock_offset or 0.0)
        retry_after = seconds_until(response.headers.get("retry-after"), now=d1_now)
        outcome: Grant | D1SignerError
        if response.status_code == _OK:
            outcome = read_grant(body)
        else:
            outcome = self._peer.answered_by_another(
                response.status_code,
                response.headers.get("content-type", ""),
                body,
                retry_after=retry_after,
            ) or error_from(
                response.status_code, body, assertion=assertion, retry_after=retry_after
            )
        return Reply(
            outcome=outcome,
            status=response.status_code,
            clock_offset=clock_offset,
            retry_after=retry_after,
        )

    def _translated(self, error: Exception, *, connect: float, read: float) -> D1SignerError:
        if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
            return TokenError(
                "The token endpoint's URL cannot be used.", hint="Check the environment."
            )
        return self._peer.unreached(failure_of(error, connect=connect, read=read))

    def abort(self) -> None:
        """End the calls under way, so that a thread inside `post` comes back with an error."""
        self._adapter.abort()

    def close(self) -> None:
        """Close the connections, those of calls under way too; nothing is sent any more."""
        self._closed = True
        self._adapter.abort()
        self._session.close()


def _chunks(response: requests.Response) -> Iterator[bytes]:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise TokenResponseError(
            "D1's answer is compressed, which was not asked for.",
            hint="Look for a proxy on the way that changes answers.",
        )
    total = 0
    # read1: a server that drips bytes is noticed at each of them, not at the end of a block.
    while chunk := response.raw.read1(8192, decode_content=False):
        total += len(chunk)
        if total > MAX_BODY:
            raise TokenResponseError(
                "D1's answer is larger than 64 KiB.",
                hint="Check that the environment's URL is D1's token endpoint.",
            )
        yield chunk

# SPDX-License-Identifier: Apache-2.0
"""One POST to the token endpoint: bounded in time and size, and nothing secret in its errors."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlencode

import requests
import urllib3

from d1_signer import frames, jose
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    FetcherClosedError,
    TokenError,
    TokenRefusedError,
    TokenResponseError,
    TokenTimeout,
)
from d1_signer.secret import Secret
from d1_signer.token.d1 import GRANT_TYPE, ISSUED_AT_MARGIN, Environment
from d1_signer.token.peer import Peer
from d1_signer.token.response import MAX_BODY, Grant, error_from, read_grant, seconds_until
from d1_signer.transport.chunks import FramingError
from d1_signer.transport.client import ClientTls
from d1_signer.transport.failures import Stage, failure_of
from d1_signer.transport.proxies import Proxy
from d1_signer.transport.response import BoundedResponse
from d1_signer.transport.session import TlsAdapter, new_session

_OK = 200
# Seconds. It serves the attempts of one renewal; the next comes minutes later, when a firewall may
# have forgotten the connection, which would cost a time-out.
_IDLE = 1.0
# RFC 9110 sections 15.5.9 and 15.5.20: another connection may serve.
_ABOUT_THE_CONNECTION = frozenset({408, 421})
_LONGEST_REASON = 2.0  # seconds
_LATE = (TimeoutError, urllib3.exceptions.TimeoutError)
_OTHER_SERVER = "Check that the environment's URL is D1's token endpoint."


class RequestFormat(Enum):
    """The content type of a token request; D1 documents both."""

    FORM = "form"
    JSON = "json"

    @classmethod
    def of(cls, value: object) -> RequestFormat:
        """Take ``"form"`` or ``"json"``.

        Raises:
            ConfigurationError: Anything else.
        """
        try:
            return cls(value)
        except ValueError:
            raise ConfigurationError(
                "The request format is unknown.", hint='Give "form", or "json".'
            ) from None

    @property
    def content_type(self) -> str:
        """The header's value."""
        form = self is RequestFormat.FORM
        return "application/x-www-form-urlencoded" if form else "application/json"

    def body(self, assertion: Secret) -> bytes:
        """The body of the request that presents an assertion (RFC 7523 section 2.1)."""
        members = {"grant_type": GRANT_TYPE, "assertion": assertion.reveal()}
        if self is RequestFormat.JSON:
            return jose.compact_json(members)
        return urlencode(members).encode("ascii")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What became of one POST: a grant, or the error that it ended in.

    Attributes:
        outcome: The grant, or the error.
        status: HTTP status code; None where none came.
        clock_offset: Seconds by which the server's ``Date`` is ahead of this machine's clock; None
            where it sent none.
    """

    outcome: Grant | D1SignerError
    status: int | None = None
    clock_offset: float | None = None


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
        request_format: RequestFormat = RequestFormat.FORM,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            environment: Which D1.
            tls: Gives the TLS contexts with the client certificate.
            proxy: On the way, or None.
            connect_timeout: Seconds to wait for a connection at most.
            read_timeout: Seconds to wait for the next bytes at most.
            request_format: How the assertion is sent.
        """
        self._format = request_format
        self._url = environment.token_endpoint
        self._timeouts = (connect_timeout, read_timeout)
        self._adapter = TlsAdapter(
            tls,
            timeouts=lambda: (connect_timeout, read_timeout),
            pool_size=1,
            idle=_IDLE,
            proxy=proxy,
        )
        self._closed = False
        self._session = new_session(self._adapter)
        self._peer = Peer(environment=environment, proxy=proxy, tls=tls)

    def change(self, *, timeouts: tuple[float, float], request_format: RequestFormat) -> None:
        """Have the next requests keep other time limits, and be of another format."""
        self._timeouts, self._format = timeouts, request_format

    @property
    def address(self) -> str:
        """Host and port."""
        return self._peer.address

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
        outer = sys.exception()
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
                    f"D1's answer is not HTTP ({type(error).__name__}).", hint=_OTHER_SERVER
                )
            )
        except BaseException as error:  # such as a signal's handler raises
            frames.clear(error, outer=outer)
            raise
        if isinstance(reply.outcome, D1SignerError):
            reply.outcome.details["correlation_id"] = correlation_id
            # Beside the advice to ask for it: the details may not stand where the hint is read.
            reply.outcome.hint = reply.outcome.hint.replace(
                "the correlation id", f"the correlation id {correlation_id}"
            )
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
            data=self._format.body(assertion),
            headers={
                "accept": "application/json",
                "accept-encoding": "identity",
                "content-type": self._format.content_type,
                "x-correlation-id": correlation_id,
            },
            allow_redirects=False,
            stream=True,
            timeout=timeout,
        )
        now = time.time()
        # The Date was written between sending and receiving; the middle is the best guess.
        clock_offset = seconds_until(response.headers.get("date"), now=(sent_at + now) / 2)
        # A moment that D1 names is one of its own clock.
        d1_now = now + (clock_offset or 0.0)
        retry_after = seconds_until(response.headers.get("retry-after"), now=d1_now)
        if retry_after is not None:
            retry_after = max(retry_after, 0.0)  # callers sleep for what the details say
        with contextlib.closing(response):
            outcome = self._outcome(response, assertion, retry_after)
        if isinstance(outcome, TokenRefusedError) and clock_offset is not None:
            _tell_clock(outcome, clock_offset)
        if response.status_code in _ABOUT_THE_CONNECTION:
            self._session.close()
        return Reply(
            outcome=outcome,
            status=response.status_code,
            clock_offset=clock_offset,
        )

    def _outcome(
        self, response: requests.Response, assertion: Secret, retry_after: float | None
    ) -> Grant | D1SignerError:
        status = response.status_code
        if status == _OK:
            try:
                return read_grant(_whole_body(response), assertion=assertion)
            except D1SignerError as error:
                return error.fresh()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                late = any(isinstance(link, _LATE) for link in frames.causes(error))
                return _unframed(error) or self._peer.broken_off(status, late=late)
        body = _what_is_told(response)
        kind = response.headers.get("content-type", "")
        return self._peer.answered_by_another(
            status, kind, body, retry_after=retry_after
        ) or error_from(status, body, assertion=assertion, retry_after=retry_after)

    def _translated(self, error: Exception, *, connect: float, read: float) -> D1SignerError:
        if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
            return TokenError(
                "The token endpoint's URL cannot be used.", hint="Check the environment."
            )
        failure = failure_of(error, connect=connect, read=read)
        # A proxy's answer to CONNECT is none of D1's.
        unframed = _unframed(error) if failure.stage is Stage.ANSWER else None
        return unframed or self._peer.unreached(failure)

    def abort(self) -> None:
        """End the calls under way, so that a thread inside `post` comes back with an error."""
        self._adapter.abort()

    def close(self) -> None:
        """Close the connections, those of calls under way too; nothing is sent any more."""
        self._closed = True
        self._adapter.abort()
        self._session.close()


def _unframed(error: Exception) -> TokenResponseError | None:
    """The error for an answer whose end cannot be told; None where it failed for another reason."""
    links = frames.causes(error)
    unframed = next((link for link in links if isinstance(link, FramingError)), None)
    if unframed is None:
        return None
    return TokenResponseError(
        f"D1's answer cannot be read: {unframed}.",
        hint="Look at what stands before D1: a proxy or gateway that alters answers.",
    )


def _whole_body(response: requests.Response) -> bytes:
    if _is_encoded(response):
        raise TokenResponseError(
            "D1's answer is compressed, which was not asked for.",
            hint="Look for a proxy on the way that changes answers.",
        )
    body = b"".join(_chunks(response))
    if len(body) > MAX_BODY:
        raise TokenResponseError("D1's answer is larger than 64 KiB.", hint=_OTHER_SERVER)
    return body


def _what_is_told(response: requests.Response) -> bytes:
    """As much of a body as can be had soon: the status decides, and this gives a reason at most."""
    if _is_encoded(response):
        return b""
    answer = response.raw._original_response  # noqa: SLF001 (its class is ours)
    if isinstance(answer, BoundedResponse):
        answer.end_by(time.monotonic() + _LONGEST_REASON)
    body = bytearray()
    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError, ValueError):
        for chunk in _chunks(response):
            body += chunk
    return bytes(body)


def _is_encoded(response: requests.Response) -> bool:
    codings = response.headers.get("content-encoding", "").lower().split(",")
    return any(coding.strip() not in {"", "identity"} for coding in codings)


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body, until it is larger than it may be."""
    total = 0
    # read1: a server that drips bytes is noticed at each of them, not at the end of a block.
    while total <= MAX_BODY and (chunk := response.raw.read1(8192, decode_content=False)):
        total += len(chunk)
        yield chunk


def _tell_clock(refusal: TokenRefusedError, offset: float) -> None:
    """Say that the clocks differ, where they do by more than clocks usually do."""
    if abs(offset) < ISSUED_AT_MARGIN:
        return
    refusal.details["clock_offset"] = round(offset)
    side = "behind" if offset > 0 else "ahead of"
    refusal.hint = (
        f"This machine's clock is {abs(offset):.0f} seconds {side} D1's, as the Date of the answer "
        f"says: look at its time service; where that is right, tell Thales. {refusal.hint}"
    )

# SPDX-License-Identifier: Apache-2.0
"""What the sandbox can be told to do, and what it can tell afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fault(StrEnum):
    """A way to misbehave; the values are words for a command line.

    Parameters stand in brackets with their defaults and are given as keyword arguments to
    `Sandbox.misbehave`. Faults that alter a token answer leave a refusal of a bad assertion as it
    is; the others do not look at the assertion.
    """

    DELAY = "delay"
    """A correct answer, late (``seconds=1.0``)."""
    STATUS_401 = "status-401"
    STATUS_403 = "status-403"
    STATUS_4XX = "status-4xx"
    """A status that no document names (``status=418``)."""
    STATUS_429 = "status-429"
    """Too many requests (``retry_after=1``: seconds, verbatim text, or None for no header;
    ``as_date=False``: the seconds written as an HTTP date)."""
    STATUS_500 = "status-500"
    STATUS_503 = "status-503"
    """Unavailable (``retry_after=1``, ``as_date=False``: as for `STATUS_429`)."""
    INVALID_GRANT = "invalid-grant"
    """A refusal (``date_offset=0.0``: seconds that the Date header is ahead of the clock)."""
    HOSTILE_ECHO = "hostile-echo"
    """A refusal that repeats the assertion in its reason phrase, a header and its body."""
    HTML_400 = "html-400"
    EMPTY_400 = "empty-400"
    EMPTY_BODY = "empty-body"
    """200 with nothing in it."""
    HUGE_BODY = "huge-body"
    """A correct answer behind blanks (``size=67108864`` bytes), without a Content-Length."""
    SLOW_BODY = "slow-body"
    """A correct answer, byte by byte (``seconds=0.2`` between two)."""
    GZIP_BOMB = "gzip-bomb"
    """A correct answer behind ``size=67108864`` blanks, compressed to a thousandth."""
    BROKEN_JSON = "broken-json"
    JSON_ARRAY = "json-array"
    """JSON that is not an object."""
    WRONG_CONTENT_TYPE = "wrong-content-type"
    """A correct body that is called ``text/plain``."""
    WRONG_TOKEN_TYPE = "wrong-token-type"  # noqa: S105 (a name, no secret)
    """``token_type`` is ``value="mac"``."""
    EXPIRES_IN_MISSING = "expires-in-missing"
    EXPIRES_IN_ZERO = "expires-in-zero"
    EXPIRES_IN_SHORT = "expires-in-short"
    """``expires_in`` is ``seconds=1``."""
    EXPIRES_IN_STRING = "expires-in-string"
    EXPIRES_IN_NEGATIVE = "expires-in-negative"
    EXPIRES_IN_NAN = "expires-in-nan"
    """``NaN``, which is not JSON and which Python's reader takes."""
    EXPIRES_IN_HUGE = "expires-in-huge"
    """``value="1e999"``, verbatim: this one is JSON and reads as infinity."""
    ACCESS_TOKEN_MISSING = "access-token-missing"  # noqa: S105
    ACCESS_TOKEN_NOT_STRING = "access-token-not-string"  # noqa: S105
    ACCESS_TOKEN_ILLEGAL = "access-token-illegal"  # noqa: S105
    """The token ends in ``characters="\\r\\nX-Injected: 1"``, illegal in a header."""
    REDIRECT = "redirect"
    """To another host (``location="https://elsewhere.invalid/"``, ``status=307``)."""
    CLOSE_BEFORE_ANSWER = "close-before-answer"
    CLOSE_MID_BODY = "close-mid-body"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """What happened so far.

    Attributes:
        connections: TCP connections accepted, those whose TLS handshake failed included.
        token_requests: Requests at the token endpoint's path, of any method.
        tokens_issued: Access tokens that the banking resource knows, or knew, as good.
        tokens_refused: Token requests answered with a status of 400 or more, for any reason.
        banking_requests: Requests at the protected resource's path.
        banking_refused: Banking requests answered with a status of 400 or more.
    """

    connections: int = 0
    token_requests: int = 0
    tokens_issued: int = 0
    tokens_refused: int = 0
    banking_requests: int = 0
    banking_refused: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRequest:
    """One request at the token endpoint, without the assertion itself.

    Attributes:
        at: The sandbox's clock at its arrival, seconds since the epoch.
        content_type: Media type in lower case, without parameters.
        correlation_id: Value of ``x-correlation-id``, None where absent.
        headers: All headers by their names in lower case; of a repeated one the last value.
        grant_type: As sent, None where absent or unreadable.
        header: The assertion's decoded header, empty where unreadable.
        claims: The assertion's decoded claims, empty where unreadable.
        refusal: Why a well-behaved server refuses the request, ``""`` where it accepts it.
        fault: The fault that was applied to it.
        status: The status answered; None while there is no answer, or where the connection was
            closed before any.
    """

    at: float
    content_type: str
    correlation_id: str | None
    headers: Mapping[str, str] = field(repr=False)
    grant_type: str | None
    header: Mapping[str, object]
    claims: Mapping[str, object]
    refusal: str
    fault: Fault | None
    status: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A raw request and its answer, to be held against a document.

    They carry assertions and tokens: keep them out of logs, as ``repr`` does.

    Attributes:
        method: The request's method.
        path: The request's path with its query.
        request_headers: Pairs as received.
        request_body: At most the first 65,536 bytes.
        status: The answer's status.
        response_headers: Pairs as sent, without those of framing (Content-Length and the like).
        response_body: The body; empty where it was streamed (huge, slow and torn bodies).
    """

    method: str
    path: str
    request_headers: tuple[tuple[str, str], ...] = field(repr=False)
    request_body: bytes = field(repr=False)
    status: int
    response_headers: tuple[tuple[str, str], ...] = field(repr=False)
    response_body: bytes = field(repr=False)

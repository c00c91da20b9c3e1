# SPDX-License-Identifier: Apache-2.0
"""Strict reading of what the token endpoint answers. Pure.

D1 asks its clients to accept unknown members and status codes and not to parse error texts; what we
use must be there and be right.
"""

from __future__ import annotations

import json
import math
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NoReturn

from d1_signer.errors import TokenError, TokenRefusedError, TokenResponseError, TokenUnavailable
from d1_signer.secret import Secret

MAX_BODY = 64 * 1024
"""Bytes of an answer that are read at most."""

TRANSIENT = frozenset({408, 421, 425, 429, 500, 502, 503, 504})
"""Statuses of an answer that says nothing about the assertion, and that another attempt may not get
(RFC 9110 sections 15.5.9, 15.5.20 and 15.6, RFC 8470 section 5.2, RFC 6585 section 4)."""

_OK = 200
_NOT_AN_ENDPOINT = frozenset({404, 405})
# What is wrong with the request and not with the assertion in it (RFC 9110 section 15.5, RFC 6585).
_REQUEST_AT_FAULT = {
    406: "does not give the form of answer that is asked for",
    407: "wants credentials of a proxy",
    411: "wants a length",
    413: "finds the request too large",
    414: "finds the URL too long",
    415: "does not take the form of the request",
    417: "does not meet an expectation",
    426: "wants another protocol",
    428: "wants a condition",
    431: "finds the request's header lines too large",
}
_OF_THE_FORM = frozenset({406, 415})
_READ = frozenset({"access_token", "token_type", "expires_in", "scope", "error"})
# Where a reason stands: RFC 6749 section 5.2, RFC 9457 section 3.1, and what gateways say.
_REASONS = ("error_description", "detail", "message", "Message", "title")
_VISIBLE = re.compile(r"[\x21-\x7e]{1,16384}", re.ASCII)
_SCOPE = re.compile(r"[\x20-\x7e]{0,4096}", re.ASCII)
_ERROR_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_=+/.-]{8,}", re.ASCII)
_SEPARATORS = re.compile(r"[^A-Za-z0-9_-]", re.ASCII)
_LONG_WORD = 64
_SHORT_PIECE = 8
_LONG_PIECE = 16
_MAX_DESCRIPTION = 200
_HINTS = {
    "invalid_grant": "Check the issuer id, the kid, and that D1 knows this public key under it.",
    "invalid_client": "Check the issuer id and the client certificate.",
}
# The endpoint puts the id behind it.
_ASK = "ask Thales with the correlation id"
_ANY_CAUSE = "Check the issuer id, the kid, the key that D1 knows, and the client certificate."


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A token response that can be used (RFC 6749 section 5.1).

    Attributes:
        value: The access token. Secret.
        expires_in: Seconds that remain, more than 0.
        scope: Scopes with blanks between them; may be empty.
    """

    value: str = field(repr=False)
    expires_in: float
    scope: str


def read_grant(body: bytes, *, assertion: Secret) -> Grant:
    """Read the body of a 200 answer.

    Args:
        body: The body.
        assertion: What was sent; see `error_from`.

    Raises:
        TokenResponseError: Not a JSON object, or a member that we rely on is missing, wrong or
            there twice. Without ``expires_in`` nobody knows how long the token lives, so it is not
            used.
        TokenRefusedError: It has an ``error``.
    """
    answer = read_object(body)
    if answer is None:
        raise _unusable("it is not a JSON object")
    twice = sorted(answer.repeated & _READ)
    if twice:
        raise _unusable(f"{twice[0]} is there twice")
    if answer.get("error"):
        raise _refused(_OK, answer, assertion, {"status": _OK})
    value, kind = answer.get("access_token"), answer.get("token_type")
    expires_in, scope = answer.get("expires_in"), answer.get("scope")
    scope = "" if scope is None else scope
    if not isinstance(value, str) or not _VISIBLE.fullmatch(value):
        raise _unusable("access_token is missing or not printable text")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise _unusable("token_type is missing or not Bearer")
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float):
        raise _unusable("expires_in is missing or not a number")
    if not expires_in > 0:
        raise _unusable("expires_in is not more than 0")
    if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
        raise _unusable("scope is not printable text")
    try:
        seconds = float(expires_in)
    except OverflowError:
        seconds = math.inf
    return Grant(value=value, expires_in=seconds, scope=scope)


def error_from(
    status: int, body: bytes, *, assertion: Secret, retry_after: float | None
) -> TokenError:
    """Turn an answer other than 200 into our error.

    Args:
        status: HTTP status code.
        body: The body, of any kind.
        assertion: What was sent; a server that repeats it must not get it into a log.
        retry_after: Seconds that the server asks to wait, where it does.
    """
    answer = read_object(body) or Members()
    details: dict[str, str | int | float] = {"status": status}
    if retry_after is not None:
        details["retry_after"] = retry_after
    error, said = _told(answer, assertion)
    if error:
        details["error"] = error
    if status in TRANSIENT or status >= 500:  # noqa: PLR2004 (RFC 9110 section 15.6)
        return TokenUnavailable(
            f"D1 cannot give a token now (HTTP {status}): {said}.",
            hint=f"It is tried again by itself; if it stays, {_ASK}.",
            details=details,
        )
    if status in _NOT_AN_ENDPOINT:
        return TokenResponseError(
            f"There is no token endpoint at this URL (HTTP {status}).",
            hint="Check the environment's URL: it ends before /oauth2/token.",
            details=details,
        )
    if status in _REQUEST_AT_FAULT and not error:
        return TokenResponseError(
            f"What answers {_REQUEST_AT_FAULT[status]} (HTTP {status}): {said}.",
            hint='Try request_format="json": it may take that form only.'
            if status in _OF_THE_FORM
            else "Ask who runs the gateway before D1; the assertion was not judged.",
            details=details,
        )
    if 400 <= status < 500:  # noqa: PLR2004 (RFC 9110 section 15.5)
        return _refused(status, answer, assertion, details)
    return TokenResponseError(
        f"D1 answered HTTP {status}, which is neither a token nor a refusal.",
        hint="Check the environment's URL.",
        details=details,
    )


def _refused(
    status: int, answer: Members, assertion: Secret, details: dict[str, str | int | float]
) -> TokenRefusedError:
    error, said = _told(answer, assertion)
    if error:
        details = {**details, "error": error}
    return TokenRefusedError(
        f"D1 refused the assertion (HTTP {status}): {said}.",
        status=status,
        error=error,
        hint=f"{_HINTS.get(error, _ANY_CAUSE)} If all of that is right, {_ASK}.",
        details=details,
    )


def _told(answer: Members, assertion: Secret) -> tuple[str, str]:
    """The OAuth error code, which may be empty, and all of the reason that is told."""
    error = _shown(answer.once("error"), assertion)
    error = error if _ERROR_CODE.fullmatch(error) else ""
    # Some nest it: {"error": {"message": …}}.
    inner = answer.once("error")
    nested = inner if isinstance(inner, Members) else Members()
    texts = (_shown(each.once(name), assertion) for each in (answer, nested) for name in _REASONS)
    reason = next(filter(None, texts), "")
    said = " ".join(repr(text.rstrip(".")) for text in (error, reason) if text)
    return error, said or "no reason was given"


def seconds_until(header: str | None, *, now: float) -> float | None:
    """Read a ``Retry-After`` or a ``Date`` header: seconds from ``now`` to what it says.

    Args:
        header: Seconds, or an HTTP date (RFC 9110 section 5.6.7); None where it is absent.
        now: Seconds since the epoch.

    Returns:
        Seconds, negative for a date that is past; None where the header says nothing usable.
    """
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    try:
        # A date without a zone is UTC: HTTP knows no other (RFC 9110 section 5.6.7).
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError):
        return None


class Members(dict[str, object]):
    """The members of a JSON object.

    Attributes:
        repeated: Names that are there more than once; of these, readers take one or another.
    """

    def __init__(self, pairs: Sequence[tuple[str, object]] = ()) -> None:
        """Take the members in their order."""
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else Counter[str]()
        self.repeated = {name for name, count in counts.items() if count > 1}

    def once(self, name: str) -> object:
        """The value of a member that is there exactly once, else None."""
        return None if name in self.repeated else self.get(name)


def read_object(body: bytes) -> Members | None:
    """Read a JSON object in UTF-8; a byte order mark is dropped. None for anything else."""
    try:
        # Not the codec of that name: it is loaded at its first use, and a module that is being
        # loaded at a fork stays locked in the child.
        value = json.loads(
            body.removeprefix(BOM_UTF8).decode(),
            parse_constant=_no_constant,
            object_pairs_hook=Members,
        )
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Members) else None


def _no_constant(name: str) -> NoReturn:
    # NaN and Infinity are not JSON (RFC 8259 section 6), and NaN compares with nothing.
    raise ValueError(name)


def _shown(text: object, assertion: Secret) -> str:
    if not isinstance(text, str):
        return ""
    sent = assertion.reveal()

    def masked(match: re.Match[str]) -> str:
        word = match[0]
        return "[masked]" if len(word) > _LONG_WORD or _shares(word, sent, _SHORT_PIECE) else word

    printable = "".join(c if c.isascii() and c.isprintable() else " " for c in text)
    shown = _WORD.sub(masked, printable[: 10 * _MAX_DESCRIPTION])
    # Shorter pieces, wrapped or spaced out, that make a longer one when put together.
    together = _SEPARATORS.sub("", shown)
    if _shares(together, _SEPARATORS.sub("", sent), _LONG_PIECE):
        return "[masked]"
    return shown[:_MAX_DESCRIPTION].strip()


def _shares(text: str, sent: str, length: int) -> bool:
    """Whether any ``length`` characters of a text stand in what was sent."""
    return any(text[i : i + length] in sent for i in range(len(text) - length + 1))


def _unusable(reason: str) -> TokenResponseError:
    return TokenResponseError(
        f"D1's answer cannot be used: {reason}.",
        hint=f"Check that the environment's URL is D1's token endpoint; if it is, {_ASK}.",
    )

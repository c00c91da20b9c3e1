# SPDX-License-Identifier: Apache-2.0
"""One small function for each way to misbehave, and the table of them.

A fault returns the response to send, or None to close the connection. One that sends its response
itself calls `Call.begin` first, so that the records know of it before the client does.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import TypeAlias

from aiohttp import web

from d1_signer.sandbox.grants import JSON, Answer, refusal
from d1_signer.sandbox.records import Fault

FaultFunction: TypeAlias = Callable[..., Awaitable[web.StreamResponse | None]]

_CHUNK = 1 << 16
_HUGE = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request as a fault sees it.

    Attributes:
        assertion: As received at the token endpoint, else ``""``.
        now: Seconds since the epoch by the sandbox's clock.
        honest: Makes the answer of a server without faults; a token is issued by it.
        begin: Records a response and sends its head.
        pause: Waits so many seconds; raises `ConnectionError` as soon as the server closes.
    """

    assertion: str
    now: float
    honest: Callable[[], Answer]
    begin: Callable[[web.StreamResponse], Awaitable[None]]
    pause: Callable[[float], Awaitable[None]]


async def _delay(call: Call, *, seconds: float = 1.0) -> web.Response:
    await call.pause(seconds)
    return call.honest().response()


def _status(status: int, error: str, **headers: str) -> FaultFunction:
    async def fault(_call: Call) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(status=status, document={"error": error}, headers=named).response()

    return fault


async def _unknown_status(_call: Call, *, status: int = 418) -> web.Response:
    return Answer(status=status, document={"error": "unheard_of"}).response()


def _retry_later(status: int) -> FaultFunction:
    async def fault(
        call: Call, *, retry_after: float | str | None = 1, as_date: bool = False
    ) -> web.Response:
        response = Answer(status=status, document={"error": "temporarily_unavailable"}).response()
        if as_date and isinstance(retry_after, int | float):
            response.headers["Retry-After"] = formatdate(call.now + retry_after, usegmt=True)
        elif retry_after is not None:
            response.headers["Retry-After"] = str(retry_after)
        return response

    return fault


async def _invalid_grant(call: Call, *, date_offset: float = 0.0) -> web.Response:
    response = refusal("invalid_grant", "The sandbox was told to refuse.").response()
    response.headers["Date"] = formatdate(call.now + date_offset, usegmt=True)
    return response


async def _hostile_echo(call: Call) -> web.Response:
    echo = "".join(character for character in call.assertion if "!" <= character <= "~")
    document = {"error": echo, "error_description": f"refused: {echo}", "assertion": echo}
    headers = {"X-Echo": echo, "Content-Type": JSON}
    body = json.dumps(document).encode()
    return web.Response(status=400, reason=echo, body=body, headers=headers)


async def _html(_call: Call) -> web.Response:
    page = "<html><body><h1>400 Bad Request</h1></body></html>"
    return web.Response(status=400, text=page, content_type="text/html")


def _empty(status: int) -> FaultFunction:
    async def fault(_call: Call) -> web.Response:
        return web.Response(status=status, content_type=JSON)

    return fault


def _blanks(count: int) -> Iterator[bytes]:
    # JSON may begin with blanks: whoever reads all of them finds a correct document behind.
    for start in range(0, count, _CHUNK):
        yield b" " * min(_CHUNK, count - start)


async def _huge_body(call: Call, *, size: int = _HUGE) -> web.StreamResponse:
    answer = call.honest()
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": JSON})
    await call.begin(response)
    for chunk in _blanks(size - len(answer.body)):
        await response.write(chunk)
        # Lets the loop see a client that has gone, where the write alone never waits.
        await call.pause(0)
    await response.write(answer.body)
    return response


async def _begin_with_length(call: Call, answer: Answer) -> web.StreamResponse:
    headers = {"Content-Type": JSON, "Content-Length": str(len(answer.body))}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await call.begin(response)
    return response


async def _slow_body(call: Call, *, seconds: float = 0.2) -> web.StreamResponse:
    answer = call.honest()
    response = await _begin_with_length(call, answer)
    for byte in answer.body:
        await response.write(bytes([byte]))
        await call.pause(seconds)
    return response


async def _close_mid_body(call: Call) -> None:
    answer = call.honest()
    response = await _begin_with_length(call, answer)
    await response.write(answer.body[: len(answer.body) // 2])


async def _close_before_answer(_call: Call) -> None:
    return None


async def _gzip_bomb(call: Call, *, size: int = _HUGE) -> web.Response:
    answer = call.honest()
    compressor = zlib.compressobj(wbits=31)  # 31: a gzip wrapper around the largest window
    packed = b"".join(map(compressor.compress, _blanks(size - len(answer.body))))
    packed += compressor.compress(answer.body) + compressor.flush()
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    return web.Response(status=answer.status, body=packed, headers=headers)


def _rewritten(rewrite: Callable[[bytes], bytes], *, content_type: str = JSON) -> FaultFunction:
    async def fault(call: Call) -> web.Response:
        answer = call.honest()
        body = rewrite(answer.body)
        return web.Response(status=answer.status, body=body, content_type=content_type)

    return fault


def _altered(answer: Answer, **members: object) -> Answer:
    return answer.altered(**members) if answer.status == HTTPStatus.OK else answer


def _with(**members: object) -> FaultFunction:
    async def fault(call: Call) -> web.Response:
        return _altered(call.honest(), **members).response()

    return fault


def _without(member: str) -> FaultFunction:
    async def fault(call: Call) -> web.Response:
        answer = call.honest()
        document = {name: value for name, value in answer.document.items() if name != member}
        return replace(answer, document=document).response()

    return fault


async def _wrong_token_type(call: Call, *, value: str = "mac") -> web.Response:
    return _altered(call.honest(), token_type=value).response()


async def _expires_in_short(call: Call, *, seconds: float = 1) -> web.Response:
    return _altered(call.honest(), expires_in=seconds).response()


async def _expires_in_huge(call: Call, *, value: str = "1e999") -> web.Response:
    answer = _altered(call.honest(), expires_in="@")
    # Put in as text: Python would write Infinity, and refuses more than 4,300 digits.
    body = answer.body.replace(b'"@"', value.encode())
    return web.Response(status=answer.status, body=body, content_type=JSON)


async def _access_token_illegal(
    call: Call, *, characters: str = "\r\nX-Injected: 1"
) -> web.Response:
    answer = call.honest()
    token = f"{answer.document.get('access_token')}{characters}"
    return _altered(answer, access_token=token).response()


async def _redirect(
    _call: Call, *, location: str = "https://elsewhere.invalid/", status: int = 307
) -> web.Response:
    return web.Response(status=status, headers={"Location": location})


FAULTS: Mapping[Fault, FaultFunction] = {
    Fault.DELAY: _delay,
    # RFC 6750 section 3: where a client of the banking resource looks for the reason.
    Fault.STATUS_401: _status(
        401, "invalid_token", WWW_Authenticate='Bearer error="invalid_token"'
    ),
    Fault.STATUS_403: _status(403, "access_denied"),
    Fault.STATUS_4XX: _unknown_status,
    Fault.STATUS_429: _retry_later(429),
    Fault.STATUS_500: _status(500, "server_error"),
    Fault.STATUS_503: _retry_later(503),
    Fault.INVALID_GRANT: _invalid_grant,
    Fault.HOSTILE_ECHO: _hostile_echo,
    Fault.HTML_400: _html,
    Fault.EMPTY_400: _empty(400),
    Fault.EMPTY_BODY: _empty(200),
    Fault.HUGE_BODY: _huge_body,
    Fault.SLOW_BODY: _slow_body,
    Fault.GZIP_BOMB: _gzip_bomb,
    Fault.BROKEN_JSON: _rewritten(lambda body: body[:-2]),
    Fault.JSON_ARRAY: _rewritten(lambda body: b"[" + body + b"]"),
    Fault.WRONG_CONTENT_TYPE: _rewritten(bytes, content_type="text/plain"),
    Fault.WRONG_TOKEN_TYPE: _wrong_token_type,
    Fault.EXPIRES_IN_MISSING: _without("expires_in"),
    Fault.EXPIRES_IN_ZERO: _with(expires_in=0),
    Fault.EXPIRES_IN_SHORT: _expires_in_short,
    Fault.EXPIRES_IN_STRING: _with(expires_in="900"),
    Fault.EXPIRES_IN_NEGATIVE: _with(expires_in=-1),
    Fault.EXPIRES_IN_NAN: _with(expires_in=math.nan),
    Fault.EXPIRES_IN_HUGE: _expires_in_huge,
    Fault.ACCESS_TOKEN_MISSING: _without("access_token"),
    Fault.ACCESS_TOKEN_NOT_STRING: _with(access_token=["not", "a", "string"]),
    Fault.ACCESS_TOKEN_ILLEGAL: _access_token_illegal,
    Fault.REDIRECT: _redirect,
    Fault.CLOSE_BEFORE_ANSWER: _close_before_answer,
    Fault.CLOSE_MID_BODY: _close_mid_body,
}

TOKEN_ONLY = frozenset(
    fault
    for fault in Fault
    if fault.startswith(("expires-in", "access-token"))
    or fault in (Fault.INVALID_GRANT, Fault.HOSTILE_ECHO, Fault.WRONG_TOKEN_TYPE)
)
"""Faults that mean nothing at the banking resource."""

# SPDX-License-Identifier: Apache-2.0
"""What the sandbox answers: the token endpoint, a protected resource and the counters."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from dataclasses import asdict
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from d1_signer.sandbox.assertions import Ledger, Verdict
from d1_signer.sandbox.faults import Call
from d1_signer.sandbox.grants import Answer, is_correlation_id, read_grant, refusal
from d1_signer.sandbox.records import Exchange, TokenRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from d1_signer.sandbox.assertions import AssertionVerifier
    from d1_signer.sandbox.grants import Grant
    from d1_signer.sandbox.plan import Order, Plan
    from d1_signer.sandbox.recorder import Recorder

BASE_PATH = "/authz/v1"
TOKEN_PATH = BASE_PATH + "/oauth2/token"
BANKING_PATH = "/banking"

_PING_PATH = BANKING_PATH + "/ping"
_COUNTERS_PATH = "/counters"
_SCOPE = "d1-api:account:full d1-api:consumer:read"
_MAX_KEPT_BODY = 1 << 16

_log = logging.getLogger("d1_signer.sandbox")


class TokenOffice:
    """Issues opaque access tokens and knows the good ones.

    Args:
        clock: Seconds since the epoch.
        lifetime: Seconds that the tokens issued from now on live; may be set.
    """

    def __init__(self, *, clock: Callable[[], float], lifetime: float) -> None:
        self.lifetime = lifetime
        self._clock = clock
        self._good = Ledger()

    def issue(self) -> dict[str, object]:
        """A new token, as the members of a token answer."""
        token = secrets.token_urlsafe(32)
        lifetime, now = self.lifetime, self._clock()
        self._good.add(token, expires_at=now + lifetime, now=now)
        return {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": int(lifetime) if lifetime == int(lifetime) else lifetime,
            "scope": _SCOPE,
        }

    def accepts(self, authorization: str) -> bool:
        """Whether an Authorization header carries a good bearer token."""
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and self._good.holds(token.strip(), now=self._clock())

    def revoke_all(self) -> None:
        """Refuse what was issued so far."""
        self._good = Ledger()


class _Visit:
    """One request on its way through, and the one place where answers are recorded.

    Args:
        request: The request.
        endpoint: ``"token"``, ``"banking"`` or ``"other"``, for counting and the log.
    """

    def __init__(self, request: web.BaseRequest, endpoint: str, recorder: Recorder) -> None:
        self.request = request
        self.endpoint = endpoint
        self.correlation_id = request.headers.get("x-correlation-id")
        self.number: int | None = None
        self.body = b""
        self._recorder = recorder

    async def read(self) -> None:
        """Read the body, at most the framework's bound of 1 MiB."""
        self.body = await self.request.read()

    def answered(self, response: web.StreamResponse, now: float) -> None:
        """Complete the headers of a response that is about to be sent, and record it."""
        headers = response.headers
        headers.setdefault("Date", formatdate(now, usegmt=True))
        headers["Server"] = "d1-signer-sandbox"
        if self.endpoint == "token":
            headers.update({"Cache-Control": "no-store", "Pragma": "no-cache"})
        if self.correlation_id is not None and is_correlation_id(self.correlation_id):
            headers["x-correlation-id"] = self.correlation_id
        if self.number is not None:
            self._recorder.answered(self.number, response.status)
        if response.status >= HTTPStatus.BAD_REQUEST and self.endpoint != "other":
            refused = "tokens_refused" if self.endpoint == "token" else "banking_refused"
            self._recorder.count(refused)
        self._recorder.exchanged(self._exchange(response))
        _log.debug(
            "%s endpoint: %s answered %d", self.endpoint, self.request.method, response.status
        )

    def _exchange(self, response: web.StreamResponse) -> Exchange:
        body = response.body if isinstance(response, web.Response) else b""
        return Exchange(
            method=self.request.method,
            path=self.request.path_qs,
            request_headers=tuple(self.request.headers.items()),
            request_body=self.body[:_MAX_KEPT_BODY],
            status=response.status,
            response_headers=tuple(response.headers.items()),
            response_body=body if isinstance(body, bytes) else b"",
        )


class Service:
    """Answers requests, one call of `handle` each, all on one event loop.

    Args:
        issuer_id: The issuer that is known here.
        clock: Seconds since the epoch.
        office: Issues the tokens.
        verifier: Judges the assertions.
        recorder: Keeps what happened.
        token_plan: Orders to misbehave at the token endpoint.
        banking_plan: Orders to misbehave at the protected resource.
    """

    def __init__(
        self,
        *,
        issuer_id: str,
        clock: Callable[[], float],
        office: TokenOffice,
        verifier: AssertionVerifier,
        recorder: Recorder,
        token_plan: Plan,
        banking_plan: Plan,
    ) -> None:
        self._issuer_id = issuer_id
        self._clock = clock
        self._office = office
        self._verifier = verifier
        self._recorder = recorder
        self._token_plan = token_plan
        self._banking_plan = banking_plan
        self.stopping = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; a connection to be closed is aborted."""
        endpoint = {TOKEN_PATH: "token", _PING_PATH: "banking"}.get(request.path, "other")
        visit = _Visit(request, endpoint, self._recorder)
        try:
            response = await self._answer(visit)
            if response is not None and not response.prepared:
                visit.answered(response, self._clock())
        except ConnectionError:  # the client has gone, or the sandbox closes
            response = None
        if response is None:
            if request.transport is not None:
                request.transport.abort()
            response = web.Response()  # the framework finds the connection closed and drops it
        return response

    async def _answer(self, visit: _Visit) -> web.StreamResponse | None:
        try:
            if visit.endpoint == "token":
                return await self._token(visit)
            if visit.endpoint == "banking":
                return await self._banking(visit)
        except (web.HTTPRequestEntityTooLarge, web.RequestPayloadError) as error:
            too_large = isinstance(error, web.HTTPRequestEntityTooLarge)
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_large else HTTPStatus.BAD_REQUEST
            answer = refusal("invalid_request", "The body cannot be read.", status=status)
            response = answer.response()
            response.force_close()
            return response
        if visit.request.path != _COUNTERS_PATH:
            return Answer(status=404, document={"error": "not_found"}).response()
        if visit.request.method != "GET":
            return _method_not_allowed("GET")
        return Answer(status=200, document=asdict(self._recorder.counters)).response()

    async def _token(self, visit: _Visit) -> web.StreamResponse | None:
        self._recorder.count("token_requests")
        request = visit.request
        if request.method != "POST":
            return _method_not_allowed("POST")
        await visit.read()
        now = self._clock()
        grant = read_grant(request.content_type.lower(), visit.body)
        verdict, refused = self._judge(grant, visit.correlation_id, now)
        order = self._token_plan.take()
        visit.number = self._recorder.arrived(
            TokenRequest(
                at=now,
                content_type=request.content_type.lower(),
                correlation_id=visit.correlation_id,
                headers={name.lower(): value for name, value in request.headers.items()},
                grant_type=grant.grant_type,
                header=verdict.header,
                claims=verdict.claims,
                refusal=str(refused.document["error_description"]) if refused else "",
                fault=order.fault if order else None,
                status=None,
            )
        )
        return await self._obey(order, visit, lambda: refused or self._issue(), grant.assertion)

    def _judge(
        self, grant: Grant, correlation_id: str | None, now: float
    ) -> tuple[Verdict, Answer | None]:
        unread = Verdict(header={}, claims={})
        if grant.refused:
            return unread, grant.refused
        if correlation_id is not None and not is_correlation_id(correlation_id):
            return unread, refusal("invalid_request", "The x-correlation-id does not fit.")
        verdict = self._verifier.verify(grant.assertion, now=now)
        if verdict.refusal:
            return verdict, refusal("invalid_grant", verdict.refusal)
        return verdict, None

    def _issue(self) -> Answer:
        self._recorder.count("tokens_issued")
        return Answer(status=200, document=self._office.issue())

    async def _banking(self, visit: _Visit) -> web.StreamResponse | None:
        self._recorder.count("banking_requests")
        if visit.request.method not in ("GET", "POST"):
            return _method_not_allowed("GET, POST")
        await visit.read()
        return await self._obey(self._banking_plan.take(), visit, lambda: self._ping(visit))

    def _ping(self, visit: _Visit) -> Answer:
        if not self._office.accepts(visit.request.headers.get("Authorization", "")):
            challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            return Answer(status=401, document={"error": "invalid_token"}, headers=challenge)
        document: dict[str, object] = {"status": "ok", "issuer": self._issuer_id}
        if visit.request.method == "POST":
            # Shows that a request that was sent anew carried its body.
            document["bytes"] = len(visit.body)
            document["sha256"] = hashlib.sha256(visit.body).hexdigest()
        return Answer(status=200, document=document)

    async def _obey(
        self,
        order: Order | None,
        visit: _Visit,
        honest: Callable[[], Answer],
        assertion: str = "",
    ) -> web.StreamResponse | None:
        if order is None:
            return honest().response()

        async def begin(response: web.StreamResponse) -> None:
            visit.answered(response, self._clock())
            await response.prepare(visit.request)

        return await order.apply(
            Call(
                assertion=assertion,
                now=self._clock(),
                honest=honest,
                begin=begin,
                pause=self._pause,
            )
        )

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return
        raise ConnectionAbortedError("the sandbox closes")


def _method_not_allowed(allowed: str) -> web.Response:
    document = {"error": "method_not_allowed"}
    return Answer(status=405, document=document, headers={"Allow": allowed}).response()

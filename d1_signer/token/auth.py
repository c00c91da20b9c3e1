# SPDX-License-Identifier: Apache-2.0
"""Bearer authentication of calls to D1's banking API, for requests."""

from __future__ import annotations

import logging
from typing import Any, Protocol, Self, final

import requests
from requests.auth import AuthBase
from requests.cookies import extract_cookies_to_jar
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from d1_signer.token.access_token import AccessToken
from d1_signer.token.d1 import Environment

_log = logging.getLogger("d1_signer.auth")
_UNAUTHORIZED = 401


class TokenSource(Protocol):
    """What gives the tokens: a `TokenFetcher`, or a double of it."""

    @property
    def environment(self) -> Environment:
        """The environment whose API host the tokens are for."""
        ...

    def token(self) -> AccessToken:
        """A valid token."""
        ...

    def invalidate(self, token: AccessToken) -> None:
        """Forget a token that was refused."""
        ...


@final
class D1Auth(AuthBase):
    """Adds ``Authorization: Bearer …`` to calls of D1's API host, and to no other host's.

    On a 401 the token is renewed once and the call is sent once more, where its body can be sent
    again. Use::

        session.get(fetcher.environment.banking_url + "/ping", auth=D1Auth(fetcher))

    `TokenFetcher.session` gives a session that has this built in, with the mutual TLS that D1 asks
    for on every call.
    """

    def __init__(self, source: TokenSource) -> None:
        """Take tokens from ``source``; one object serves any number of threads."""
        self._source = source

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Authenticate one request; called by requests.

        Raises:
            D1SignerError: No token can be had.
        """
        if not self._source.environment.serves(request.url or ""):
            _log.warning("auth.foreign_host the call is not to D1's API host: no token was added")
            return request
        token = self._source.token()
        _authorize(request, token)

        def renew_once(response: requests.Response, **kwargs: Any) -> requests.Response:
            # requests carries this hook along a redirect; what another host answers says nothing
            # about the token.
            answered = self._source.environment.serves(response.request.url or "")
            if response.status_code != _UNAUTHORIZED or not answered:
                return response
            self._source.invalidate(token)
            return self._replayed(response, kwargs)

        request.register_hook("response", renew_once)  # type: ignore[no-untyped-call]
        return request

    def _replayed(self, response: requests.Response, kwargs: dict[str, Any]) -> requests.Response:
        replay = response.request.copy()
        if not _rewound(replay):
            return response
        if not self._source.environment.serves(replay.url or ""):
            return response
        _authorize(replay, self._source.token())
        response.content  # noqa: B018 (reading it all gives the connection back to the pool)
        response.close()
        jar: Any = replay._cookies  # type: ignore[attr-defined]  # noqa: SLF001
        extract_cookies_to_jar(jar, response.request, response.raw)  # type: ignore[no-untyped-call]
        replay.prepare_cookies(jar)
        answer: requests.Response = response.connection.send(replay, **kwargs)
        answer.history.append(response)
        answer.request = replay
        return answer


class _Bearer(str):
    """A header's value that shows its token to nothing but the connection that sends it.

    Requests travel into exceptions, logs and the local variables of frames; http.client encodes a
    value when it is sent.
    """

    __slots__ = ("_token",)
    _token: AccessToken

    def __new__(cls, token: AccessToken) -> Self:
        value = super().__new__(cls, "****")
        value._token = token
        return value

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """What is sent; see `str.encode`."""
        return f"Bearer {self._token.value}".encode(encoding, errors)

    # A copied request can be sent; one that leaves the process, or is written down, cannot.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def _authorize(request: requests.PreparedRequest, token: AccessToken) -> None:
    request.headers["Authorization"] = _Bearer(token)


def _rewound(request: requests.PreparedRequest) -> bool:
    """Whether the body can be sent once more; a file is put back to where it was."""
    body: object = request.body
    if body is None or isinstance(body, bytes | str):
        return True
    if getattr(request, "_body_position", None) is None:
        return False
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""The cached call of other token clients, each with a token that is valid for an hour.

Each is called in the public way that makes sure of the token's life.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable
from typing import Any

import google.auth.credentials
import msal
import requests
from authlib.integrations.requests_client import AssertionSession
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pymaskinporten import MaskinportenClient, MaskinportenSecrets
from requests_oauth2client import BearerToken, OAuth2AccessTokenAuth, OAuth2Client

URL = "https://d1.invalid/authz/v1/oauth2/token"
HOUR = 3600


class _Google(google.auth.credentials.Credentials):
    def refresh(self, request: object) -> None:
        del request
        self.token = "google"
        self.expiry = dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(hours=1)


class _Answers:
    """What MSAL asks over HTTP before it has a token, answered at once."""

    def get(self, url: str, **_: Any) -> Any:
        del url
        endpoint: dict[str, object] = {"token_endpoint": URL, "authorization_endpoint": URL}
        return self._answer(endpoint | {"issuer": "https://d1.invalid/tenant"})

    def post(self, *_: Any, **__: Any) -> Any:
        return self._answer({"access_token": "m", "expires_in": HOUR, "token_type": "Bearer"})

    def close(self) -> None:
        pass

    def _answer(self, document: dict[str, object]) -> Any:
        response = requests.Response()
        response.status_code = 200
        response._content = json.dumps(document).encode()
        return response


def _google() -> Callable[[], object]:
    credentials = _Google()  # type: ignore[no-untyped-call]
    credentials.refresh(None)

    def call() -> object:
        credentials.before_request(None, "GET", URL, {})  # type: ignore[no-untyped-call]
        return credentials.token

    return call


def _authlib() -> Callable[[], object]:
    session = AssertionSession(URL, issuer="bench", subject="bench")
    session.token = {"access_token": "a", "expires_at": time.time() + HOUR, "token_type": "Bearer"}

    def call() -> object:
        session.token_auth.ensure_active_token()
        return session.token

    return call


def _requests_oauth2client() -> Callable[[], object]:
    expires_at = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    auth = OAuth2AccessTokenAuth(
        OAuth2Client(URL, client_id="bench"), BearerToken("r", expires_at=expires_at)
    )
    request = requests.Request("GET", URL).prepare()
    return lambda: auth(request)


def _msal() -> Callable[[], object]:
    application = msal.ConfidentialClientApplication(
        "bench",
        client_credential="unused",
        oidc_authority="https://d1.invalid/tenant",
        http_client=_Answers(),
    )
    assert "access_token" in application.acquire_token_for_client(["scope"])
    return lambda: application.acquire_token_for_client(["scope"])


def _pymaskinporten() -> Callable[[], object]:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    secrets = MaskinportenSecrets(
        PRIVATE_KEY=pem, MASKINPORTEN_CLIENT_ID="bench", KID="bench", SCOPE="d1"
    )
    client = MaskinportenClient(secrets, token_url=URL, audience=URL)
    client._token, client._expires_at = "p", time.monotonic() + HOUR
    call: Callable[[], object] = client.get_token
    return call


def cached_calls() -> dict[str, Callable[[], object]]:
    """A cached call of each peer."""
    return {
        "pymaskinporten": _pymaskinporten(),
        "Authlib": _authlib(),
        "requests-oauth2client": _requests_oauth2client(),
        "google-auth": _google(),
        "MSAL": _msal(),
    }

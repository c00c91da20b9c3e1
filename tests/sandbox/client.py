# SPDX-License-Identifier: Apache-2.0
"""A client of the sandbox that uses nothing of this package's own JOSE code."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import requests
from joserfc import jwt

if TYPE_CHECKING:
    from joserfc.jwk import ECKey

    from d1_signer.sandbox import Sandbox

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ISSUER = "demo-issuer"
KID = "bank-2026"


class Clock:
    """The real time, shifted by `ahead` seconds."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Client:
    """An issuer's backend: a P-256 key, its assertions, and requests over mutual TLS."""

    def __init__(self, sandbox: Sandbox, key: ECKey, *, tls: bool = True) -> None:
        self.sandbox = sandbox
        self.key = key
        self.session = requests.Session()
        self.session.trust_env = False
        if tls:
            self.session.verify = str(sandbox.ca_file)
            self.session.cert = (str(sandbox.client_certificate), str(sandbox.client_key))

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims with changes; None removes a claim."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": ISSUER,
            "aud": self.sandbox.token_endpoint,
            "exp": now + 300,
            "iat": now,
            "jti": uuid.uuid4().hex,
        } | changes
        return {name: value for name, value in claims.items() if value is not None}

    def assertion(
        self,
        *,
        header: dict[str, Any] | None = None,
        key: ECKey | None = None,
        **changes: Any,
    ) -> str:
        """A signed assertion with changes to its header and claims."""
        return jwt.encode(
            {"alg": "ES256", "typ": "JWT", "kid": KID} | (header or {}),
            self.claims(**changes),
            key or self.key,
            algorithms=["ES256", "ES384"],
        )

    def post(self, assertion: str | None = None, **options: Any) -> requests.Response:
        """One token request; without an assertion, a good one."""
        data = {"grant_type": GRANT_TYPE, "assertion": assertion or self.assertion()}
        defaults: dict[str, Any] = {"data": data, "timeout": 10, "allow_redirects": False}
        return self.session.post(self.sandbox.token_endpoint, **(defaults | options))

    def token(self) -> str:
        """A fresh access token."""
        return str(self.post().json()["access_token"])

    def ping(self, token: str | None, **options: Any) -> requests.Response:
        """Call the protected resource: GET, or POST where a body is given."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        method = "POST" if "data" in options else "GET"
        url = self.sandbox.banking_url + "/ping"
        return self.session.request(method, url, headers=headers, timeout=10, **options)


def public_jwk(key: ECKey) -> dict[str, str]:
    return {name: str(value) for name, value in key.as_dict(private=False).items()}

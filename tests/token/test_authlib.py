# SPDX-License-Identifier: Apache-2.0
"""An authorization server written by others, Authlib's RFC 7523 grant, accepts our assertions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
from authlib.oauth2.rfc6749 import AuthorizationServer, OAuth2Request
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7523 import JWTBearerGrant
from joserfc.jwk import ECKey, KeySet

from d1_signer import Signer, TokenFetcher, TokenRefusedError, generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.token.conftest import ISSUER, KID


class FormRequest(OAuth2Request):
    """A request of Authlib's that reads a parsed form."""

    def __init__(self, uri: str, form: dict[str, str]) -> None:
        super().__init__("POST", uri)
        self.payload = BasicOAuth2Payload(form)
        self._form = form

    @property
    def form(self) -> dict[str, str]:
        return self._form


class Grant(JWTBearerGrant):
    """Authlib's grant with the issuer of these tests as its one client."""

    keys: KeySet
    audience: str

    def resolve_issuer_client(self, issuer: str) -> Any:
        if issuer != ISSUER:
            return None
        return SimpleNamespace(
            client_id=issuer,
            check_grant_type=lambda _: True,
            get_allowed_scope=lambda scope: scope or "d1",
        )

    def resolve_client_public_key(self, client: Any) -> KeySet:
        assert client.client_id == ISSUER
        return self.keys

    def authenticate_user(self, subject: str) -> str | None:
        return subject if subject == ISSUER else None

    def has_granted_permission(self, client: Any, user: str) -> bool:
        return bool(client.client_id == user)

    def get_audiences(self) -> list[str]:
        return [self.audience]


class Server(AuthorizationServer):
    """Authlib's server without a web framework."""

    def create_oauth2_request(self, request: FormRequest) -> FormRequest:
        return request

    def handle_response(self, status: int, body: Any, headers: Any) -> tuple[int, Any]:
        del headers
        return status, body

    def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Nobody listens."""

    def save_token(self, token: Any, request: Any) -> None:
        """Nobody asks for it again."""


@pytest.fixture
def keys() -> KeySet:
    return KeySet([])


@pytest.fixture
def base_url(keys: KeySet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")  # loopback
    server = Server()
    server.register_token_generator(
        "default",
        BearerTokenGenerator(
            access_token_generator=lambda **_: "granted-by-authlib",
            expires_generator=lambda *_: 900,
        ),
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            form = {name: values[0] for name, values in parse_qs(body).items()}
            answered: Any = server.create_token_response(
                FormRequest(f"http://127.0.0.1:{http.server_port}/authz/v1/oauth2/token", form)
            )
            status, answer = answered
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        base = f"http://127.0.0.1:{http.server_port}/authz/v1"

        class ThisGrant(Grant):
            audience = f"{base}/oauth2/token"

        ThisGrant.keys = keys
        server.register_grant(ThisGrant)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield base
        http.shutdown()
        thread.join()


def register(keys: KeySet, signer: Signer) -> None:
    keys.keys.append(ECKey.import_key({**signer.public_key.jwk(), "kid": signer.kid}))


def test_an_assertion_from_a_pem_key(base_url: str, keys: KeySet, signer: Signer) -> None:
    register(keys, signer)
    with TokenFetcher(signer, issuer_id=ISSUER, environment=base_url) as fetcher:
        assert fetcher.token().value == "granted-by-authlib"


def test_an_assertion_from_an_hsm(base_url: str, keys: KeySet, softhsm_token: SoftHsmToken) -> None:
    generate_key(softhsm_token.uri)
    with open_signer(softhsm_token.uri, kid=KID) as signer:
        register(keys, signer)
        with TokenFetcher(signer, issuer_id=ISSUER, environment=base_url) as fetcher:
            assert fetcher.token().value == "granted-by-authlib"


@pytest.mark.parametrize("change", ["issuer", "audience", "key"])
def test_authlib_refuses_what_is_wrong(
    base_url: str, keys: KeySet, signer: Signer, change: str
) -> None:
    if change != "key":
        register(keys, signer)
    issuer = "somebody else" if change == "issuer" else ISSUER
    audience = "https://elsewhere.example/" if change == "audience" else f"{base_url}/oauth2/token"
    fetcher = TokenFetcher(signer, issuer_id=issuer, environment=base_url, audience=audience)
    with fetcher, pytest.raises(TokenRefusedError) as refusal:
        fetcher.token()
    assert refusal.value.error == "invalid_grant"

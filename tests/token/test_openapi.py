# SPDX-License-Identifier: Apache-2.0
"""Requests and answers held against Thales' OpenAPI document by openapi-core."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openapi_core import OpenAPI
from openapi_core.datatypes import RequestParameters
from openapi_core.exceptions import OpenAPIError
from werkzeug.datastructures import Headers, ImmutableMultiDict

from d1_signer import ConfigurationError, TokenFetcher
from d1_signer.sandbox import Exchange, Sandbox
from tests.token.conftest import FetcherMaker

DOCUMENT = Path(__file__).parent / "oauth2-openapi.json"


@dataclass
class Request:
    """An exchange's request in the form that openapi-core reads."""

    exchange: Exchange
    host_url: str
    path: str

    def __post_init__(self) -> None:
        self.parameters = RequestParameters(
            query=ImmutableMultiDict(),
            header=Headers(list(self.exchange.request_headers)),
            cookie=ImmutableMultiDict(),
        )
        self.method = self.exchange.method.lower()
        self.body = self.exchange.request_body
        headers = {name.lower(): value for name, value in self.exchange.request_headers}
        self.content_type = headers["content-type"]


@dataclass
class Response:
    """Its answer."""

    exchange: Exchange

    def __post_init__(self) -> None:
        self.status_code = self.exchange.status
        self.data = self.exchange.response_body
        self.headers = Headers(list(self.exchange.response_headers))
        self.content_type = self.headers["content-type"].partition(";")[0]


def contract(sandbox: Sandbox) -> OpenAPI:
    document: dict[str, Any] = json.loads(DOCUMENT.read_text())
    # The original names this parameter without defining it; the pattern is from Thales' pages.
    document["components"]["parameters"]["x-correlation-id"] = {
        "name": "x-correlation-id",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    }
    for server in document["servers"]:
        assert urlsplit(server["url"]).path == urlsplit(sandbox.base_url).path
    document["servers"] = [{"url": sandbox.base_url}]
    return OpenAPI.from_dict(document)


def request_of(sandbox: Sandbox, exchange: Exchange) -> Request:
    parts = urlsplit(sandbox.base_url)
    return Request(exchange, f"{parts.scheme}://{parts.netloc}", exchange.path)


def test_what_is_sent_and_answered_fits_the_document(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    fetcher.token()
    (exchange,) = sandbox.exchanges
    request = request_of(sandbox, exchange)
    api = contract(sandbox)
    unmarshalled = api.unmarshal_request(request)
    assert unmarshalled.body is not None
    assert unmarshalled.body["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    api.validate_response(request, Response(exchange))


def test_the_request_in_json_fits_the_document_too(
    make_fetcher: FetcherMaker, sandbox: Sandbox
) -> None:
    assert make_fetcher(request_format="json").token().value
    (exchange,) = sandbox.exchanges
    request = request_of(sandbox, exchange)
    assert request.content_type == "application/json"
    body: Any = contract(sandbox).unmarshal_request(request).body
    assert body["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    assert body["assertion"].count(".") == 2
    assert set(json.loads(request.body)) == {"grant_type", "assertion"}


@pytest.mark.parametrize("unknown", ["xml", "", None, "JSON", 1, ["json"]])
def test_another_form_of_the_request_is_refused(
    make_fetcher: FetcherMaker, unknown: object
) -> None:
    with pytest.raises(ConfigurationError, match="request format"):
        make_fetcher(request_format=unknown)


def test_the_validator_would_notice(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    fetcher.token()
    (exchange,) = sandbox.exchanges
    api = contract(sandbox)
    request = request_of(sandbox, exchange)
    request.body = b"grant_type=password&assertion=x"
    with pytest.raises(OpenAPIError):
        api.validate_request(request)
    request = request_of(sandbox, exchange)
    request.parameters.header = Headers({"x-correlation-id": "personal data?"})
    with pytest.raises(OpenAPIError):
        api.validate_request(request)
    answer = Response(exchange)
    answer.data = b'{"expires_in": "900"}'
    with pytest.raises(OpenAPIError):
        api.validate_response(request_of(sandbox, exchange), answer)

# SPDX-License-Identifier: Apache-2.0
"""The protected resource."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from d1_signer.errors import InvalidInputError
from d1_signer.sandbox import Fault
from tests.sandbox.client import ISSUER

if TYPE_CHECKING:
    import requests

    from d1_signer.sandbox import Sandbox
    from tests.sandbox.client import Client, Clock


def assert_unauthorized(answer: requests.Response) -> None:
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def test_a_token_opens_it_many_times(client: Client) -> None:
    token = client.token()
    for _ in range(3):
        answer = client.ping(token)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "issuer": ISSUER})


def test_a_body_is_reported_by_length_and_digest(client: Client) -> None:
    body = b"consumer=1" * 1000
    document = client.ping(client.token(), data=body).json()
    assert document["bytes"] == len(body)
    assert document["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("token", [None, "unknown", "é", ""])
def test_no_token_or_an_unknown_one_is_refused(client: Client, token: str | None) -> None:
    assert_unauthorized(client.ping(token))


def test_another_scheme_is_refused(client: Client, sandbox: Sandbox) -> None:
    headers = {"Authorization": f"Basic {client.token()}"}
    url = sandbox.banking_url + "/ping"
    assert_unauthorized(client.session.get(url, headers=headers, timeout=10))


def test_an_expired_token_is_refused(client: Client, clock: Clock) -> None:
    token = client.token()
    clock.ahead = 895
    assert client.ping(token).status_code == 200
    clock.ahead = 901
    assert_unauthorized(client.ping(token))


def test_revoked_tokens_are_refused_and_new_ones_are_not(client: Client, sandbox: Sandbox) -> None:
    old = client.token()
    sandbox.revoke_tokens()
    assert_unauthorized(client.ping(old))
    assert client.ping(client.token()).status_code == 200


def test_other_methods_are_refused(client: Client, sandbox: Sandbox) -> None:
    answer = client.session.delete(sandbox.banking_url + "/ping", timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, POST")


def test_it_misbehaves_on_request_and_the_token_endpoint_does_not(
    client: Client, sandbox: Sandbox
) -> None:
    sandbox.misbehave_banking(Fault.STATUS_401, times=1)
    token = client.token()
    assert_unauthorized(client.ping(token))
    assert client.ping(token).status_code == 200
    sandbox.misbehave_banking("status-503", retry_after=7)
    assert client.ping(token).headers["Retry-After"] == "7"
    sandbox.misbehave_banking(None)
    assert client.ping(token).status_code == 200


@pytest.mark.parametrize("fault", [Fault.EXPIRES_IN_ZERO, Fault.HOSTILE_ECHO, "invalid-grant"])
def test_faults_of_token_answers_mean_nothing_here(sandbox: Sandbox, fault: str) -> None:
    with pytest.raises(InvalidInputError, match="token endpoint only"):
        sandbox.misbehave_banking(fault)

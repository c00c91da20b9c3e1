# SPDX-License-Identifier: Apache-2.0
"""D1Auth for requests: the token goes to D1 only, and a 401 renews once and replays once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from d1_signer import D1Auth, TokenFetcher
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import FetcherMaker

BODY = b"payload " * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker) -> TokenFetcher:
    return make_fetcher(retry_interval=0.01)


@pytest.fixture
def session(fetcher: TokenFetcher) -> Iterator[requests.Session]:
    with fetcher.session() as session:
        yield session


def test_one_token_serves_many_calls(session: requests.Session, sandbox: Sandbox) -> None:
    for _ in range(5):
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 200
    assert sandbox.counters.token_requests == 1


@pytest.mark.parametrize("form", ["bytes", "text", "file", "stream"])
def test_a_401_renews_once_and_replays_the_body(
    session: requests.Session, sandbox: Sandbox, tmp_path: Path, form: str
) -> None:
    url = f"{sandbox.banking_url}/ping"
    session.get(url)
    sandbox.revoke_tokens()
    path = tmp_path / "body"
    path.write_bytes(b"skipped" + BODY)
    with path.open("rb") as file:
        file.seek(len(b"skipped"))
        data: dict[str, Any] = {
            "bytes": BODY,
            "text": BODY.decode(),
            "file": file,
            "stream": io.BytesIO(BODY),
        }
        answer = session.post(url, data=data[form])
    assert answer.status_code == 200
    assert answer.json()["sha256"] == DIGEST
    assert [earlier.status_code for earlier in answer.history] == [401]
    assert sandbox.counters.token_requests == 2


def test_a_body_that_cannot_be_sent_again_is_not(
    session: requests.Session, sandbox: Sandbox
) -> None:
    url = f"{sandbox.banking_url}/ping"
    session.get(url)
    sandbox.revoke_tokens()
    answer = session.post(url, data=(part for part in (b"a", b"b")))
    assert answer.status_code == 401
    # The next call finds the refused token forgotten.
    assert session.get(url).status_code == 200


def test_a_401_that_stays_is_returned(session: requests.Session, sandbox: Sandbox) -> None:
    sandbox.misbehave_banking(Fault.STATUS_401)
    answer = session.get(f"{sandbox.banking_url}/ping")
    assert answer.status_code == 401
    assert sandbox.counters.banking_requests == 2
    assert sandbox.counters.token_requests == 2


def test_other_hosts_get_no_token(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    with Sandbox(issuer_id="another", tls=False) as other:
        answer = requests.get(
            f"{other.banking_url}/ping", auth=D1Auth(fetcher), timeout=5, allow_redirects=False
        )
        assert answer.status_code == 401
        assert "authorization" not in {name.lower() for name in answer.request.headers}
    assert sandbox.counters.token_requests == 0


def test_a_redirect_to_another_host_gets_no_token(
    session: requests.Session, sandbox: Sandbox
) -> None:
    with Sandbox(issuer_id="another", tls=False) as other:
        sandbox.misbehave_banking(Fault.REDIRECT, location=f"{other.banking_url}/ping")
        answer = session.get(f"{sandbox.banking_url}/ping")
        assert other.counters.banking_refused == other.counters.banking_requests == 1
    assert answer.status_code == 401
    assert "authorization" not in {name.lower() for name in answer.request.headers}

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

from d1_signer import ConfigurationError, D1Auth, Limits, Signer, TokenFetcher
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import ISSUER, FetcherMaker

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


def test_a_session_follows_no_redirect(session: requests.Session, sandbox: Sandbox) -> None:
    with Sandbox(issuer_id="another", tls=False) as other:
        sandbox.misbehave_banking(Fault.REDIRECT, location=f"{other.banking_url}/ping")
        answer = session.post(f"{sandbox.banking_url}/ping", data=BODY)
        assert other.counters.banking_requests == 0
    assert (answer.status_code, answer.history) == (307, [])


def test_a_redirect_in_a_session_of_ones_own_takes_no_token_along(
    signer: Signer, make_fetcher: FetcherMaker
) -> None:
    with (
        Sandbox(issuer_id=ISSUER, tls=False) as plain,
        Sandbox(issuer_id="another", tls=False) as other,
        requests.Session() as own,
    ):
        plain.register_key(signer.kid, signer.public_key.jwk())
        fetcher = make_fetcher(environment=plain.base_url, client_certificate=None, ca_file=None)
        own.auth = D1Auth(fetcher)
        plain.misbehave_banking(Fault.REDIRECT, location=f"{other.banking_url}/ping", times=1)
        answer = own.get(f"{plain.banking_url}/ping")
        assert other.counters.banking_refused == 1
        assert "authorization" not in {name.lower() for name in answer.request.headers}
        # What the other host answered has not spoilt the token.
        assert own.get(f"{plain.banking_url}/ping").status_code == 200
        assert plain.counters.token_requests == 1


def test_an_api_that_always_answers_401_is_no_loop_of_token_requests(
    session: requests.Session, sandbox: Sandbox
) -> None:
    sandbox.misbehave_banking(Fault.STATUS_401)
    for _ in range(8):
        assert session.get(f"{sandbox.banking_url}/ping").status_code == 401
    assert sandbox.counters.token_requests == 2


def test_a_call_without_tls_to_another_machine_is_refused(session: requests.Session) -> None:
    with pytest.raises(ConfigurationError, match="without TLS"):
        session.post("http://192.0.2.1/card", data=BODY)


def test_a_call_without_a_timeout_has_one(make_fetcher: FetcherMaker, sandbox: Sandbox) -> None:
    fetcher = make_fetcher(limits=Limits(read=0.2))
    sandbox.misbehave_banking(Fault.DELAY, seconds=30)
    with fetcher.session() as session, pytest.raises(requests.ReadTimeout) as failure:
        session.get(f"{sandbox.banking_url}/ping")
    assert failure.value.request is not None
    assert failure.value.request.headers["Authorization"] == "****"

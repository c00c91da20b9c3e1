# SPDX-License-Identifier: Apache-2.0
"""The session that callers have: what it shows of a token, and what cannot be switched off."""

from __future__ import annotations

import http.client
import pickle
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from requests.adapters import HTTPAdapter

from d1_signer import ConfigurationError, TlsError, TokenFetcher
from d1_signer.sandbox import Fault, Sandbox
from tests.token.conftest import FetcherMaker
from tests.transport.test_handshakes import server_certificate, server_context, serving


def reachable(error: BaseException) -> Iterator[str]:
    """What a crash reporter sees, as text: args, attributes, chain, variables of frames."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        todo += [link.__cause__, link.__context__]
        yield repr(link.args)
        for value in vars(link).values():
            yield from texts(value)
        frame = link.__traceback__
        while frame is not None:
            if "/tests/" not in frame.tb_frame.f_code.co_filename:
                for value in list(frame.tb_frame.f_locals.values()):
                    yield from texts(value)
            frame = frame.tb_next


def texts(value: Any) -> Iterator[str]:
    yield repr(value)
    for part in (getattr(value, "request", None), value):
        if isinstance(part, requests.PreparedRequest):
            yield repr(dict(part.headers))


FAULTS: dict[str, Callable[[Sandbox], None]] = {
    "status": lambda d1: d1.misbehave_banking(Fault.STATUS_500, times=1),
    "timeout": lambda d1: d1.misbehave_banking(Fault.DELAY, times=1, seconds=30),
    "closed": lambda d1: d1.misbehave_banking(Fault.CLOSE_BEFORE_ANSWER, times=1),
    "torn": lambda d1: d1.misbehave_banking(Fault.CLOSE_MID_BODY, times=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_error_of_a_session_leads_to_the_token(
    fetcher: TokenFetcher, sandbox: Sandbox, fault: str
) -> None:
    token = fetcher.token().value
    with fetcher.session() as session:
        FAULTS[fault](sandbox)
        with pytest.raises(requests.RequestException) as failure:
            session.get(f"{sandbox.banking_url}/ping", timeout=0.5).raise_for_status()
    assert failure.value.request is not None
    found = list(reachable(failure.value))
    assert len(found) > 3
    assert not [text for text in found if token in text]


class Stop(BaseException):
    """What a signal's handler raises."""


def test_an_interrupted_call_leads_to_no_token(
    fetcher: TokenFetcher, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise Stop

    token = fetcher.token().value
    with fetcher.session() as session:
        monkeypatch.setattr(http.client.HTTPConnection, "send", interrupted)
        with pytest.raises(Stop) as failure:
            session.get(f"{sandbox.banking_url}/ping")
    found = list(reachable(failure.value))
    assert len(found) > 3
    assert not [text for text in found if token in text]


def test_an_answer_has_a_request_without_the_token(fetcher: TokenFetcher, sandbox: Sandbox) -> None:
    token = fetcher.token().value
    with fetcher.session() as session:
        answer = session.get(f"{sandbox.banking_url}/ping")
    assert answer.status_code == 200
    assert token not in repr(answer.request.headers)
    assert token.encode() not in pickle.dumps(answer.request.headers)


def test_another_adapter_is_not_mounted(fetcher: TokenFetcher) -> None:
    with fetcher.session() as session:
        for prefix in ("https://", "https://localhost", "http://"):
            with pytest.raises(ConfigurationError, match="adapter"):
                session.mount(prefix, HTTPAdapter())


def test_no_other_adapter_is_used_however_it_came_there(
    fetcher: TokenFetcher, sandbox: Sandbox
) -> None:
    with fetcher.session() as session:
        session.adapters["https://"] = HTTPAdapter()
        session.verify = False
        with pytest.raises(ConfigurationError, match="adapter"):
            session.get(f"{sandbox.banking_url}/ping")


@pytest.mark.parametrize(
    "settings",
    [
        {"assert_hostname": False},
        {"assert_hostname": "evil.example"},
        {"cert_reqs": "CERT_NONE"},
        {"cert_reqs": "CERT_NONE", "assert_hostname": False},
    ],
)
def test_urllib3s_own_settings_do_not_switch_off_verification(
    tmp_path: Path, make_fetcher: FetcherMaker, settings: dict[str, Any]
) -> None:
    certificate = server_certificate(tmp_path, x509.DNSName("evil.example"), common_name="any")
    with serving(server_context(certificate)) as (port, told):
        fetcher = make_fetcher(
            environment=f"https://localhost:{port}/authz/v1",
            client_certificate=None,
            ca_file=certificate,
        )
        with fetcher.session() as session:
            session.auth = None
            adapter: Any = session.get_adapter("https://localhost")
            adapter.poolmanager.connection_pool_kw.update(settings)
            with pytest.raises((requests.RequestException, ConfigurationError, ValueError)):
                session.get(f"https://localhost:{port}/banking/x")
    assert not told


def weak_level(context: ssl.SSLContext) -> None:
    context.set_ciphers("DEFAULT:@SECLEVEL=0:!PSK:!SRP")


def test_a_weak_key_of_the_server_is_refused_whatever_the_level(
    tmp_path: Path, make_fetcher: FetcherMaker
) -> None:
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505 (what is to be refused)
    certificate = server_certificate(
        tmp_path, x509.DNSName("localhost"), common_name="any", key=key
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    weak_level(server)
    server.load_cert_chain(certificate)
    context = ssl.create_default_context()
    weak_level(context)
    context.load_verify_locations(certificate)
    with serving(server) as (port, told):
        fetcher = make_fetcher(
            environment=f"https://localhost:{port}/authz/v1",
            client_certificate=context,
            ca_file=None,
        )
        with pytest.raises(TlsError, match="weaker"):
            fetcher.token()
    assert not told


def test_a_context_that_does_not_look_at_dates_is_refused(make_fetcher: FetcherMaker) -> None:
    context = ssl.create_default_context()
    context.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME
    with pytest.raises(ConfigurationError, match="valid"):
        make_fetcher(client_certificate=context, ca_file=None)

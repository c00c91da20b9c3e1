# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from d1_signer import ClientCertificate, Signer, TokenFetcher, generate_key, open_signer
from d1_signer.sandbox import Sandbox
from d1_signer.token import pauses

ISSUER = "test-issuer"
KID = "test-key"

FetcherMaker = Callable[..., TokenFetcher]


@pytest.fixture(scope="session")
def pem_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("keys") / "key.pem"
    return generate_key(path.as_uri()).uri


@pytest.fixture
def signer(pem_uri: str) -> Iterator[Signer]:
    with open_signer(pem_uri, kid=KID) as signer:
        yield signer


@pytest.fixture
def sandbox(signer: Signer) -> Iterator[Sandbox]:
    with Sandbox(issuer_id=ISSUER) as sandbox:
        sandbox.register_key(signer.kid, signer.public_key.jwk())
        yield sandbox


def certificate_of(sandbox: Sandbox) -> ClientCertificate:
    return ClientCertificate(sandbox.client_certificate, sandbox.client_key)


@pytest.fixture
def make_fetcher(sandbox: Sandbox, signer: Signer) -> Iterator[FetcherMaker]:
    with ExitStack() as stack:

        def make(**options: Any) -> TokenFetcher:
            settings: dict[str, Any] = {
                "signer": signer,
                "issuer_id": ISSUER,
                "environment": sandbox.base_url,
                "client_certificate": certificate_of(sandbox),
                "ca_file": sandbox.ca_file,
            }
            return stack.enter_context(TokenFetcher(**(settings | options)))

        yield make


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first failure be the last one: the next attempt is due when no patience is left."""
    monkeypatch.setattr(pauses, "_FIRST_PAUSE", 600.0)
    monkeypatch.setattr(pauses, "_LONGEST_PAUSE", 600.0)
    monkeypatch.setattr(pauses, "LONGEST_BACK_OFF", 600.0)
    defaults: Any = inspect.unwrap(TokenFetcher.__init__).__kwdefaults__
    monkeypatch.setitem(defaults, "retry_interval", 600.0)


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker) -> TokenFetcher:
    return make_fetcher()

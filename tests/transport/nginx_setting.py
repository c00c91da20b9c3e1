# SPDX-License-Identifier: Apache-2.0
"""A fetcher whose D1 is nginx: where its client key can be, and the ways to make calls."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from d1_signer import ClientCertificate, Signer, TokenFetcher, generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.servers import aws, gcp, vault
from tests.transport.nginx import Nginx, Seen

SUBJECT = "CN=TLSMA/issuer/PPR"
Call = Callable[[], int]
Way = Callable[[TokenFetcher, str], AbstractContextManager[Call]]


# -- where the client key is ----------------------------------------------------------------------


@contextmanager
def in_softhsm(token: SoftHsmToken, _folder: Path, **options: Any) -> Iterator[Signer]:
    generate_key(token.uri)
    with open_signer(token.uri, kid="tls", **options) as signer:
        yield signer


@contextmanager
def in_aws(_token: SoftHsmToken, folder: Path) -> Iterator[Signer]:
    with aws.aws_kms(folder) as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in aws.ENVIRONMENT.items():
            patch.setenv(name, value)
        key_id = endpoint.make_key().rpartition("/")[2]
        with open_signer(f"awskms:///{key_id}?endpoint={endpoint.url}", kid="tls") as signer:
            yield signer


@contextmanager
def in_gcp(_token: SoftHsmToken, _folder: Path) -> Iterator[Signer]:
    with (
        gcp.cloud_kms() as running,
        open_signer(f"gcpkms://{gcp.VERSION}", client=running.client, kid="tls") as signer,
    ):
        yield signer


@contextmanager
def in_vault(_token: SoftHsmToken, folder: Path) -> Iterator[Signer]:
    with vault.vault(folder) as running:
        running.make_key("tls")
        with open_signer(
            "hashivault://tls",
            address=running.tls_url,
            ca_file=str(running.ca_file),
            token_source=running.make_token,
            kid="tls",
        ) as signer:
            yield signer


PLACES: dict[str, Callable[[SoftHsmToken, Path], AbstractContextManager[Signer]]] = {
    "softhsm": in_softhsm,
    "isolated": functools.partial(in_softhsm, isolation="process"),
    "ministack": in_aws,
    "gcp": in_gcp,
    "openbao": in_vault,
}


# -- the ways to make a call, each over a connection of its own -----------------------------------


def limit(context: ssl.SSLContext, version: str) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    return context


@contextmanager
def by_requests(fetcher: TokenFetcher, version: str) -> Iterator[Call]:
    def call() -> int:
        with fetcher.session() as session:
            session.auth = None
            adapter: Any = session.get_adapter("https://")
            limit(adapter._context, version)
            return session.get(fetcher.environment.banking_url).status_code

    yield call


@contextmanager
def by_httpx(fetcher: TokenFetcher, version: str) -> Iterator[Call]:
    context = limit(fetcher.ssl_context, version)

    def call() -> int:
        with httpx.Client(verify=context, trust_env=False) as http:
            return http.get(fetcher.environment.banking_url).status_code

    yield call


@contextmanager
def by_httpx_async(fetcher: TokenFetcher, version: str) -> Iterator[Call]:
    context = limit(fetcher.ssl_context, version)

    async def calls() -> int:
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            return (await http.get(fetcher.environment.banking_url)).status_code

    yield lambda: asyncio.run(calls())


WAYS: dict[str, Way] = {
    "requests": by_requests,
    "httpx": by_httpx,
    "httpx-async": by_httpx_async,
}


class Setting:
    """A fetcher whose D1 is nginx, and a certificate for a signer's key."""

    def __init__(self, server: Nginx, signer: Signer, folder: Path, **options: Any) -> None:
        self.server = server
        self.path = folder / "client.pem"
        self.serial = server.authority.write(signer.public_key, SUBJECT[3:], self.path)
        self.assertions = open_signer(generate_key((folder / "d1.pem").as_uri()).uri, kid="d1")
        self.fetcher = TokenFetcher(
            self.assertions,
            issuer_id="issuer",
            environment=f"{server.url}/authz/v1",
            client_certificate=ClientCertificate(self.path, options.pop("key", signer)),
            ca_file=server.ca_file,
            **options,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.fetcher.close()
        self.assertions.close()

    def calls(self, way: str, version: str, number: int, threads: int) -> list[Seen]:
        """Make them, and return what nginx saw of them."""
        before = len(self.server.seen())
        with WAYS[way](self.fetcher, version) as call, ThreadPoolExecutor(threads) as pool:
            assert Counter(pool.map(lambda _: call(), range(number))) == {200: number}
        return self.server.seen(before + number)[before:]


def require(seen: list[Seen], number: int, serial: int, version: str) -> None:
    assert len({each.connection for each in seen}) == number
    assert {(each.verified, each.subject, each.serial, each.protocol) for each in seen} == {
        ("SUCCESS", SUBJECT, serial, version)
    }
    assert not any(each.resumed for each in seen)

# SPDX-License-Identifier: Apache-2.0
"""A handshake whose client key is in SoftHSM beside one with a key file, in turns, in one run.

``python -m tests.bench.tls_bench``. Both sides of a handshake are in memory, in this process.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from d1_signer import ClientCertificate, Signer, TokenFetcher, generate_key, open_signer
from d1_signer.testing import make_softhsm_token
from d1_signer.transport.client import ClientTls
from tests.transport.in_memory import Pair
from tests.transport.nginx import nginx

_ROUNDS, _BLOCK = 60, 5
_BAR = 1.10  # of a handshake with a key file and one signature
_LIMIT = 2.0  # seconds for a signature, as in a handshake: another thread waits for the HSM
_SLOW = 1.0  # seconds for a signature


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(_BLOCK):
        work()
    return (time.perf_counter() - began) / _BLOCK * 1e3


def against_a_file(pair: Pair, file: ClientTls, version: str) -> bool:
    """Print what a handshake takes; whether the bar is met."""
    contexts = [tls.context() for tls in (pair.tls, file)]
    for context in contexts:
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]

    def both() -> None:
        # One after the other, so that the signature is made in the same disorder of caches.
        pair.handshake(contexts[1])
        pair.signer.sign_digest(bytes(32), timeout=_LIMIT)

    work: list[Callable[[], object]] = [
        lambda: pair.handshake(contexts[0]),
        both,
        lambda: pair.handshake(contexts[1]),
    ]
    rounds = [[milliseconds(each) for each in work] for _ in range(_ROUNDS + 1)][1:]
    columns = zip(*rounds, strict=True)
    hsm, plain_and_sign, plain = (statistics.quantiles(column, n=10)[0] for column in columns)
    ratio = hsm / plain_and_sign
    print(
        f"{version}: key in SoftHSM {hsm:.2f} ms; key file {plain:.2f} ms, with one sign_digest "
        f"{plain_and_sign:.2f} ms; x {ratio:.2f}, bar {_BAR:.2f}  "
        f"{'met' if ratio <= _BAR else 'NOT MET'}",
        flush=True,
    )
    return bool(ratio <= _BAR)


class Slow:
    """A device that takes its time."""

    name, encoding = "slow", "raw"

    def __init__(self, inner: Signer) -> None:
        self.inner = inner

    def public_key(self) -> Any:
        return self.inner.public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        del deadline
        time.sleep(_SLOW)
        return self.inner.sign_digest(digest)

    def custody(self) -> Any:
        return self.inner.custody().evidence

    def close(self) -> None:
        pass


def held_event_loop(pair: Pair, folder: Path) -> None:
    """Print how long a slow signature holds an event loop: at a handshake, and when it is kept."""
    backend: Any = Slow(pair.signer)
    assertions = generate_key((folder / "d1.key").as_uri()).uri
    (folder / "nginx").mkdir()
    with (
        nginx(folder / "nginx") as server,
        Signer(backend, kid="slow", verify=False) as slow,
        open_signer(assertions) as signer,
    ):
        certificate = folder / "slow.pem"
        server.authority.write(slow.public_key, "slow", certificate)
        with TokenFetcher(
            signer,
            issuer_id="bench",
            environment=f"{server.url}/authz/v1",
            client_certificate=ClientCertificate(certificate, slow, timeout=3 * _SLOW),
            ca_file=server.ca_file,
        ) as fetcher:
            print(*asyncio.run(_longest_holds(fetcher, server.url)), sep="\n")


async def _longest_holds(fetcher: TokenFetcher, url: str) -> list[str]:
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - began)

    def call_in_thread() -> int:
        with fetcher.session() as session:
            session.auth = None
            return session.get(url).status_code

    beating = asyncio.create_task(beat())
    told = []
    async with httpx.AsyncClient(verify=fetcher.ssl_context, trust_env=False) as http:
        calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("AsyncClient, new connection", lambda: http.get(url)),
            ("AsyncClient, kept connection", lambda: http.get(url)),
            ("session(), new connection, in a thread", lambda: asyncio.to_thread(call_in_thread)),
        ]
        for name, call in calls:
            longest = 0.0
            await call()
            await asyncio.sleep(0.01)
            told.append(
                f"a signature of {_SLOW:.0f} s holds the event loop {longest:.2f} s: {name}"
            )
    beating.cancel()
    return told


def main() -> int:
    """Measure; 0 where the bar is met."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        token = make_softhsm_token(folder)
        os.environ["SOFTHSM2_CONF"] = str(token.configuration)
        pair = Pair(folder, generate_key(token.uri).uri)
        stack.callback(pair.signer.close)
        key = folder / "file.key"
        with open_signer(generate_key(key.as_uri()).uri) as signer:
            pair.authority.write(signer.public_key, "file", folder / "file.pem")
        file = ClientTls(ClientCertificate(folder / "file.pem", key), folder / "server.pem")
        met = [against_a_file(pair, file, version) for version in ("TLSv1_2", "TLSv1_3")]
        held_event_loop(pair, folder)
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Handshakes in memory, with a client key that is a signer's, and what disturbs them.

``python -m tests.transport.in_memory NAME NUMBER``: a program, since it may crash.
"""

from __future__ import annotations

import gc
import random
import signal
import ssl
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d1_signer import ClientCertificate, Signer, generate_key, open_signer
from d1_signer.transport.client import ClientTls
from tests.servers.certificates import self_signed
from tests.transport.nginx import Authority


class Pair:
    """A server that asks for a certificate, and what makes contexts for its clients."""

    def __init__(self, folder: Path, key: str | None = None) -> None:
        certificate, private = self_signed(folder)
        self.authority = Authority(folder)
        self.uri = key or generate_key((folder / "client.key").as_uri()).uri
        self.signer: Signer = open_signer(self.uri, kid="tls")
        self.path = folder / "client.pem"
        self.authority.write(self.signer.public_key, "client", self.path)
        self.tls = ClientTls(ClientCertificate(self.path, self.signer), certificate)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(certificate, private)
        self.server.verify_mode = ssl.CERT_REQUIRED
        self.server.load_verify_locations(self.authority.file)

    def handshake(
        self, context: ssl.SSLContext, before_last: Callable[[], None] = lambda: None
    ) -> None:
        """Do one; ``before_last`` comes before the client's step that signs."""
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(to_client, to_server, server_hostname="localhost")
        server = self.server.wrap_bio(to_server, to_client, server_side=True)
        assert not _step(client)
        _step(server)
        before_last()
        _step(client)
        while not _step(server):
            _step(client)
        assert server.getpeercert()


def _step(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


class Disturbance(BaseException):
    """What a signal's handler raises."""


def signals(pair: Pair, number: int) -> Counter[str]:
    """A handler raises anywhere in a handshake, also where OpenSSL has just called us."""

    def disturb(*_: object) -> None:
        raise Disturbance

    signal.signal(signal.SIGALRM, disturb)
    sys.unraisablehook = lambda told: ends.update([f"lost {told.exc_value!r}"])
    ends: Counter[str] = Counter()
    context = pair.tls.context()
    for _ in range(number):
        after = random.uniform(1e-5, 1.5e-3)
        try:
            try:
                pair.handshake(
                    context,
                    lambda: signal.setitimer(signal.ITIMER_REAL, after) and None,  # noqa: B023
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            ends["done"] += 1
        except Disturbance:
            ends["disturbed"] += 1
        except BaseException as error:  # noqa: BLE001 (counted)
            ends[repr(error)] += 1
    return ends


def threads(pair: Pair, number: int) -> Counter[str]:
    """Contexts come, are renewed and go, with garbage collected at all times."""
    gc.set_threshold(7)
    until, ends = time.monotonic() + number, Counter[str]()
    shared = pair.tls.context()

    def work(call: Callable[[], object], name: str) -> None:
        while time.monotonic() < until:
            try:
                call()
                ends[name] += 1
            except BaseException as error:  # noqa: BLE001 (counted)
                ends[repr(error)] += 1

    def renew() -> None:
        pair.authority.write(pair.signer.public_key, "client", pair.path)
        pair.tls.reload()

    def in_a_circle() -> None:
        context: Any = pair.tls.context()
        context.itself = context
        pair.handshake(context)

    calls = [
        (lambda: pair.handshake(shared), "shared"),
        (lambda: pair.handshake(shared), "shared"),
        (lambda: pair.handshake(pair.tls.context()), "own"),
        (in_a_circle, "circle"),
        (renew, "renewed"),
    ]
    workers = [threading.Thread(target=work, args=call) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return ends


def the_end(pair: Pair, _: int) -> Counter[str]:
    """The interpreter ends while threads of which it does not wait are in handshakes."""
    context = pair.tls.context()

    def work() -> None:
        while True:
            pair.handshake(context)

    for _number in range(4):
        threading.Thread(target=work, daemon=True).start()
    pair.handshake(context)
    return Counter()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(Path(directory))
        found = globals()[sys.argv[1]](pair, int(sys.argv[2]))
    print(dict(found))

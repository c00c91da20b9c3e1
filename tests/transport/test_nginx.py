# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS against nginx, with the client key wherever a `Signer` has it."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from d1_signer import (
    CertificateEvent,
    Signer,
    generate_key,
    open_signer,
)
from d1_signer.events import Event
from d1_signer.testing import SoftHsmToken
from d1_signer.transport import handshake
from d1_signer.transport.tls import VerifyingContext
from tests.pkcs11.conftest import Run, run_python
from tests.transport.nginx import Nginx, Seen, nginx
from tests.transport.nginx_setting import PLACES, SUBJECT, WAYS, Setting, in_softhsm, require

__all__ = ["run_python"]

VERSIONS = ("TLSv1.2", "TLSv1.3")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as running:
        yield running


@pytest.mark.parametrize("place", PLACES)
def test_handshakes_by_every_way(
    server: Nginx, softhsm_token: SoftHsmToken, tmp_path: Path, place: str
) -> None:
    number = 24
    with (
        PLACES[place](softhsm_token, tmp_path) as signer,
        Setting(server, signer, tmp_path) as setting,
    ):
        for version in VERSIONS:
            for way in WAYS:
                seen = setting.calls(way, version, number, threads=8)
                require(seen, number, setting.serial, version)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_a_thousand_handshakes_over_sixteen_threads(
    server: Nginx,
    softhsm_token: SoftHsmToken,
    tmp_path: Path,
    place: str,
    way: str,
    version: str,
) -> None:
    with (
        PLACES[place](softhsm_token, tmp_path) as signer,
        Setting(server, signer, tmp_path) as setting,
    ):
        began = time.monotonic()
        seen = setting.calls(way, version, 1000, threads=16)
        print(f"{place} {way} {version}: 1,000 in {time.monotonic() - began:.1f} s")
        require(seen, 1000, setting.serial, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_of_one_version_that_ends_connections_early(
    softhsm_token: SoftHsmToken, tmp_path: Path, version: str
) -> None:
    folder = tmp_path / "nginx"
    folder.mkdir()
    with (
        nginx(folder, protocols=version, requests=5) as server,
        in_softhsm(softhsm_token, tmp_path) as signer,
        Setting(server, signer, tmp_path) as setting,
        setting.fetcher.session() as session,
    ):
        session.auth = None
        for _ in range(50):
            assert session.get(server.url).status_code == 200
        seen = server.seen(50)
    # One handshake for five calls, and no session is resumed.
    require(seen, 10, setting.serial, version)


def test_one_signature_a_handshake_and_no_key_file(
    server: Nginx,
    softhsm_token: SoftHsmToken,
    tmp_path: Path,
    run_python: Run,
) -> None:
    """Counted by pkcs11-spy at the module, and by strace at the files."""
    spied, traced = tmp_path / "spy.log", tmp_path / "strace.log"
    generate_key(softhsm_token.uri)
    with open_signer(softhsm_token.uri) as signer:
        certificate = tmp_path / "client.pem"
        server.authority.write(signer.public_key, SUBJECT[3:], certificate)
    assertions = tmp_path / "assertions.pem"
    generate_key(assertions.as_uri())
    before = server.connections()
    ran = run_python(
        """
import os, sys
from d1_signer import *
uri, spy, d1, certificate, url, ca_file = sys.argv[1:]
with open_signer(uri, module_path=spy) as key, open_signer(d1) as signer, TokenFetcher(
    signer, issuer_id="i", environment=url + "/authz/v1", ca_file=ca_file,
    client_certificate=ClientCertificate(certificate, key),
) as fetcher:
    # To open a key takes a signature, too.
    log = open(os.environ["PKCS11SPY_OUTPUT"], errors="replace").read()
    print("OPENED", log.count(": C_Sign\\n"))
    sys.stdout.flush()
    for _ in range(10):
        with fetcher.session() as session:
            session.auth = None
            for _ in range(5):
                assert session.get(url).status_code == 200
""",
        softhsm_token.uri.replace(softhsm_token.module_path, spy_module()),
        spy_module(),
        assertions.as_uri(),
        str(certificate),
        server.url,
        str(server.ca_file),
        prefix=("strace", "-f", "-qq", "-e", "trace=open,openat,write", "-o", str(traced)),
        PKCS11SPY=softhsm_token.module_path,
        PKCS11SPY_OUTPUT=str(spied),
    )
    assert ran.returncode == 0, ran.stderr
    assert server.connections() - before == 10
    began = int(ran.stdout.split()[1])
    assert spied.read_text(errors="replace").count(": C_Sign\n") - began == 10
    assert began <= 1
    trace = traced.read_text(errors="replace")
    assert str(certificate) in trace
    opened = trace.partition("OPENED")[2]
    keys = [line for line in opened.splitlines() if ".key" in line or "assertions.pem" in line]
    assert keys == []


def spy_module() -> str:
    found = [
        *Path("/usr/lib").glob("*/pkcs11-spy.so"),
        *Path("/usr/lib").glob("*/pkcs11/pkcs11-spy.so"),
    ]
    assert found, "apt-get install opensc-pkcs11"
    return str(found[0])


@pytest.mark.stress
def test_contexts_cost_no_memory_that_stays(
    server: Nginx, softhsm_token: SoftHsmToken, tmp_path: Path
) -> None:
    with in_softhsm(softhsm_token, tmp_path) as signer, Setting(server, signer, tmp_path) as made:

        def use(number: int) -> None:
            for _ in range(number):
                context = made.fetcher.ssl_context
                assert isinstance(context, VerifyingContext)
                made.fetcher._tls._credentials.load_into(
                    context
                )  # as for a certificate that was replaced
                del context
            gc.collect()

        use(100)
        before, keys = resident(), len(handshake._handshakes)
        use(600)
        assert len(handshake._handshakes) == keys
        assert resident() - before < 3_000  # a context alone is 300 kB with its authorities


def resident() -> int:
    """Kilobytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_key_that_was_renewed_and_one_that_has_its_place(
    server: Nginx, softhsm_token: SoftHsmToken, tmp_path: Path
) -> None:
    """Contexts come and go while others are renewed: none loses its key to another's end."""
    with in_softhsm(softhsm_token, tmp_path) as signer, Setting(server, signer, tmp_path) as made:
        for _ in range(10):
            old = [made.fetcher.ssl_context for _ in range(3)]
            made.fetcher.reload()
            new = [made.fetcher.ssl_context for _ in range(3)]
            del old
            gc.collect()
            for context in new:
                with httpx.Client(verify=context, trust_env=False) as http:
                    assert http.get(server.url).status_code == 200


@pytest.mark.stress
@pytest.mark.parametrize(
    "forks", [20, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_children_that_are_forked_during_handshakes(
    server: Nginx, softhsm_token: SoftHsmToken, tmp_path: Path, run_python: Run, forks: int
) -> None:
    with in_softhsm(softhsm_token, tmp_path) as signer, Setting(server, signer, tmp_path) as made:
        arguments = (
            softhsm_token.uri,
            (tmp_path / "d1.pem").as_uri(),
            str(made.path),
            server.url,
            str(server.ca_file),
        )
    ran = run_python(
        "import sys; from tests.transport.forking import main; sys.exit(main(*eval(sys.argv[1])))",
        repr((forks, *arguments)),
        timeout=550,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def replaced(
    setting: Setting, key: Signer, other: Signer, number: int, seconds: float
) -> tuple[list[Seen], list[float]]:
    """Calls over connections of all ages while the certificate changes, its key in turns.

    Returns:
        What nginx saw, and the seconds until clients from before each certificate showed it.
    """
    stop = threading.Event()
    put: dict[int, float] = {}

    def replace() -> None:
        for turn in range(1, 1 << 30):
            subject, signer = f"turn-{turn}", (key, other)[turn % 2]
            put[setting.server.authority.write(signer.public_key, subject, setting.path)] = (
                time.time()
            )
            if stop.wait(1):
                return

    kept = setting.fetcher.session()
    kept.auth = None
    shared = httpx.Client(verify=setting.fetcher.ssl_context, trust_env=False)
    began = time.monotonic()

    def call(turn: int) -> int:
        # In step with the seconds that the replacing takes.
        stop.wait(max(0.0, began + turn * seconds / number - time.monotonic()))
        url = setting.server.url
        if turn % 4 == 0:
            with setting.fetcher.session() as session:
                session.auth = None
                return session.get(url).status_code
        if turn % 4 == 1:
            with httpx.Client(verify=setting.fetcher.ssl_context, trust_env=False) as http:
                return http.get(url).status_code
        return (kept if turn % 4 == 2 else shared).get(f"{url}/kept").status_code

    before = len(setting.server.seen())
    changing = threading.Thread(target=replace)
    changing.start()
    with kept, shared, ThreadPoolExecutor(8) as pool:
        codes = Counter(pool.map(call, range(number)))
        stop.set()
        changing.join()
    assert codes == {200: number}
    seen = setting.server.seen(before + number)[before:]
    first: dict[int, float] = {}
    for each in seen:
        if each.path == "/kept":
            first.setdefault(each.serial, each.at)
    return seen, [first[serial] - at for serial, at in put.items() if serial in first]


@pytest.mark.stress
@pytest.mark.parametrize(
    ("number", "seconds"),
    [(600, 8), pytest.param(10_000, 60, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
)
def test_a_certificate_that_is_replaced_each_second(
    softhsm_token: SoftHsmToken, tmp_path: Path, number: int, seconds: float
) -> None:
    folder = tmp_path / "nginx"
    folder.mkdir()
    other = open_signer(generate_key((tmp_path / "other.pem").as_uri()).uri, kid="other")
    with (
        nginx(folder, requests=20) as server,
        other,
        in_softhsm(softhsm_token, tmp_path) as signer,
    ):
        events: list[Event] = []
        with Setting(
            server, signer, tmp_path, key=[signer, other], observers=[events.append]
        ) as setting:
            seen, delays = replaced(setting, signer, other, number, seconds)
    assert {each.verified for each in seen} == {"SUCCESS"}
    assert not any(each.resumed for each in seen)
    print(
        f"{len(seen)} calls, {len({each.serial for each in seen})} certificates, "
        f"seen after {max(delays):.2f} s at most"
    )
    # The files are looked at every two seconds, so every other one is used.
    assert len(delays) >= seconds / 2 - 2
    assert max(delays) < 5
    told = {event.serial_number for event in events if isinstance(event, CertificateEvent)}
    assert {each.serial for each in seen} <= told

# SPDX-License-Identifier: Apache-2.0
"""Connections to AWS KMS and Cloud KMS that pass nothing, break, are refused, or lead elsewhere.

Eight threads sign meanwhile: again within fifteen seconds of the moment at which a new connection
would work, and no call past its time limit.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from d1_signer import errors
from d1_signer.backends.gcp_kms.place import Place
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.servers import aws, gcp
from tests.servers.certificates import Authority
from tests.servers.forwarder import Forwarder, NameServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.stress

NAMES = [x509.DNSName(name) for name in ("kms.bank.test", "localhost")]
_BAR = 15.0
_LIMIT = 4.0
_GRACE = 3.0  # for a loaded machine


class _Load:
    """Signs in eight threads, each call with a time limit."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._ended = threading.Event()
        self.good = 0.0
        self.failed = 0
        self.longest = 0.0
        self.other: list[BaseException] = []

    def _work(self) -> None:
        while not self._ended.is_set():
            started = time.monotonic()
            try:
                self._signer.public_key.verify(self._signer.sign(b"m"), b"m")
                self.good = max(self.good, started)
            except errors.SignerUnavailable:
                self.failed += 1
                time.sleep(0.02)
            except BaseException as error:  # noqa: BLE001 (looked at by the test)
                self.other.append(error)
                return
            self.longest = max(self.longest, time.monotonic() - started)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._work) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            self.wait(time.monotonic())
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def wait(self, moment: float) -> float:
        """Wait for a good signature that began after a moment; the seconds from that moment on."""
        while self.good <= moment:
            assert not self.other, self.other
            assert time.monotonic() < moment + 50
            time.sleep(0.02)
        return self.good - moment


def _deaf(forwarder: Forwarder) -> float:
    forwarder.go_deaf()
    return time.monotonic()


def _reset(forwarder: Forwarder) -> float:
    forwarder.reset()
    return time.monotonic()


def _refused(forwarder: Forwarder) -> float:
    forwarder.refuse()
    time.sleep(10)  # long enough for pauses between attempts to grow
    forwarder.listen()
    return time.monotonic()


LOSSES = {"deaf": _deaf, "reset": _reset, "refused": _refused}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws.Aws]:
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in aws.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    account = gcp.service_account(tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[gcp.Gcp, Path]]:
    """A server whose certificate names ``kms.bank.test`` and localhost, and its authority."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    certificate, key = authority.issue("kms.bank.test", *NAMES)
    with gcp.cloud_kms(certificate, key) as server:
        yield server, authority.ca_file


def _check(load: _Load, seconds: float) -> None:
    assert seconds < _BAR, seconds
    assert load.longest < _LIMIT + _GRACE, load.longest
    assert not load.other, load.other


@pytest.mark.parametrize("loss", LOSSES)
def test_aws_signs_again(loss: str, endpoint: aws.Aws) -> None:
    key = endpoint.make_key()
    with Forwarder(endpoint.port) as forwarder:
        url = f"http://127.0.0.1:{forwarder.port}"
        with open_signer(f"awskms:///{key}", endpoint=url, timeout=_LIMIT) as signer:
            load = _Load(signer)
            with load.running():
                seconds = load.wait(LOSSES[loss](forwarder))
    _check(load, seconds)


@pytest.mark.parametrize("loss", LOSSES)
def test_gcp_signs_again(loss: str, cloud: tuple[gcp.Gcp, Path]) -> None:
    server, authority = cloud
    with Forwarder(server.tls_port) as forwarder:
        uri = f"gcpkms://{gcp.VERSION}?endpoint=localhost:{forwarder.port}&ca_file={authority}"
        with open_signer(uri, timeout=_LIMIT) as signer:
            load = _Load(signer)
            with load.running():
                seconds = load.wait(LOSSES[loss](forwarder))
    _check(load, seconds)


@pytest.mark.parametrize("loss", ["deaf", "gone"])
def test_aws_follows_a_name_that_moves(
    loss: str, endpoint: aws.Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = endpoint.make_key()
    look_up: Callable[..., Any] = socket.getaddrinfo
    address = ["127.0.0.2"]

    def moving(host: str, *rest: Any, **options: Any) -> Any:
        return look_up(address[0] if host == "localhost" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    with Forwarder(endpoint.port, "127.0.0.2", endpoint.port) as old:
        url = f"http://localhost:{endpoint.port}"
        with open_signer(f"awskms:///{key}", endpoint=url, timeout=_LIMIT) as signer:
            load = _Load(signer)
            with load.running():
                address[0] = "127.0.0.1"
                if loss == "deaf":
                    old.go_deaf()
                else:
                    old.refuse()
                seconds = load.wait(time.monotonic())
        assert old.accepted
    _check(load, seconds)


@pytest.mark.parametrize("loss", ["deaf", "gone"])
def test_gcp_follows_a_name_that_moves(
    loss: str, cloud: tuple[gcp.Gcp, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, authority = cloud
    port = server.tls_port
    with NameServer("127.0.0.2") as names, Forwarder(port, "127.0.0.2", port) as old:
        target = f"dns://127.0.0.1:{names.port}/kms.bank.test:{port}"
        monkeypatch.setattr(Place, "target", property(lambda _: target))
        uri = f"gcpkms://{gcp.VERSION}?ca_file={authority}"
        with open_signer(uri, timeout=_LIMIT) as signer:
            load = _Load(signer)
            with load.running():
                names.address = "127.0.0.1"
                if loss == "deaf":
                    old.go_deaf()
                else:
                    old.refuse()
                seconds = load.wait(time.monotonic())
        assert old.accepted
    _check(load, seconds)

# SPDX-License-Identifier: Apache-2.0
"""What every backend of a remote service shares, tried with an SDK that holds its key itself."""

from __future__ import annotations

import datetime as dt
import logging
import os
import signal
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer import errors
from d1_signer.backends import remote
from d1_signer.backends.aws_kms.failures import AWS_KMS
from d1_signer.backends.gcp_kms.failures import CLOUD_KMS
from d1_signer.backends.vault.failures import service_at
from d1_signer.custody.evidence import Evidence
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from d1_signer.transport.processes import PerProcess
from tests.conftest import LeakWatch

KEY = ec.generate_private_key(ec.SECP256R1())
TOKEN = "token-of-the-request"
VAULT = service_at("vault.example.com")


class SdkError(Exception):
    """Holds the request, as those of real SDKs do."""


class SdkTimeout(SdkError):
    pass


class Sdk:
    def __init__(self) -> None:
        self.fault: Callable[[dict[str, str]], object] | None = None
        self.asked: list[str] = []
        self.closed = False

    def call(self, operation: str, digest: bytes = b"") -> bytes:
        request = {"operation": operation, "token": TOKEN}
        self.asked.append(operation)
        if self.fault is not None:
            self.fault(request)
        if operation == "sign":
            return KEY.sign(digest, ec.ECDSA(utils.Prehashed(SHA256())))
        return PublicKey(KEY.public_key()).der()


def _refused(error: Exception, doing: str) -> errors.D1SignerError | None:
    if not isinstance(error, PermissionError):
        return None
    return CLOUD.refusal(doing, 403, "no", (errors.AccessDeniedError, "Grant it."), {"status": 403})


CLOUD = remote.Service(
    name="The cloud",
    packages="cloud-sdk",
    altered_hint="Something alters answers.",
    failures=(
        ((SdkTimeout,), errors.SignerTimeout, "Allow more time."),
        ((SdkError, OSError), errors.SignerUnavailable, "Try again."),
    ),
    refused=_refused,
)


@dataclass(frozen=True)
class Client:
    sdk: Sdk
    owned: bool = False

    def close(self) -> None:
        if self.owned:
            self.sdk.closed = True


class CloudBackend(remote.RemoteBackend[Client]):
    name = "cloud"
    encoding = SignatureEncoding.DER

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        assert until > time.monotonic()
        der = CLOUD.ask("to give the public key", client.sdk.call, "public_key")
        return f"{self._key} version=3", PublicKey.from_der(der)

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        client, self.until = self._begin(deadline)
        return CLOUD.ask("to sign", client.sdk.call, "sign", digest)

    def custody(self) -> Evidence:
        client, _ = self._begin(None)
        told = {"length": len(CLOUD.ask("to describe it", client.sdk.call, "describe"))}
        return Evidence(
            location=f"cloud://{self._key}",
            exportable=None,
            generated_in_place=None,
            hardware=None,
            facts=tuple(remote.facts_of("the cloud", told)),
        )


def _clients(given: Any, make: Callable[[], Sdk] = Sdk) -> PerProcess[Client]:
    return remote.clients_of(given, "cloud client", Client, lambda: Client(make(), owned=True))


def _opened(given: Any = None, timeout: float = 10.0) -> CloudBackend:
    return CloudBackend("k", _clients(given), timeout)


def _sdk(backend: CloudBackend) -> Sdk:
    client = backend._clients.made_here()
    assert client is not None
    return client.sdk


class TestCloud(SignerConformance):
    """A key, its client and its table are all that a backend adds."""

    @pytest.fixture
    def secrets(self) -> tuple[str, ...]:
        return (TOKEN,)

    @pytest.fixture
    def signer(self) -> Signer:
        return Signer(_opened())


# -- failures -------------------------------------------------------------------------------------


def _raising(kind: type[BaseException], **options: Any) -> Callable[[dict[str, str]], None]:
    def fault(request: dict[str, str]) -> None:
        authorization = request["token"]
        raise kind(f"failed: {authorization}", request) from options.get("cause")

    return fault


def _own(request: dict[str, str]) -> None:
    try:
        _raising(SdkError)(request)
    except SdkError:
        raise errors.IntegrityError("too large") from None


@pytest.fixture
def backend(leak_watch: LeakWatch) -> Iterator[CloudBackend]:
    leak_watch.note(TOKEN)
    opened = _opened()
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (_raising(SdkTimeout), errors.SignerTimeout, "could not be asked to sign: SdkTimeout."),
        (_raising(SdkError), errors.SignerUnavailable, "could not be asked to sign: SdkError."),
        (_raising(PermissionError), errors.AccessDeniedError, "refused to sign: 403 (no)."),
        (_raising(KeyError), errors.SignerError, "could not be asked to sign: KeyError."),
        (_own, errors.IntegrityError, "too large"),
    ],
)
def test_failure_of_the_sdk_is_left_behind_with_its_frames(
    backend: CloudBackend, fault: Any, error: type[errors.D1SignerError], text: str
) -> None:
    _sdk(backend).fault = fault
    with pytest.raises(error) as refused:
        backend.sign_digest(bytes(32), None)
    assert type(refused.value) is error
    assert refused.value.message in {text, f"The cloud {text}"}
    assert refused.value.__context__ is None
    assert refused.value.__cause__ is None
    trace = refused.value.__traceback__
    while trace is not None:
        assert TOKEN not in str(trace.tb_frame.f_locals)
        assert trace.tb_frame.f_code is not Sdk.call.__code__
        trace = trace.tb_next


def test_failure_in_no_table_is_to_be_reported(backend: CloudBackend) -> None:
    _sdk(backend).fault = _raising(KeyError)
    with pytest.raises(errors.SignerError, match="versions of cloud-sdk") as refused:
        backend.sign_digest(bytes(32), None)
    assert refused.value.details == {"sdk_error": "KeyError"}


@pytest.mark.parametrize(
    ("cause", "retryable"), [(ssl.SSLCertVerificationError("no"), False), (ssl.SSLError("x"), True)]
)
def test_refused_certificate_stays_refused(
    backend: CloudBackend, cause: Exception, retryable: bool
) -> None:
    _sdk(backend).fault = _raising(SdkError, cause=cause)
    with pytest.raises(errors.SignerUnavailable) as refused:
        backend.sign_digest(bytes(32), None)
    assert refused.value.retryable is retryable


@pytest.mark.parametrize(
    "service",
    [AWS_KMS, CLOUD_KMS, service_at("vault.example.com")],
    ids=lambda service: service.name,
)
def test_no_row_of_a_table_hides_behind_another(service: remote.Service) -> None:
    before: tuple[type[Exception], ...] = ()
    for kinds, _, hint in service.failures:
        assert hint
        assert not [kind for kind in kinds if issubclass(kind, before)]
        before += kinds


@pytest.mark.parametrize("message", ["", "two\nlines", "x" * 401])
def test_message_that_is_no_short_text_is_not_told(message: str) -> None:
    meaning = (errors.SignerError, "Look at it.")
    assert CLOUD.refusal("to sign", 400, message, meaning, {}).message == (
        "The cloud refused to sign: 400."
    )


def test_answer_that_does_not_fit_may_fit_the_next_time() -> None:
    error = CLOUD.altered("gave no signature.", {"status": 200})
    assert (error.message, error.hint, error.retryable, error.details) == (
        "The cloud gave no signature.",
        "Something alters answers.",
        True,
        {"status": 200},
    )


# -- the client -----------------------------------------------------------------------------------


def test_own_client_is_closed_and_a_given_one_stays_open() -> None:
    given = Sdk()
    for client in (None, given, lambda: given):
        backend = _opened(client)
        backend.close()
        backend.close()
        assert _sdk(backend).closed is (client is None)


def test_function_that_fails_is_told_as_the_part_at_fault() -> None:
    def fails() -> Sdk:
        secret = TOKEN
        raise OSError(11, f"not with {secret}")  # EAGAIN, as where no thread can be started

    for given, told in ((fails, "failed with BlockingIOError"), (lambda: None, "gave none")):
        with pytest.raises(errors.ConfigurationError) as refused:
            _opened(given)
        assert refused.value.message == f"The function that gives the cloud client {told}."
        assert refused.value.__context__ is None
        assert TOKEN not in repr(refused.value.to_dict())
        with (
            pytest.raises(errors.ConfigurationError, match="The function"),
            remote.client_for(_clients(given), 60.0),
        ):
            pass


class _SoftLimit(Exception):
    """As Celery's."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, errors.LoginError])
def test_what_is_not_the_functions_failure_passes_through(kind: type[BaseException]) -> None:
    def fails() -> Sdk:
        raise kind("x")

    with pytest.raises(kind):
        _clients(fails).get()
    with pytest.raises(kind):
        _opened(fails)


def test_signal_that_interrupts_the_function_passes_through() -> None:
    def handler(*_: object) -> None:
        raise _SoftLimit

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(_SoftLimit):
            _clients(lambda: signal.raise_signal(signal.SIGUSR1)).get()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("kind", [SdkError, KeyboardInterrupt])
def test_client_of_an_opening_that_fails_is_closed(kind: type[BaseException]) -> None:
    sdk = Sdk()
    sdk.fault = _raising(kind)
    clients = _clients(None, lambda: sdk)
    with pytest.raises((errors.SignerUnavailable, KeyboardInterrupt)):
        CloudBackend("k", clients, 10.0)
    assert sdk.closed


def test_client_of_a_generation_that_fails_is_closed() -> None:
    sdk = Sdk()

    def generate() -> None:
        with remote.client_for(_clients(None, lambda: sdk), 60.0) as (client, until):
            assert client.sdk is sdk
            assert 50 < until - time.monotonic() <= 60
            raise errors.KeyExistsError("exists")

    with pytest.raises(errors.KeyExistsError):
        generate()
    assert sdk.closed


def test_credentials_that_are_not_found_in_time_end_the_opening() -> None:
    found = threading.Event()

    def make() -> Sdk:
        found.wait(30)
        return Sdk()

    started = time.monotonic()
    try:
        with pytest.raises(errors.SignerTimeout):
            CloudBackend("k", _clients(None, make), 0.1)
        with pytest.raises(errors.SignerTimeout), remote.client_for(_clients(None, make), 0.1):
            pass
        assert time.monotonic() - started < 5.0
    finally:
        found.set()
    for thread in threading.enumerate():
        if thread.name == "d1-signer-call":
            thread.join(10)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("given", "told"),
    [(None, b"signed anew"), (Sdk, b"signed anew"), (Sdk(), b"configuration")],
    ids=["own", "function", "object"],
)
def test_client_of_the_parent_is_neither_used_nor_closed_in_a_forked_child(
    given: Any, told: bytes
) -> None:
    backend = _opened(given)
    parents = _sdk(backend)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            backend.sign_digest(bytes(32), None)
            backend.close()
            anew = _sdk(backend) is not parents and not parents.closed
            os.write(writer, b"signed anew" if anew else b"the parent's")
        except errors.D1SignerError as error:
            os.write(writer, error.code.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == told
    os.close(reader)
    os.close(writer)
    backend.close()


# -- the key --------------------------------------------------------------------------------------


def test_opening_is_logged_by_the_backends_own_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = _opened()
    (record,) = caplog.records
    assert record.name == __name__
    assert record.getMessage() == (
        f"cloud.opened key=k version=3 thumbprint={backend.public_key().thumbprint()}"
    )
    assert repr(backend) == "<CloudBackend k>"


def test_closed_key_asks_for_nothing(backend: CloudBackend) -> None:
    backend.close()
    for use in (lambda: backend.sign_digest(bytes(32), None), backend.custody):
        with pytest.raises(errors.SignerClosedError):
            use()
    assert _sdk(backend).asked == ["public_key"]


def test_deadline_shortens_the_time_limit_and_never_lengthens_it(backend: CloudBackend) -> None:
    soon, late = time.monotonic() + 1, time.monotonic() + 1000
    backend.sign_digest(bytes(32), soon)
    assert backend.until == soon
    for deadline in (late, None):
        backend.sign_digest(bytes(32), deadline)
        assert soon + 8 < backend.until < late


def test_facts_are_plain_values() -> None:
    day = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    told = {"flag": True, "count": 3, "name": "n", "missing": None, "made": day}
    facts = {fact.name: fact for fact in remote.facts_of("a source", told)}
    assert {name: fact.value for name, fact in facts.items()} == {**told, "made": str(day)}
    assert {fact.source for fact in facts.values()} == {"a source"}


class Stop(BaseException):
    """What a signal's handler raises."""


def test_an_interrupted_call_leaves_its_request_in_no_frame(leak_watch: LeakWatch) -> None:
    leak_watch.note(TOKEN)

    def send() -> None:
        # A local variable, as of an SDK; this function counts as the test's, so it is looked for.
        headers = {"X-Token": TOKEN}
        raise Stop(len(headers))

    with pytest.raises(Stop) as caught:
        CLOUD.ask("to sign", send)
    entries = traceback.walk_tb(caught.value.__traceback__)
    held = {frame.f_code.co_name: dict(frame.f_locals) for frame, _ in entries}
    assert held["send"] == {}
    assert "ask" not in held

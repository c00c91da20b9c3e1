# SPDX-License-Identifier: Apache-2.0
"""Google Cloud KMS: what is refused, what is asked for, and what a failure says."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceRestTransport,
)

from d1_signer import errors
from d1_signer.backends.gcp_kms import GcpKmsBackend
from d1_signer.custody.evidence import Assurance
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.transport.processes import fork_gate
from tests.servers import gcp
from tests.servers.certificates import self_signed
from tests.servers.fault_proxy import listening, tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def running() -> Iterator[gcp.Gcp]:
    with gcp.cloud_kms() as server:
        yield server


@pytest.fixture
def server(running: gcp.Gcp) -> Iterator[gcp.Gcp]:
    yield running
    running.tell(faults={}, release=True)


@pytest.fixture(scope="module")
def client(running: gcp.Gcp) -> kms.KeyManagementServiceClient:
    return running.client()


@pytest.fixture
def signer(server: gcp.Gcp, client: kms.KeyManagementServiceClient) -> Iterator[Signer]:
    assert server.calls() is not None
    with open_signer(f"gcpkms://{gcp.VERSION}", client=client) as opened:
        yield opened


# -- naming a key ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "gcpkms:",
        "gcpkms://projects/p",
        f"gcpkms:///{gcp.VERSION}",
        f"gcpkms://{gcp.KEY}/",
        f"gcpkms://{gcp.KEY}/cryptoKeyVersions/0",
        f"gcpkms://{gcp.KEY}/cryptoKeyVersions/latest",
        f"gcpkms://{gcp.VERSION}?region=x",
        f"gcpkms://{gcp.KEY}%2Fx",
    ],
)
def test_bad_uri_is_refused(uri: str) -> None:
    with pytest.raises(errors.KeyUriError):
        open_signer(uri)


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint": "https://kms.example.com"},
        {"proxy": "https://127.0.0.1:1"},
        {"proxy": "127.0.0.1:1"},
        {"proxy": "http://u:p@127.0.0.1:1"},
    ],
)
def test_bad_endpoint_or_proxy_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_signer(f"gcpkms://{gcp.VERSION}", **options)


def test_newest_enabled_version_is_taken_and_named(
    server: gcp.Gcp, client: kms.KeyManagementServiceClient
) -> None:
    # 10 is newer than 9, 11 is disabled, 12 is of another algorithm.
    with open_signer(f"gcpkms://{gcp.KEY}", client=client) as signer:
        assert signer.custody().evidence.location == f"gcpkms://{gcp.VERSION}"
        assert isinstance(signer._backend, GcpKmsBackend)
        assert signer._backend.version == gcp.VERSION
        server.tell(state=[f"{gcp.KEY}/cryptoKeyVersions/11", "ENABLED"])
        try:
            signer.public_key.verify(signer.sign(b"m"), b"m")
            assert signer.custody().evidence.location == f"gcpkms://{gcp.VERSION}"
        finally:
            server.tell(state=[f"{gcp.KEY}/cryptoKeyVersions/11", "DISABLED"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nobody/cryptoKeyVersions/1", errors.KeyNotFoundError),
        ("nobody", errors.KeyNotFoundError),
        ("off", errors.KeyNotFoundError),
        ("p384", errors.KeyNotFoundError),
        ("p384/cryptoKeyVersions/1", errors.InvalidKeyError),
        ("off/cryptoKeyVersions/1", errors.KeyDisabledError),
        ("gone/cryptoKeyVersions/1", errors.KeyDisabledError),
    ],
)
def test_unusable_key_is_refused(
    client: kms.KeyManagementServiceClient, name: str, error: type[errors.D1SignerError]
) -> None:
    with pytest.raises(error) as refused:
        open_signer(f"gcpkms://{gcp.RING}/cryptoKeys/{name}", client=client)
    assert refused.value.hint


def test_version_that_is_disabled_under_way(server: gcp.Gcp, signer: Signer) -> None:
    server.tell(state=[gcp.VERSION, "DISABLED"])
    with pytest.raises(errors.KeyDisabledError) as refused:
        signer.sign(b"m")
    assert refused.value.details["grpc_status"] == "FAILED_PRECONDITION"
    server.tell(state=[gcp.VERSION, "ENABLED"])
    signer.public_key.verify(signer.sign(b"m"), b"m")


# -- answers that went wrong ----------------------------------------------------------------------

_INTEGRITY = (errors.IntegrityError, True)
_SIGNATURE = (errors.InvalidSignatureError, False)
FAULTS = {
    "unverified": _INTEGRITY,
    "name": _INTEGRITY,
    "no_name": _INTEGRITY,
    "crc": _INTEGRITY,
    "no_crc": _INTEGRITY,
    "level": _INTEGRITY,
    "flipped": _INTEGRITY,
    "truncated": _SIGNATURE,
    "empty": _SIGNATURE,
    "tampered": _SIGNATURE,
    "other_key": _SIGNATURE,
    "other_digest": _SIGNATURE,
    "INVALID_ARGUMENT:The checksum in field digest_crc32c did not match": _INTEGRITY,
    "INVALID_ARGUMENT:wrong purpose": (errors.InvalidKeyError, False),
    "NOT_FOUND:gone": (errors.KeyNotFoundError, False),
    "PERMISSION_DENIED:no useToSign": (errors.AccessDeniedError, False),
    "UNAUTHENTICATED:expired": (errors.LoginError, False),
    "UNAVAILABLE:Getting metadata from plugin failed with error: x": (errors.LoginError, True),
    "RESOURCE_EXHAUSTED:quota": (errors.SignerThrottled, True),
    "DEADLINE_EXCEEDED:slow": (errors.SignerTimeout, True),
    "INTERNAL:oops": (errors.SignerUnavailable, True),
    "UNKNOWN:oops": (errors.SignerUnavailable, True),
    "DATA_LOSS:oops": (errors.SignerUnavailable, True),
    "ABORTED:oops": (errors.SignerUnavailable, True),
    "CANCELLED:oops": (errors.SignerUnavailable, True),
    "UNIMPLEMENTED:oops": (errors.ConfigurationError, False),
    "OUT_OF_RANGE:oops": (errors.InvalidKeyError, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_with_our_own_error(server: gcp.Gcp, signer: Signer, fault: str) -> None:
    error, retryable = FAULTS[fault]
    server.faults(AsymmetricSign=["always", fault])
    with pytest.raises(error) as refused:
        signer.sign(b"m")
    assert type(refused.value) is error
    assert refused.value.retryable is retryable
    assert refused.value.hint or error is errors.InvalidSignatureError
    context = type(refused.value.__context__).__module__.partition(".")[0]
    assert context not in {"google", "grpc"}
    status, colon, _ = fault.partition(":")
    if colon:
        assert refused.value.details["grpc_status"] == status
    server.faults()
    signer.public_key.verify(signer.sign(b"m"), b"m")


def test_every_fault_of_the_server_is_tried() -> None:
    assert set(gcp.SIGN_FAULTS) <= set(FAULTS)


@pytest.mark.parametrize("fault", gcp.KEY_FAULTS)
def test_altered_public_key_is_refused(
    server: gcp.Gcp, client: kms.KeyManagementServiceClient, fault: str
) -> None:
    server.faults(GetPublicKey=[fault])
    with pytest.raises(errors.IntegrityError):
        open_signer(f"gcpkms://{gcp.VERSION}", client=client)


# -- calls, time, threads -------------------------------------------------------------------------


def _asked(server: gcp.Gcp, since: dict[str, int]) -> dict[str, int]:
    now = server.calls()
    return {name: now[name] - since.get(name, 0) for name in now if now[name] != since.get(name, 0)}


def test_one_call_for_each_signature_and_no_metadata(
    server: gcp.Gcp, client: kms.KeyManagementServiceClient
) -> None:
    before = server.calls()
    with open_signer(f"gcpkms://{gcp.VERSION}", client=client) as signer:
        assert _asked(server, before) == {"GetPublicKey": 1}
        for _ in range(25):
            signer.sign(b"m")
        assert _asked(server, before) == {"GetPublicKey": 1, "AsymmetricSign": 25}
        signer.custody()
        signer.custody()
        assert _asked(server, before)["GetCryptoKeyVersion"] == 1


def test_unavailable_service_is_asked_again_and_others_are_not(
    server: gcp.Gcp, signer: Signer
) -> None:
    before = server.calls()
    server.faults(AsymmetricSign=["UNAVAILABLE:x", "UNAVAILABLE:x"])
    signer.public_key.verify(signer.sign(b"m"), b"m")
    assert _asked(server, before) == {"AsymmetricSign": 3}
    for fault in ("RESOURCE_EXHAUSTED:x", "PERMISSION_DENIED:x", "crc"):
        before = server.calls()
        server.faults(AsymmetricSign=[fault])
        with pytest.raises(errors.SignerError):
            signer.sign(b"m")
        assert _asked(server, before) == {"AsymmetricSign": 1}


def test_deadline_bounds_a_slow_answer(server: gcp.Gcp, signer: Signer) -> None:
    server.faults(AsymmetricSign=["hold"])
    started = time.monotonic()
    with pytest.raises(errors.SignerTimeout):
        signer.sign(b"m", timeout=0.2)
    assert time.monotonic() - started < 2.0
    server.tell(release=True)


@pytest.mark.stress
def test_deadline_holds_while_a_fork_is_waited_for(signer: Signer) -> None:
    fork_gate._before_fork()
    try:
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m", timeout=0.2)
        assert time.monotonic() - started < 2.0
    finally:
        fork_gate._after_fork_in_parent()
    signer.public_key.verify(signer.sign(b"m"), b"m")


def test_call_waits_for_every_fork_under_way(server: gcp.Gcp, signer: Signer) -> None:
    before = server.calls()
    # As when two threads fork at once.
    fork_gate._before_fork()
    fork_gate._before_fork()
    fork_gate._after_fork_in_parent()
    try:
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m", timeout=0.1)
        assert _asked(server, before) == {}
    finally:
        fork_gate._after_fork_in_parent()
    signer.public_key.verify(signer.sign(b"m"), b"m")


def test_time_limit_bounds_all_attempts_together(
    server: gcp.Gcp, client: kms.KeyManagementServiceClient
) -> None:
    with open_signer(f"gcpkms://{gcp.VERSION}", client=client, timeout=1.0) as signer:
        server.faults(AsymmetricSign=["UNAVAILABLE:x", "hold"])
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m")
        assert time.monotonic() - started < 4.0
        server.tell(release=True)


def test_server_that_is_gone_is_unavailable_within_the_limit() -> None:
    with gcp.cloud_kms() as server:
        signer = open_signer(f"gcpkms://{gcp.VERSION}", client=server.client, timeout=1.0)
    started = time.monotonic()
    with pytest.raises(errors.SignerUnavailable):
        signer.sign(b"m")
    assert time.monotonic() - started < 3.0
    signer.close()


def test_rest_client_is_bounded_too() -> None:
    # Nobody answers HTTP/1.1 on this port in time: it is a listening socket and no more.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        transport = KeyManagementServiceRestTransport(
            host=f"127.0.0.1:{silent.getsockname()[1]}",
            credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
            url_scheme="http",
        )
        rest = kms.KeyManagementServiceClient(transport=transport)
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            open_signer(f"gcpkms://{gcp.VERSION}", client=rest, timeout=0.2)
        assert time.monotonic() - started < 3.0
    for thread in threading.enumerate():
        if thread.name == "d1-signer-call":
            thread.join(10)


def test_32_threads(signer: Signer) -> None:
    def work(number: int) -> None:
        message = str(number).encode()
        signer.public_key.verify(signer.sign(message), message)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(320)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_given_client_is_not_used_in_a_forked_child_and_not_closed(
    signer: Signer, client: kms.KeyManagementServiceClient
) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signer.sign(b"m")
        except errors.D1SignerError as error:
            os.write(writer, error.code.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"configuration"
    os.close(reader)
    os.close(writer)
    signer.close()
    client.get_public_key(name=gcp.VERSION)


# -- credentials and endpoint, as a user has them -------------------------------------------------

_PROGRAM = """
import sys, certifi
certifi.where = lambda: sys.argv[2]
from d1_signer.errors import SignerUnavailable
from d1_signer.signing.opening import open_signer
try:
    signer = open_signer(sys.argv[1], timeout=30)
except SignerUnavailable as error:
    sys.exit(error.code)
signer.public_key.verify(signer.sign(b"m"), b"m")
print(signer.custody().evidence.location)
"""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[gcp.Gcp, Path, Path]]:
    """A server over TLS, its certificate, and default credentials."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = self_signed(directory)
    with gcp.cloud_kms(certificate, key) as server:
        yield server, certificate, gcp.service_account(directory)


def _ran(uri: str, authorities: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, uri, authorities],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


def test_proxy_and_authorities_of_the_environment_are_not_used(
    tls: tuple[gcp.Gcp, Path, Path],
) -> None:
    server, certificate, account = tls
    uri = f"gcpkms://{gcp.VERSION}?endpoint=localhost:{server.tls_port}"
    reached: list[bytes] = []
    with listening(lambda connection: reached.append(connection.recv(65536))) as port:
        proxies = dict.fromkeys(
            ("grpc_proxy", "https_proxy", "http_proxy"), f"http://127.0.0.1:{port}"
        )
        environment = {
            "GOOGLE_APPLICATION_CREDENTIALS": str(account),
            "GRPC_ADDRESS_HTTP_PROXY": f"127.0.0.1:{port}",
            "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "0.0.0.0/0,::/0",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate),
            **proxies,
        }
        ran = _ran(uri, certifi.where(), **environment)
        assert "signer_unavailable" in ran.stderr, ran.stderr
        ran = _ran(uri, str(certificate), **environment)
        assert ran.stdout == f"gcpkms://{gcp.VERSION}\n", ran.stderr
    assert not reached


@pytest.fixture
def own_client(
    tls: tuple[gcp.Gcp, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[gcp.Gcp, str]:
    """The server, and the URI of a key that is opened with a client of our own."""
    server, certificate, account = tls
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))
    return server, f"gcpkms://{gcp.VERSION}?endpoint=localhost:{server.tls_port}"


def test_own_client_has_default_credentials_and_is_closed(own_client: tuple[gcp.Gcp, str]) -> None:
    server, uri = own_client
    with open_signer(uri) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")
        assert "authorization" in server.tell()["metadata"]
        assert isinstance(signer._backend, GcpKmsBackend)
        client = signer._backend._clients.made_here()
    assert client is not None
    with pytest.raises(ValueError, match="closed channel"):
        client.through(None).get_public_key(name=gcp.VERSION)


def test_proxy_is_used_where_it_is_named(own_client: tuple[gcp.Gcp, str]) -> None:
    server, uri = own_client
    with tunnel() as (port, asked):
        with open_signer(f"{uri}&proxy=http://127.0.0.1:{port}") as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
        assert [line.split()[1] for line in asked] == [f"localhost:{server.tls_port}"]


def test_no_credentials_is_a_login_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(errors.LoginError):
        open_signer(f"gcpkms://{gcp.VERSION}")


# -- custody, making keys -------------------------------------------------------------------------


def test_statement_that_cannot_be_verified_is_a_claim(signer: Signer) -> None:
    evidence = signer.custody().evidence
    facts = {fact.name: fact for fact in evidence.facts}
    assert facts["protectionLevel"].value == "HSM"
    assert facts["attestation.format"].value == "CAVIUM_V2_COMPRESSED"
    content = facts["attestation.content"]
    assert base64.b64decode(str(content.value)) == b"signed by the HSM"
    assert str(facts["marvell statement"].value).startswith("not verified: ")
    assert {fact.assurance for fact in evidence.facts} == {Assurance.CLAIMED}
    CustodyPolicy(non_exportable=True, generated_in_place=True, hardware=True).check(evidence)
    with pytest.raises(errors.CustodyError, match="it is only claimed"):
        CustodyPolicy(hardware=Assurance.ATTESTED).check(evidence)


@pytest.mark.parametrize("fault", gcp.VERSION_FAULTS)
def test_altered_description_is_no_evidence(server: gcp.Gcp, signer: Signer, fault: str) -> None:
    server.faults(GetCryptoKeyVersion=[fault])
    with pytest.raises(errors.IntegrityError) as refused:
        signer.custody()
    assert refused.value.details["field"] == fault
    assert signer.custody().evidence.hardware


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("soft", (False, True, False)),
        ("imported", (None, False, True)),
        ("outside", (None, None, None)),
    ],
)
def test_custody_of_other_protection_levels(
    client: kms.KeyManagementServiceClient, name: str, answers: tuple[bool | None, ...]
) -> None:
    uri = f"gcpkms://{gcp.RING}/cryptoKeys/{name}/cryptoKeyVersions/1"
    with open_signer(uri, client=client) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")
        evidence = signer.custody().evidence
    assert (evidence.exportable, evidence.generated_in_place, evidence.hardware) == answers
    if name == "soft":
        assert not [fact for fact in evidence.facts if fact.assurance is Assurance.ATTESTED]
    with pytest.raises(errors.CustodyError):
        CustodyPolicy(non_exportable=True, hardware=True).check(evidence)


def test_generated_key_signs_and_is_never_overwritten(
    client: kms.KeyManagementServiceClient,
) -> None:
    uri = f"gcpkms://{gcp.RING}/cryptoKeys/made"
    made = generate_key(uri, client=client)
    assert made.uri == f"{uri}/cryptoKeyVersions/1"
    with open_signer(made.uri, client=client) as signer:
        assert signer.public_key == made.public_key
        signer.public_key.verify(signer.sign(b"m"), b"m")
        CustodyPolicy(hardware=True).check(signer.custody().evidence)
    with pytest.raises(errors.KeyExistsError):
        generate_key(uri, client=client)
    with pytest.raises(errors.KeyUriError):
        generate_key(made.uri, client=client)
    with pytest.raises(errors.ConfigurationError):
        generate_key(f"{uri}-2", client=client, protection_level="PAPER")

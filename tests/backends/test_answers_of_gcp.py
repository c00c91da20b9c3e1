# SPDX-License-Identifier: Apache-2.0
"""Every status of Cloud KMS: our code, and what the page says of it; making a key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import grpc
import pytest
from google.api_core import exceptions as sdk
from google.cloud import kms_v1 as kms
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from d1_signer import errors
from d1_signer.backends.gcp_kms.failures import CLOUD_KMS, REASONS, STATES, STATUSES, this_call
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from tests.servers import gcp
from tests.servers.certificates import self_signed
from tests.servers.fault_proxy import listening

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cloud" / "gcp.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[gcp.Gcp, Path]]:
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"))
    with gcp.cloud_kms(certificate, key) as server:
        yield server, certificate


@pytest.fixture
def server(running: tuple[gcp.Gcp, Path]) -> Iterator[gcp.Gcp]:
    yield running[0]
    running[0].tell(faults={}, release=True)


@pytest.fixture
def uri(running: tuple[gcp.Gcp, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A key, opened with a client of our own."""
    account = gcp.service_account(tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))
    server, certificate = running
    return f"gcpkms://{gcp.VERSION}?endpoint=localhost:{server.tls_port}&ca_file={certificate}"


@pytest.fixture
def signer(server: gcp.Gcp, uri: str) -> Iterator[Signer]:
    assert server.port
    with open_signer(uri, timeout=30) as opened:
        yield opened


def _rows(title: str) -> dict[str, list[str]]:
    section = PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


# -- the page -------------------------------------------------------------------------------------


def test_page_and_table_have_every_status() -> None:
    assert set(STATUSES) == {status.name for status in grpc.StatusCode} - {"OK"}
    assert _rows("By status") == {
        name: [f"`{kind.code}`", "yes" if kind.default_retryable else "no", hint]
        for name, (kind, hint) in STATUSES.items()
    }


def test_page_and_table_have_every_state() -> None:
    states = set(kms.CryptoKeyVersion.CryptoKeyVersionState.__members__)
    unusable = states - {"ENABLED", "CRYPTO_KEY_VERSION_STATE_UNSPECIFIED"}
    assert set(STATES) == unusable
    wanted = {name: ["yes" if passes else "no", hint] for name, (hint, passes) in STATES.items()}
    assert _rows("States of a version") == wanted


def test_page_has_every_reason() -> None:
    assert _rows("Why permission is denied") == {name: [hint] for name, hint in REASONS.items()}


# -- what arrives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_told_with_phase_and_endpoint(
    status: str, server: gcp.Gcp, signer: Signer
) -> None:
    kind, hint = STATUSES[status]
    server.faults(AsymmetricSign=["always", f"{status}:told so"])
    with pytest.raises(kind) as refused:
        signer.sign(b"m", timeout=20)
    error = refused.value
    assert type(error) is kind
    assert (error.retryable, error.hint) == (kind.default_retryable, hint)
    assert f'{status} "told so"' in error.message
    assert error.details["phase"] == "signature"
    assert error.details["endpoint"] == f"localhost:{server.tls_port}"
    assert error.details["grpc_status"] == status


def test_phase_of_the_opening_is_the_look_up(server: gcp.Gcp, uri: str) -> None:
    server.faults(GetPublicKey=["PERMISSION_DENIED:no viewPublicKey"])
    with pytest.raises(errors.AccessDeniedError) as refused:
        open_signer(uri, timeout=30)
    assert refused.value.details["phase"] == "look-up"


@pytest.mark.parametrize("state", STATES)
def test_states_are_told_by_their_own_word(state: str, server: gcp.Gcp, signer: Signer) -> None:
    server.tell(state=[gcp.VERSION, state])
    try:
        with pytest.raises(errors.KeyDisabledError, match=state) as refused:
            signer.sign(b"m", timeout=20)
    finally:
        server.tell(state=[gcp.VERSION, "ENABLED"])
    assert (refused.value.hint, refused.value.retryable) == STATES[state]


@pytest.mark.parametrize("reason", REASONS)
def test_reason_and_request_id_of_a_refusal(reason: str) -> None:
    def refuse() -> None:
        raise sdk.PermissionDenied(  # type: ignore[no-untyped-call]
            "no",
            error_info=error_details_pb2.ErrorInfo(reason=reason),
            details=[error_details_pb2.RequestInfo(request_id="request-17")],
        )

    with pytest.raises(errors.AccessDeniedError) as refused:
        CLOUD_KMS.ask("to sign", refuse)
    assert refused.value.hint == REASONS[reason]
    assert refused.value.details["reason"] == reason
    assert refused.value.details["request_id"] == "request-17"


def test_a_refusal_that_says_nothing_is_told_by_its_status_alone() -> None:
    def refuse() -> None:
        raise sdk.PermissionDenied("")  # type: ignore[no-untyped-call]

    with pytest.raises(errors.AccessDeniedError) as refused:
        CLOUD_KMS.ask("to sign", refuse)
    assert "PERMISSION_DENIED" in refused.value.message
    assert '"' not in refused.value.message


@pytest.mark.parametrize("status", ["PERMISSION_DENIED", "UNAVAILABLE", "INVALID_ARGUMENT"])
def test_text_of_the_service_is_quoted_short_and_without_our_token(
    status: str, server: gcp.Gcp, signer: Signer
) -> None:
    (token,) = server.tell()["tokens"][-1:]
    text = f"\x1b[31mFORGED LINE\n{token} {token[:40]} " + "long " * 2000
    server.faults(AsymmetricSign=["always", f"{status}:{text}"])
    with pytest.raises(errors.SignerError) as refused:
        signer.sign(b"m", timeout=20)
    told = json.dumps(refused.value.to_dict())
    assert token[:20] not in told
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


# -- what does not arrive -------------------------------------------------------------------------


def test_authority_of_ones_own(uri: str, tmp_path: Path) -> None:
    bare, _, certificate = uri.rpartition("&ca_file=")
    with pytest.raises(errors.SignerUnavailable, match="ca_file") as refused:
        open_signer(bare, timeout=20)
    assert not refused.value.retryable
    with open_signer(bare, ca_file=certificate, timeout=20) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")
    open_signer(f"{bare}&ca-file={certificate}", timeout=20).close()
    with pytest.raises(errors.ConfigurationError, match="CA file for Cloud KMS"):
        open_signer(bare, ca_file=str(tmp_path / "none.pem"))
    assert certifi.where() != certificate


@pytest.mark.parametrize(("status", "retryable"), [("407 Password", False), ("403 No", False)])
def test_proxy_that_refuses_is_named(uri: str, status: str, retryable: bool) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    with listening(serve) as port:
        proxy = f"http://127.0.0.1:{port}"
        with pytest.raises(
            errors.SignerUnavailable, match=f"the proxy 127.0.0.1:{port}"
        ) as refused:
            open_signer(uri, proxy=proxy, timeout=10)
    assert refused.value.retryable is retryable


def test_unreached_endpoint_is_told(uri: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(errors.SignerUnavailable, match="could not be asked") as refused:
        open_signer(uri, endpoint=f"127.0.0.1:{port}", timeout=5)
    assert refused.value.retryable
    assert refused.value.details["endpoint"] == f"127.0.0.1:{port}"


# -- making a key ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {"GetCryptoKeyVersion": ["NOT_FOUND:x", "NOT_FOUND:x"]},
        {"GetCryptoKeyVersion": ["UNAVAILABLE:x"] * 4},
        {"GetPublicKey": ["NOT_FOUND:x", "FAILED_PRECONDITION:key is not enabled"]},
        {"GetPublicKey": ["INTERNAL:x"]},
    ],
    ids=str,
)
def test_new_key_that_is_not_known_yet_is_asked_for_again(
    faults: dict[str, Any], server: gcp.Gcp, uri: str
) -> None:
    query = uri.partition("?")[2]
    name = f"again-{abs(hash(str(faults)))}"
    server.faults(**faults)
    made = generate_key(f"gcpkms://{gcp.RING}/cryptoKeys/{name}?{query}")
    with open_signer(made.uri, timeout=30) as signer:
        assert signer.public_key == made.public_key
        signer.public_key.verify(signer.sign(b"m"), b"m")


@pytest.mark.parametrize("fault", ["UNAVAILABLE:x", "INTERNAL:x", "DEADLINE_EXCEEDED:x"])
def test_key_whose_making_was_not_answered_is_named_and_not_asked_for_twice(
    fault: str, server: gcp.Gcp, uri: str
) -> None:
    before = server.calls().get("CreateCryptoKey", 0)
    server.faults(CreateCryptoKey=[fault])
    query = uri.partition("?")[2]
    with pytest.raises(errors.SignerUnavailable, match="may have made") as refused:
        generate_key(f"gcpkms://{gcp.RING}/cryptoKeys/lost?{query}")
    assert refused.value.details["made"] == f"{gcp.RING}/cryptoKeys/lost"
    assert refused.value.details["phase"] == "generation"
    assert server.calls()["CreateCryptoKey"] == before + 1


def test_key_that_fails_after_it_was_made_is_named(server: gcp.Gcp, uri: str) -> None:
    server.faults(GetPublicKey=["always", "PERMISSION_DENIED:no viewPublicKey"])
    query = uri.partition("?")[2]
    with pytest.raises(errors.AccessDeniedError, match="was made") as refused:
        generate_key(f"gcpkms://{gcp.RING}/cryptoKeys/named?{query}")
    assert refused.value.details["made"] == f"{gcp.RING}/cryptoKeys/named/cryptoKeyVersions/1"


# -- forks ----------------------------------------------------------------------------------------


@pytest.mark.stress
@pytest.mark.parametrize("value", [None, "0", "1"])
def test_forks_under_load_with_each_value_of_grpcs_variable(
    value: str | None, server: gcp.Gcp
) -> None:
    environment = {} if value is None else {"GRPC_ENABLE_FORK_SUPPORT": value}
    ran = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.backends.forking"),
            *("40", f"gcpkms://{gcp.VERSION}", str(server.port)),
        ],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    if value == "0":
        assert ran.stdout.count("GRPC_ENABLE_FORK_SUPPORT is off") == 40, ran.stdout + ran.stderr
    else:
        assert "40 of 40 children signed, 0 threads failed" in ran.stdout, ran.stdout + ran.stderr


def test_no_proxy_is_told_where_there_is_none() -> None:
    def unreached() -> None:
        raise sdk.ServiceUnavailable("failed to connect")  # type: ignore[no-untyped-call]

    assert this_call.proxy is None
    with pytest.raises(errors.SignerUnavailable) as refused:
        CLOUD_KMS.ask("to sign", unreached)
    assert "proxy" not in f"{refused.value}{refused.value.hint}"
    assert refused.value.retryable

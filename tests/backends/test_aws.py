# SPDX-License-Identifier: Apache-2.0
"""AWS KMS: what is refused, what is asked for, and what a failure says."""

from __future__ import annotations

import base64
import datetime as dt
import json
import logging
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import boto3
import certifi
import pytest
from botocore.config import Config

from d1_signer import errors
from d1_signer.backends.aws_kms import AwsKmsBackend
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.transport.exchange import Answer, Http
from tests.servers import aws
from tests.servers.aws import answering, asking, calls, on_sign, with_signature
from tests.servers.certificates import self_signed
from tests.servers.fault_proxy import (
    TRICKLES,
    Fault,
    FaultProxy,
    drop,
    endless,
    listening,
    tls_in_front_of,
    tunnel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import LeakWatch


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws.Aws]:
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def key(endpoint: aws.Aws) -> str:
    return endpoint.make_key()


@pytest.fixture(scope="module")
def other_key(endpoint: aws.Aws) -> str:
    return endpoint.make_key()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, leak_watch: LeakWatch) -> None:
    for name, value in aws.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    leak_watch.note(aws.SECRET_KEY)
    leak_watch.note(aws.SESSION_TOKEN)


@pytest.fixture
def tls_endpoint(endpoint: aws.Aws, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port and certificate of a TLS listener before the endpoint."""
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with tls_in_front_of(endpoint.port, context) as port:
        yield port, certificate


@pytest.fixture
def proxy(endpoint: aws.Aws) -> Iterator[FaultProxy]:
    with endpoint.proxy() as running:
        yield running


@pytest.fixture
def signer(proxy: FaultProxy, key: str) -> Iterator[Signer]:
    # One attempt: pauses between attempts would only make the tests slow.
    with open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1) as opened:
        yield opened


# -- naming a key ---------------------------------------------------------------------------------


def test_every_way_to_name_a_key(endpoint: aws.Aws, key: str) -> None:
    client = endpoint.client()
    client.create_alias(AliasName="alias/named", TargetKeyId=key)
    names = [
        key,
        key.rpartition("/")[2],
        "alias/named",
        key.rpartition(":")[0] + ":alias/named",
    ]
    for name in names:
        with open_signer(f"awskms:///{name}?endpoint={endpoint.url}#kid-1") as signer:
            assert signer.kid == "kid-1"
            signer.public_key.verify(signer.sign(b"m"), b"m")
            assert signer.custody().evidence.location == f"awskms:///{key}"


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("awskms:", errors.KeyUriError),
        ("awskms:///", errors.KeyUriError),
        ("awskms://alias/d1", errors.KeyUriError),
        ("awskms:///alias/d1?secret=x", errors.KeyUriError),
        ("awskms:///alias/d 1", errors.KeyUriError),
        ("awskms:///arn:aws:s3:::bucket", errors.KeyUriError),
        ("awskms:///alias/d1?fips=1", errors.KeyUriError),
        ("awskms:///alias/d1?endpoint=http://kms.example.com", errors.ConfigurationError),
        ("awskms:///alias/d1?endpoint=ftp://127.0.0.1", errors.ConfigurationError),
        ("awskms:///alias/d1?endpoint=https://u:p@h", errors.ConfigurationError),
        ("awskms:///alias/d1?endpoint=https://h&fips=true", errors.ConfigurationError),
        ("awskms:///alias/d1?proxy=https://127.0.0.1:1", errors.ConfigurationError),
        ("awskms:///alias/d1?proxy=http://u:p@127.0.0.1:1", errors.ConfigurationError),
        ("awskms:///alias/d1?proxy=127.0.0.1:1", errors.ConfigurationError),
        (
            "awskms:///arn:aws:kms:us-east-1:111122223333:key/x?region=eu-west-1",
            errors.ConfigurationError,
        ),
        ("awskms:///alias/d1?profile=missing", errors.ConfigurationError),
    ],
)
def test_bad_settings_are_refused(uri: str, error: type[errors.D1SignerError]) -> None:
    with pytest.raises(error):
        open_signer(uri)


def test_no_region_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(errors.ConfigurationError, match="region"):
        open_signer("awskms:///alias/d1")


def test_no_credentials_is_a_login_error(
    monkeypatch: pytest.MonkeyPatch, endpoint: aws.Aws
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(errors.LoginError):
        open_signer(f"awskms:///alias/d1?endpoint={endpoint.url}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that would have been asked; nothing is sent."""
    urls: list[str] = []

    def look(_: Http, _method: str, url: str, **_options: object) -> Answer:
        urls.append(url)
        raise errors.SignerUnavailable("seen enough")

    monkeypatch.setattr(Http, "exchange", look)
    return urls


@pytest.mark.parametrize(
    ("query", "configured", "host"),
    [
        ("?fips=true", "false", "kms-fips"),
        ("", "true", "kms-fips"),
        ("", "false", "kms"),
        ("?fips=false", "true", "kms"),
    ],
)
def test_fips_endpoint_is_the_regions(
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    key: str,
    query: str,
    configured: str,
    host: str,
) -> None:
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", configured)
    with pytest.raises(errors.SignerUnavailable, match="seen enough"):
        open_signer(f"awskms:///{key}{query}")
    assert set(asked) == {f"https://{host}.eu-central-1.amazonaws.com/"}


# -- the environment does not redirect ------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS"])
def test_endpoint_of_the_environment_is_not_used(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], key: str, name: str
) -> None:
    monkeypatch.setenv(name, "http://kms.example.com")
    with pytest.raises(errors.SignerUnavailable, match="seen enough"):
        open_signer(f"awskms:///{key}")
    assert set(asked) == {"https://kms.eu-central-1.amazonaws.com/"}


def test_proxy_authorities_and_key_log_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls_endpoint: tuple[int, Path], key: str
) -> None:
    port, certificate = tls_endpoint
    keys = tmp_path / "session-keys"
    keys.touch()
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    reached: list[bytes] = []
    with listening(lambda connection: reached.append(connection.recv(65536))) as other:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{other}")
        uri = f"awskms:///{key}?endpoint=https://localhost:{port}"
        with pytest.raises(errors.SignerUnavailable, match="TLS") as refused:
            open_signer(uri, max_attempts=1)
        assert not refused.value.retryable
        monkeypatch.setattr(certifi, "where", lambda: str(certificate))
        with open_signer(uri) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
    assert not reached
    # botocore makes the file, with a comment, for a sender that sends nothing.
    assert all(line.startswith("#") for line in keys.read_text().splitlines())


def test_handshake_that_breaks_off_may_succeed_later(key: str) -> None:
    with listening(drop) as port, pytest.raises(errors.SignerUnavailable, match="TLS") as refused:
        open_signer(f"awskms:///{key}", endpoint=f"https://127.0.0.1:{port}", max_attempts=1)
    assert refused.value.retryable


def test_proxy_is_used_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tls_endpoint: tuple[int, Path], key: str
) -> None:
    port, certificate = tls_endpoint
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    with tunnel() as (proxy, asked):
        uri = f"awskms:///{key}?endpoint=https://localhost:{port}&proxy=http://127.0.0.1:{proxy}"
        with open_signer(uri) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
    assert [line.rpartition(" ")[0] for line in asked] == [f"CONNECT localhost:{port}"]


# -- keys that are refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"KeySpec": "ECC_NIST_P384"},
        {"KeySpec": "ECC_SECG_P256K1"},
        {"KeySpec": "RSA_2048"},
        {"KeySpec": "ECC_NIST_P256", "KeyUsage": "KEY_AGREEMENT"},
        {"KeySpec": "SYMMETRIC_DEFAULT", "KeyUsage": "ENCRYPT_DECRYPT"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_key_of_another_kind_is_refused(endpoint: aws.Aws, settings: dict[str, str]) -> None:
    arn = endpoint.make_key(**settings)
    with pytest.raises(errors.InvalidKeyError):
        open_signer(f"awskms:///{arn}?endpoint={endpoint.url}")


def test_curve_is_read_from_the_key_itself(proxy: FaultProxy, endpoint: aws.Aws, key: str) -> None:
    # A description that says P-256 about a secp256k1 key, which signs under the same algorithm.
    koblitz = endpoint.make_key(KeySpec="ECC_SECG_P256K1")
    der = endpoint.client().get_public_key(KeyId=koblitz)["PublicKey"]

    def exchange(told: dict[str, Any]) -> None:
        if "PublicKey" in told:
            told["PublicKey"] = base64.b64encode(der).decode()

    proxy.fault = answering(exchange)
    with pytest.raises(errors.InvalidKeyError, match="secp256k1"):
        open_signer(f"awskms:///{key}?endpoint={proxy.url}")


def test_disabled_key_is_refused_at_opening_and_when_signing(endpoint: aws.Aws) -> None:
    client, arn = endpoint.client(), endpoint.make_key()
    uri = f"awskms:///{arn}?endpoint={endpoint.url}"
    with open_signer(uri) as signer:
        client.disable_key(KeyId=arn)
        with pytest.raises(errors.KeyDisabledError) as refused:
            signer.sign(b"m")
        assert refused.value.details["aws_code"] == "DisabledException"
        with pytest.raises(errors.KeyDisabledError, match="Disabled"):
            open_signer(uri)
        client.enable_key(KeyId=arn)
        signer.public_key.verify(signer.sign(b"m"), b"m")
        client.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
        with pytest.raises(errors.KeyDisabledError) as refused:
            signer.sign(b"m")
        assert refused.value.details["aws_code"] == "KMSInvalidStateException"
        with pytest.raises(errors.KeyDisabledError, match="PendingDeletion"):
            open_signer(uri)


def test_unknown_key_is_not_found(endpoint: aws.Aws) -> None:
    for name in ("alias/nobody", "00000000-0000-0000-0000-000000000000"):
        with pytest.raises(errors.KeyNotFoundError) as refused:
            open_signer(f"awskms:///{name}?endpoint={endpoint.url}")
        assert refused.value.details["aws_code"] == "NotFoundException"
        assert refused.value.details["request_id"]


# -- an alias that moves --------------------------------------------------------------------------


def test_re_pointed_alias_is_an_error_and_not_a_new_key(endpoint: aws.Aws) -> None:
    client, first, second = endpoint.client(), endpoint.make_key(), endpoint.make_key()
    client.create_alias(AliasName="alias/moving", TargetKeyId=first)
    with open_signer(f"awskms:///alias/moving?endpoint={endpoint.url}") as signer:
        pinned = signer.public_key
        client.update_alias(AliasName="alias/moving", TargetKeyId=second)
        for _ in range(2):
            with pytest.raises(errors.KeyMismatchError) as refused:
                signer.sign(b"m")
            assert first in str(refused.value)
            assert second in str(refused.value)
            assert not refused.value.retryable
        client.update_alias(AliasName="alias/moving", TargetKeyId=first)
        pinned.verify(signer.sign(b"m"), b"m")


def test_alias_that_moves_while_it_is_opened_is_an_error(
    proxy: FaultProxy, endpoint: aws.Aws
) -> None:
    client, first, second = endpoint.client(), endpoint.make_key(), endpoint.make_key()
    client.create_alias(AliasName="alias/just-now", TargetKeyId=first)

    def move(request: Any, forward: Any) -> Any:
        answer = forward(request)
        client.update_alias(AliasName="alias/just-now", TargetKeyId=second)
        return answer

    proxy.fault = move
    with pytest.raises(errors.KeyMismatchError):
        open_signer(f"awskms:///alias/just-now?endpoint={proxy.url}")


# -- answers that went wrong ----------------------------------------------------------------------

FAULTS: list[tuple[str, Fault, type[errors.D1SignerError], bool]] = [
    ("throttled", aws.refusal(400, "ThrottlingException"), errors.SignerThrottled, True),
    ("slow-down", aws.refusal(429, "Whatever"), errors.SignerThrottled, True),
    ("internal", aws.refusal(500, "KMSInternalException"), errors.SignerUnavailable, True),
    ("timeout", aws.refusal(503, "DependencyTimeoutException"), errors.SignerUnavailable, True),
    ("page-503", aws.page(503, b"<html>maintenance</html>"), errors.SignerUnavailable, True),
    ("page-200", aws.page(200, b"<html>log in</html>"), errors.IntegrityError, True),
    ("empty-200", aws.page(200, b""), errors.IntegrityError, True),
    ("denied", aws.refusal(400, "AccessDeniedException"), errors.AccessDeniedError, False),
    ("expired", aws.refusal(400, "ExpiredTokenException"), errors.LoginError, False),
    ("unknown", aws.refusal(400, "UnrecognizedClientException"), errors.LoginError, False),
    ("skewed", aws.refusal(400, "InvalidSignatureException"), errors.LoginError, False),
    ("kind", aws.refusal(400, "InvalidKeyUsageException"), errors.InvalidKeyError, False),
    ("validation", aws.refusal(400, "ValidationException"), errors.SignerError, False),
    ("new-code", aws.refusal(400, "InventedTomorrowException"), errors.SignerError, False),
    ("dropped", aws.dropped, errors.SignerUnavailable, True),
    ("cut-short", aws.cut_short, errors.SignerUnavailable, True),
    ("truncated", with_signature(lambda der: der[:-7]), errors.InvalidSignatureError, False),
    ("trailing", with_signature(lambda der: der + b"\0"), errors.InvalidSignatureError, False),
    ("raw", with_signature(lambda _: b"\1" * 64), errors.InvalidSignatureError, False),
    ("no-bytes", with_signature(lambda _: b""), errors.InvalidSignatureError, False),
    ("flipped", with_signature(lambda der: der[:-1] + bytes((der[-1] ^ 1,))),
     errors.InvalidSignatureError, False),
    ("digest", asking(Message="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
     errors.InvalidSignatureError, False),
    ("no-signature", answering(lambda told: told.pop("Signature")), errors.IntegrityError, True),
    ("not-base64", answering(lambda told: told.update(Signature="!")),
     errors.InvalidSignatureError, False),
    ("no-key", answering(lambda told: told.pop("KeyId")), errors.IntegrityError, True),
    ("algorithm", answering(lambda told: told.update(SigningAlgorithm="ECDSA_SHA_384")),
     errors.IntegrityError, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "error", "retryable"),
    [pytest.param(*rest, id=name) for name, *rest in FAULTS],
)
def test_fault_is_refused_with_our_own_error(
    signer: Signer,
    proxy: FaultProxy,
    fault: Fault,
    error: type[errors.D1SignerError],
    retryable: bool,
) -> None:
    proxy.fault = on_sign(fault)
    with pytest.raises(error) as refused:
        signer.sign(b"m")
    assert type(refused.value) is error
    assert refused.value.retryable is retryable
    assert refused.value.hint or error is errors.InvalidSignatureError
    context = refused.value.__context__
    assert type(context).__module__.partition(".")[0] not in {"botocore", "urllib3"}
    for secret in (aws.SECRET_KEY, aws.SESSION_TOKEN):
        assert secret not in str(refused.value)
    proxy.fault = None
    signer.public_key.verify(signer.sign(b"m"), b"m")


def test_signature_by_another_key_is_refused(
    signer: Signer, proxy: FaultProxy, other_key: str
) -> None:
    proxy.fault = on_sign(asking(KeyId=other_key))
    with pytest.raises(errors.InvalidSignatureError):
        signer.sign(b"m")
    proxy.fault = on_sign(answering(lambda told: told.update(KeyId=other_key)))
    with pytest.raises(errors.KeyMismatchError):
        signer.sign(b"m")


def test_refusal_keeps_code_and_request_id_and_drops_what_quotes_the_request(
    signer: Signer, proxy: FaultProxy
) -> None:
    quoted = f"The canonical string should have been x-amz-security-token:{aws.SESSION_TOKEN}"
    proxy.fault = on_sign(aws.refusal(400, "InvalidSignatureException", quoted))
    with pytest.raises(errors.LoginError) as refused:
        signer.sign(b"m")
    assert refused.value.details == {
        "phase": "signature",
        "endpoint": proxy.url,
        "aws_code": "InvalidSignatureException",
        "request_id": "request-17",
        "status": 400,
    }
    assert aws.SESSION_TOKEN not in repr(refused.value.to_dict())
    proxy.fault = on_sign(aws.refusal(400, "AccessDeniedException", "no kms:Sign for role/app"))
    with pytest.raises(errors.AccessDeniedError, match="no kms:Sign for role/app"):
        signer.sign(b"m")


def test_no_endpoint_there(key: str) -> None:
    with pytest.raises(errors.SignerUnavailable):
        open_signer(f"awskms:///{key}", endpoint="http://127.0.0.1:9", max_attempts=1)


# -- calls, time, threads -------------------------------------------------------------------------


def test_one_call_for_each_signature_and_no_metadata(signer: Signer, proxy: FaultProxy) -> None:
    assert calls(proxy) == ["DescribeKey", "GetPublicKey"]
    for _ in range(25):
        signer.sign(b"m")
    signer.custody()
    assert calls(proxy)[2:] == ["Sign"] * 25


def test_message_never_leaves_and_digest_is_declared(signer: Signer, proxy: FaultProxy) -> None:
    signer.sign(b"the message itself")
    body = proxy.requests[-1].body
    assert b"the message itself" not in body
    assert b'"MessageType": "DIGEST"' in body
    assert b'"SigningAlgorithm": "ECDSA_SHA_256"' in body


def test_throttled_call_is_repeated(proxy: FaultProxy, key: str) -> None:
    with open_signer(f"awskms:///{key}?endpoint={proxy.url}") as signer:
        refusals = iter([True])
        throttle = aws.refusal(400, "ThrottlingException")
        proxy.fault = lambda request, forward: (
            throttle(request, forward) if next(refusals, False) else forward(request)
        )
        signer.public_key.verify(signer.sign(b"m"), b"m")
        assert calls(proxy)[2:] == ["Sign", "Sign"]


def test_deadline_bounds_a_slow_answer(signer: Signer, proxy: FaultProxy) -> None:
    release = threading.Event()
    proxy.fault = on_sign(aws.held(release))
    started = time.monotonic()
    with pytest.raises(errors.SignerTimeout):
        signer.sign(b"m", timeout=0.2)
    assert time.monotonic() - started < 2.0
    release.set()
    proxy.fault = None
    signer.public_key.verify(signer.sign(b"m", timeout=5), b"m")


def test_client_alone_bounds_a_slow_answer(proxy: FaultProxy, key: str) -> None:
    release = threading.Event()
    uri = f"awskms:///{key}?endpoint={proxy.url}"
    with open_signer(uri, max_attempts=1, read_timeout=1.0) as signer:
        proxy.fault = on_sign(aws.held(release))
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m")
        release.set()


@pytest.mark.stress
@pytest.mark.parametrize("serve", TRICKLES.values(), ids=TRICKLES)
def test_answer_that_trickles_in_ends_by_the_time_limit(
    serve: Callable[[socket.socket], None], key: str
) -> None:
    with listening(serve) as port:
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            open_signer(f"awskms:///{key}", endpoint=f"http://127.0.0.1:{port}", timeout=1.0)
        assert time.monotonic() - started < 5.0
        # Nothing goes on with it either.
        for thread in threading.enumerate():
            if thread.name == "d1-signer-call":
                thread.join(10)
                assert not thread.is_alive()


@pytest.mark.stress
def test_credentials_that_are_not_found_in_time_end_the_opening(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with listening(TRICKLES["body"]) as port:
        url = f"http://127.0.0.1:{port}/credentials"
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            open_signer(f"awskms:///{key}", endpoint="http://127.0.0.1:9", timeout=1.0)
        assert time.monotonic() - started < 5.0


@pytest.mark.stress
def test_credentials_that_are_not_renewed_in_time_end_the_signature(
    monkeypatch: pytest.MonkeyPatch, endpoint: aws.Aws, key: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)
    told = json.dumps(
        {
            "AccessKeyId": aws.ACCESS_KEY,
            "SecretAccessKey": aws.SECRET_KEY,
            "Token": aws.SESSION_TOKEN,
            "Expiration": soon.isoformat(),
        }
    ).encode()
    hangs = threading.Event()

    def serve(connection: socket.socket) -> None:
        if hangs.is_set():
            TRICKLES["body"](connection)
        connection.recv(65536)
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(told)}\r\n\r\n"
        connection.sendall(head.encode() + told)

    with listening(serve) as port:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{port}/")
        with open_signer(f"awskms:///{key}?endpoint={endpoint.url}", timeout=3.0) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
            hangs.set()
            while dt.datetime.now(dt.UTC) < soon:
                time.sleep(0.1)
            started = time.monotonic()
            with pytest.raises(errors.SignerTimeout, match="search for AWS credentials") as late:
                signer.sign(b"m")
            assert time.monotonic() - started < 8.0
            assert late.value.details["phase"] == "credentials"


def test_answer_without_an_end_is_refused(key: str) -> None:
    with listening(endless) as port, pytest.raises(errors.IntegrityError, match="1 MiB"):
        open_signer(f"awskms:///{key}", endpoint=f"http://127.0.0.1:{port}")


def test_deadline_ends_the_repeats_as_well(proxy: FaultProxy, key: str) -> None:
    with open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=50) as signer:
        proxy.fault = on_sign(aws.refusal(500, "KMSInternalException"))
        started = time.monotonic()
        with pytest.raises(errors.SignerUnavailable):
            signer.sign(b"m", timeout=0.3)
        assert time.monotonic() - started < 2.0
        for thread in threading.enumerate():
            if thread.name == "d1-signer-call":
                thread.join(timeout=10)
        asked = len(proxy.requests)
        assert asked < 50
        signer_threads = [t for t in threading.enumerate() if t.name == "d1-signer-call"]
        assert not signer_threads


def test_32_threads_without_a_pool_warning(
    signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    def work(number: int) -> None:
        message = str(number).encode()
        signer.public_key.verify(signer.sign(message), message)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(320)))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_signers_are_opened_by_many_threads_at_once(endpoint: aws.Aws, key: str) -> None:
    def work(_: int) -> None:
        with open_signer(f"awskms:///{key}?endpoint={endpoint.url}", timeout=60.0) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_injected_client_is_used_and_stays_open(endpoint: aws.Aws, key: str) -> None:
    made: list[object] = []

    def make() -> Any:
        client = boto3.Session(region_name=aws.REGION).client(
            "kms", endpoint_url=endpoint.url, config=Config(retries={"total_max_attempts": 1})
        )
        made.append(client)
        return client

    client = make()
    for given in (client, make):
        with open_signer(f"awskms:///{key}", client=given) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
    assert len(made) == 2
    client.describe_key(KeyId=key)


# -- custody, making keys -------------------------------------------------------------------------


def test_custody_says_what_aws_says(signer: Signer, key: str) -> None:
    evidence = signer.custody().evidence
    facts = {fact.name: fact for fact in evidence.facts}
    assert facts["Arn"].value == key
    assert facts["Origin"].value == "AWS_KMS"
    assert facts["KeySpec"].value == "ECC_NIST_P256"
    assert facts["MultiRegion"].value is False
    assert facts["CustomKeyStoreId"].value is None
    assert {fact.assurance for fact in evidence.facts} == {"claimed"}
    CustodyPolicy(non_exportable=True, generated_in_place=True, hardware=True).check(evidence)


def test_imported_key_does_not_meet_the_policy(proxy: FaultProxy, key: str) -> None:
    def imported(told: dict[str, Any]) -> None:
        if "KeyMetadata" in told:
            told["KeyMetadata"]["Origin"] = "EXTERNAL"

    proxy.fault = answering(imported)
    uri = f"awskms:///{key}?endpoint={proxy.url}"
    with open_signer(uri) as signer:
        assert signer.custody().evidence.generated_in_place is False
    for policy in (CustodyPolicy(non_exportable=True), CustodyPolicy(generated_in_place=True)):
        with pytest.raises(errors.CustodyError):
            open_signer(uri, custody_policy=policy)


def test_generated_key_signs_and_is_never_overwritten(endpoint: aws.Aws) -> None:
    uri = f"awskms:///alias/made?endpoint={endpoint.url}"
    made = generate_key(uri)
    with open_signer(made.uri) as signer:
        assert signer.public_key == made.public_key
        signer.public_key.verify(signer.sign(b"m"), b"m")
    count = len(endpoint.client().list_keys()["Keys"])
    with pytest.raises(errors.KeyExistsError):
        generate_key(uri)
    assert len(endpoint.client().list_keys()["Keys"]) == count
    with pytest.raises(errors.KeyUriError):
        generate_key(f"awskms:///some-id?endpoint={endpoint.url}")


def test_key_left_without_its_alias_is_named(proxy: FaultProxy) -> None:
    proxy.fault = lambda request, forward: (
        aws.refusal(400, "AccessDeniedException")(request, forward)
        if aws.operation(request) == "CreateAlias"
        else forward(request)
    )
    with pytest.raises(errors.AccessDeniedError) as refused:
        generate_key(f"awskms:///alias/unnamed?endpoint={proxy.url}")
    assert str(refused.value.details["made"]).startswith("arn:aws:kms:")


def test_repr_names_the_key_only(signer: Signer, key: str) -> None:
    assert isinstance(signer._backend, AwsKmsBackend)
    assert repr(signer._backend) == f"<AwsKmsBackend {key}>"

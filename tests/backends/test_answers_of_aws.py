# SPDX-License-Identifier: Apache-2.0
"""Every error that AWS documents for the calls we make: our code, and what the page says of it."""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config

from d1_signer import TokenFetcher, errors
from d1_signer.backends.aws_kms.failures import CODES, STATES
from d1_signer.backends.aws_kms.sources import STS
from d1_signer.signing.opening import generate_key, open_signer
from tests.leaks.known import known
from tests.servers import aws
from tests.servers.aws import answering, on_sign
from tests.servers.certificates import self_signed
from tests.servers.credential_source import Source, credential_source
from tests.servers.fault_proxy import listening, tls_in_front_of, trickle, tunnel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from tests.conftest import LeakWatch
    from tests.servers.fault_proxy import Answer, Fault, FaultProxy, Forward, Request

PAGE = (Path(__file__).parents[2] / "docs" / "cloud" / "aws.md").read_text(encoding="utf-8")
BEARER = known("bearer-token-" + "of-the-environment")
# "Common Error Types" of the AWS KMS API Reference, which no model lists.
COMMON = {
    *("AccessDeniedException", "ExpiredTokenException", "IncompleteSignature", "InternalFailure"),
    *("MalformedHttpRequestException", "NotAuthorized", "OptInRequired", "RequestAbortedException"),
    *("RequestEntityTooLargeException", "RequestExpired", "RequestTimeoutException"),
    *("ServiceUnavailable", "ThrottlingException", "UnrecognizedClientException"),
    *("UnknownOperationException", "ValidationError"),
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws.Aws]:
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def key(endpoint: aws.Aws) -> str:
    return endpoint.make_key()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, leak_watch: LeakWatch) -> None:
    for name, value in aws.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    leak_watch.note(aws.SECRET_KEY)
    leak_watch.note(aws.SESSION_TOKEN)


@pytest.fixture
def proxy(endpoint: aws.Aws) -> Iterator[FaultProxy]:
    with endpoint.proxy() as running:
        yield running


def _rows(title: str) -> dict[str, list[str]]:
    """The table below a title of the page: the first column's word to the other columns."""
    section = PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


# -- the page -------------------------------------------------------------------------------------


def _modelled(service: str, *operations: str) -> set[str]:
    client = boto3.client(service, region_name=aws.REGION)  # type: ignore[call-overload]
    shapes = [
        shape
        for operation in operations
        for shape in client.meta.service_model.operation_model(operation).error_shapes
    ]
    client.close()
    return {shape.metadata.get("error", {}).get("code", shape.name) for shape in shapes}


def test_every_error_of_kms_that_is_documented_is_in_the_table() -> None:
    operations = ("DescribeKey", "GetPublicKey", "Sign", "CreateKey", "CreateAlias")
    known = {code.removesuffix("Exception") for code in CODES}
    # Some codes go with and without the suffix.
    modelled = {code.removesuffix("Exception") for code in _modelled("kms", *operations)}
    assert len(modelled) > 20
    assert modelled - known == set()
    assert COMMON - set(CODES) == set()


def test_every_error_of_sts_that_is_documented_is_in_the_table() -> None:
    modelled = _modelled("sts", "AssumeRole", "AssumeRoleWithWebIdentity")
    assert len(modelled) > 6
    assert modelled - set(STS) == set()


@pytest.mark.parametrize("title", ["AWS KMS", "AWS STS and sign-in"])
def test_page_says_what_the_table_says(title: str) -> None:
    if title == "AWS KMS":
        told = {code: (kind, hint, kind.default_retryable) for code, (kind, hint) in CODES.items()}
    else:
        told = dict(STS)
    wanted = {
        code: [f"`{kind.code}`", "yes" if retryable else "no", hint]
        for code, (kind, hint, retryable) in told.items()
    }
    assert _rows(title) == wanted


def test_page_says_what_states_mean() -> None:
    wanted = {name: ["yes" if passes else "no", hint] for name, (hint, passes) in STATES.items()}
    assert _rows("States of a key") == wanted


# -- what arrives ---------------------------------------------------------------------------------


def test_each_answer_is_told_with_phase_endpoint_and_request_id(
    proxy: FaultProxy, key: str
) -> None:
    with open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1) as signer:
        for code, (kind, hint) in CODES.items():
            proxy.fault = on_sign(aws.refusal(400, code, "told so"))
            with pytest.raises(kind) as refused:
                signer.sign(b"m")
            error = refused.value
            assert type(error) is kind, code
            assert error.retryable is kind.default_retryable
            assert error.hint == hint
            assert code in error.message
            assert "request-17" in error.message
            assert error.details == {
                "phase": "signature",
                "endpoint": proxy.url,
                "aws_code": code,
                "request_id": "request-17",
                "status": 400,
            }


def test_the_line_of_a_renewal_that_it_ended_names_endpoint_and_request_id(
    proxy: FaultProxy, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1) as signer,
        TokenFetcher(signer, issuer_id="bank", environment="http://127.0.0.1:9") as fetcher,
    ):
        proxy.fault = on_sign(aws.refusal(400, "DisabledException", "told so"))
        with pytest.raises(errors.KeyDisabledError):
            fetcher.token()
    (line,) = [text for text in caplog.messages if text.startswith("token.failed ")]
    for pair in ("host=127.0.0.1:9", "issuer=bank", "request_id=request-17", "status=400"):
        assert f" {pair} " in line
    assert f" endpoint={proxy.url} " in line
    assert "(request request-17)" in line


@pytest.mark.parametrize("operation", ["DescribeKey", "GetPublicKey"])
def test_phase_of_the_opening_is_the_look_up(operation: str, proxy: FaultProxy, key: str) -> None:
    refuse = aws.refusal(400, "AccessDeniedException", "no")
    proxy.fault = _on(operation, refuse)
    with pytest.raises(errors.AccessDeniedError) as refused:
        open_signer(f"awskms:///{key}", endpoint=proxy.url)
    assert refused.value.details["phase"] == "look-up"


def _on(operation: str, fault: Fault) -> Fault:
    def seen(request: Request, forward: Forward) -> Answer:
        asked = aws.operation(request) == operation
        return fault(request, forward) if asked else forward(request)

    return seen


@pytest.mark.parametrize("state", [*STATES, "InventedTomorrow"])
def test_states_are_told_by_their_own_word(state: str, proxy: FaultProxy, key: str) -> None:
    def in_state(told: dict[str, Any]) -> None:
        if "KeyMetadata" in told:
            told["KeyMetadata"]["KeyState"] = state

    hint, passes = STATES.get(state, ("Look at the key's state in AWS KMS.", False))
    proxy.fault = answering(in_state)
    if state == "Updating":  # KMS signs in it
        open_signer(f"awskms:///{key}", endpoint=proxy.url).close()
        return
    with pytest.raises(errors.KeyDisabledError, match=state) as refused:
        open_signer(f"awskms:///{key}", endpoint=proxy.url)
    assert (refused.value.hint, refused.value.retryable) == (hint, passes)


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("is pending deletion.", "PendingDeletion"),
        ("is pending import.", "PendingImport"),
        ("is creating.", "Creating"),
        ("is in state Unavailable.", "Unavailable"),
    ],
)
def test_states_in_the_words_of_a_refusal(
    words: str, state: str, proxy: FaultProxy, key: str
) -> None:
    with open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1) as signer:
        proxy.fault = on_sign(aws.refusal(400, "KMSInvalidStateException", f"{key} {words}"))
        with pytest.raises(errors.KeyDisabledError) as refused:
            signer.sign(b"m")
    assert (refused.value.hint, refused.value.retryable) == STATES[state]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Source]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    token = tmp_path / "jwt"
    token.write_text("made.up.token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", aws.REGION)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::000000000000:role/d1")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    with credential_source() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", running.url)
        yield running


@pytest.mark.parametrize("code", STS)
def test_sts_is_told_as_sts(code: str, source: Source, key: str) -> None:
    kind, hint, retryable = STS[code]
    source.refusal = (403, code, "told so")
    with pytest.raises(kind, match="AWS STS refused AssumeRoleWithWebIdentity") as refused:
        open_signer(f"awskms:///{key}", timeout=30)
    assert type(refused.value) is kind
    assert (refused.value.hint, refused.value.retryable) == (hint, retryable)
    assert refused.value.details == {
        "phase": "credentials",
        "endpoint": source.url,
        "operation": "AssumeRoleWithWebIdentity",
        "aws_code": code,
        "request_id": "sts-17",
        "status": 403,
    }


# -- what does not arrive -------------------------------------------------------------------------


def test_authority_of_ones_own(endpoint: aws.Aws, key: str, tmp_path: Path) -> None:
    certificate, private = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    with tls_in_front_of(endpoint.port, context) as port:
        uri = f"awskms:///{key}?endpoint=https://localhost:{port}"
        with pytest.raises(errors.SignerUnavailable, match="ca_file") as refused:
            open_signer(uri, max_attempts=1)
        assert not refused.value.retryable
        assert "AWS_CA_BUNDLE is not used" in refused.value.hint
        for named in (f"{uri}&ca_file={certificate}", f"{uri}&ca-file={certificate}"):
            with open_signer(named) as signer:
                signer.public_key.verify(signer.sign(b"m"), b"m")
        with open_signer(uri, ca_file=str(certificate)) as signer:
            signer.public_key.verify(signer.sign(b"m"), b"m")
    for bad in (tmp_path / "none.pem", private):
        with pytest.raises(errors.ConfigurationError, match="CA file for AWS KMS"):
            open_signer(uri, ca_file=str(bad))


def _proxy_that_says(status: str) -> Any:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    return listening(serve)


@pytest.mark.parametrize(
    ("status", "retryable"),
    [("407 Proxy Authentication Required", False), ("403 Forbidden", False)],
)
def test_proxy_that_refuses_is_named(key: str, status: str, retryable: bool) -> None:
    with _proxy_that_says(status) as port:
        proxy = f"http://127.0.0.1:{port}"
        with pytest.raises(
            errors.SignerUnavailable, match=f"the proxy 127.0.0.1:{port}"
        ) as refused:
            open_signer(f"awskms:///{key}", proxy=proxy, max_attempts=1)
    assert refused.value.retryable is retryable
    assert status[:3] in str(refused.value)
    with tunnel():
        pass  # the good one is tried in test_aws.py


def test_unreached_endpoint_is_named_with_the_reason(key: str) -> None:
    with pytest.raises(errors.SignerUnavailable, match="refused") as refused:
        open_signer(f"awskms:///{key}", endpoint="http://127.0.0.1:9", max_attempts=1)
    assert "AWS KMS at http://127.0.0.1:9" in str(refused.value)
    assert refused.value.details["stage"] == "connection"


# -- hostile answers ------------------------------------------------------------------------------

_NO_SHAPE = [
    b'{"KeyMetadata": [1]}',
    b'{"KeyMetadata": {"Arn": 5}}',
    b'{"KeyMetadata": {"Arn": "a\\nFORGED LINE \\u001b[2J"}}',
    b'{"KeyMetadata": {"Arn": "' + b"a" * 500_000 + b'"}}',
    b'{"KeyMetadata": null}',
    b'{"KeyMetadata": {"Arn": "x", "CreationDate": "never"}}',
    b"[" * 200_000,
    b"[1, 2]",
    b'"text"',
    b"1" * 5000,
    b"\xff\xfe",
    b"null",
]


@pytest.mark.parametrize("body", _NO_SHAPE, ids=lambda body: repr(body[:30]))
def test_answer_of_another_shape_is_an_integrity_error(
    body: bytes, proxy: FaultProxy, key: str
) -> None:
    proxy.fault = aws.page(200, body)
    with pytest.raises(errors.IntegrityError) as refused:
        open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1)
    assert len(str(refused.value)) < 600
    assert str(refused.value).isprintable()
    assert refused.value.details["phase"] == "look-up"


@pytest.mark.parametrize(
    "change",
    [{"Signature": 5}, {"Signature": None}, {"Signature": [1]}, {"KeyId": 5}, {"KeyId": ["a"]}],
    ids=repr,
)
def test_signature_of_another_shape_is_an_integrity_error(
    change: dict[str, Any], proxy: FaultProxy, key: str
) -> None:
    with open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1) as signer:
        proxy.fault = on_sign(answering(lambda told: told.update(change)))
        with pytest.raises((errors.IntegrityError, errors.InvalidSignatureError)) as refused:
            signer.sign(b"m")
    assert type(refused.value) in {errors.IntegrityError, errors.InvalidSignatureError}


def test_length_that_is_none_is_told(key: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}"
    with listening(trickle(head)) as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises((errors.IntegrityError, errors.SignerUnavailable)):
            open_signer(f"awskms:///{key}", endpoint=url, max_attempts=1, timeout=10)


@pytest.mark.parametrize(
    "text", [f"no: {aws.SESSION_TOKEN}", aws.SESSION_TOKEN, f"x\n{aws.SESSION_TOKEN[:14]}"]
)
@pytest.mark.parametrize("place", ["message", "code", "request_id"])
def test_what_repeats_our_secrets_is_masked(
    place: str, text: str, proxy: FaultProxy, key: str
) -> None:
    def echo(_: Request, __: Forward) -> Answer:
        body = {"__type": "Odd", "message": "no", **({"message": text} if place[0] == "m" else {})}
        if place == "code":
            body["__type"] = text
        headers = {"Content-Type": "application/x-amz-json-1.1"}
        if place == "request_id":
            headers["x-amzn-RequestId"] = text.replace("\n", "")
        from tests.servers.fault_proxy import Answer

        return Answer(400, headers, json.dumps(body).encode())

    proxy.fault = echo
    with pytest.raises(errors.D1SignerError) as refused:
        open_signer(f"awskms:///{key}", endpoint=proxy.url, max_attempts=1)
    told = json.dumps(refused.value.to_dict())
    assert aws.SESSION_TOKEN[:14] not in told
    assert str(refused.value).isprintable()


# -- codes that nobody knows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.SignerError),
        (429, errors.SignerThrottled),
        (499, errors.SignerError),
        (500, errors.SignerUnavailable),
        (599, errors.SignerUnavailable),
    ],
)
def test_a_code_that_nobody_knows_is_read_by_its_status(
    status: int, kind: type[errors.SignerError]
) -> None:
    from botocore.exceptions import ClientError

    from d1_signer.backends.aws_kms.failures import AWS_KMS

    answer: Any = {
        "Error": {"Code": "NewException"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }

    def method() -> None:
        raise ClientError(answer, "Sign")

    with pytest.raises(kind, match="NewException") as refused:
        AWS_KMS.ask("to sign", method)
    assert type(refused.value) is kind


# -- an error of ours inside one of botocore's --------------------------------------------------


def _as_argument(ours: Exception) -> Exception:
    from botocore.exceptions import HTTPClientError

    return HTTPClientError(error=ours)


def _as_cause(ours: Exception) -> Exception:
    from botocore.exceptions import EndpointConnectionError

    failure = EndpointConnectionError(endpoint_url="https://kms.example")
    failure.__cause__ = ours
    return failure


def _as_reason(ours: Exception) -> Exception:
    from urllib3.exceptions import MaxRetryError

    return MaxRetryError(None, "/", ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", [_as_argument, _as_cause, _as_reason])
def test_an_error_of_ours_inside_one_of_botocores_is_told_as_it_is(
    inside: Callable[[Exception], Exception],
) -> None:
    from d1_signer.backends.aws_kms.failures import AWS_KMS

    ours = errors.TlsError("The name is another one.", hint="Look at it.", retryable=False)

    def method() -> None:
        raise inside(ours)

    with pytest.raises(errors.TlsError) as refused:
        AWS_KMS.ask("to sign", method)
    assert refused.value is ours
    assert refused.value.__context__ is None


# -- the environment does not redirect ------------------------------------------------------------


def test_models_and_plugins_of_the_environment_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[bytes] = []
    with listening(lambda connection: reached.append(connection.recv(65536))) as port:
        rules = {
            "version": "1.0",
            "parameters": {
                "Region": {"builtIn": "AWS::Region", "type": "string", "documentation": ""}
            },
            "rules": [
                {
                    "conditions": [],
                    "endpoint": {
                        "url": f"http://127.0.0.1:{port}",
                        "properties": {},
                        "headers": {},
                    },
                    "type": "endpoint",
                }
            ],
        }
        monkeypatch.setenv("HOME", str(tmp_path))
        for folder in (tmp_path / "models", tmp_path / ".aws" / "models"):
            place = folder / "kms" / "2014-11-01"
            place.mkdir(parents=True)
            (place / "endpoint-rule-set-1.json").write_text(json.dumps(rules))
        monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path / "models"))
        from botocore.loaders import Loader

        monkeypatch.setattr(Loader, "CUSTOMER_DATA_PATH", str(tmp_path / ".aws" / "models"))
        with pytest.raises(errors.SignerUnavailable) as refused:
            open_signer("awskms:///alias/d1", max_attempts=1, timeout=10)
        assert refused.value.details["endpoint"] == "https://kms.eu-central-1.amazonaws.com"
    assert not reached
    monkeypatch.setenv("BOTOCORE_EXPERIMENTAL__PLUGINS", "evil=evil")
    with pytest.raises(errors.ConfigurationError, match="PLUGINS"):
        open_signer("awskms:///alias/d1")


def test_calls_are_signed_whatever_token_or_scheme_the_environment_prefers(
    endpoint: aws.Aws, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore import handlers

    schemes = ["smithy.api#noAuth", "smithy.api#httpBearerAuth", "aws.auth#sigv4"]
    monkeypatch.setenv("AWS_BEARER_TOKEN_KMS", BEARER)
    # As for the services that take such tokens today.
    monkeypatch.setattr(handlers, "get_bearer_auth_supported_services", lambda: {"kms"})
    sent: list[str] = []

    def note(request: Any, **_: object) -> None:
        sent.append(request.headers["Authorization"])

    for preference in ("", "httpBearerAuth", "noAuth"):
        monkeypatch.setenv("AWS_AUTH_SCHEME_PREFERENCE", preference)
        with open_signer(f"awskms:///{key}?endpoint={endpoint.url}") as signer:
            client = signer._backend._clients.made_here().kms  # type: ignore[attr-defined]
            client.meta.service_model.metadata["auth"] = schemes
            client.meta.events.register_first("before-send.kms", note)
            signer.sign(b"m")
    assert len(sent) == 3
    for value in sent:
        assert str(value).startswith(("AWS4-HMAC-SHA256 ", "b'AWS4-HMAC-SHA256 "))


def test_request_to_another_endpoint_is_not_sent(endpoint: aws.Aws, key: str) -> None:
    reached: list[bytes] = []
    with (
        listening(lambda connection: reached.append(connection.recv(65536))) as port,
        open_signer(f"awskms:///{key}?endpoint={endpoint.url}") as signer,
    ):
        events = signer._backend._clients.made_here().kms.meta.events  # type: ignore[attr-defined]

        def redirect(request: Any, **_: object) -> None:
            request.url = f"http://127.0.0.1:{port}/"

        events.register_first("before-sign.kms", redirect)
        with pytest.raises(errors.ConfigurationError, match="another endpoint"):
            signer.sign(b"m")
    assert not reached


# -- making a key ---------------------------------------------------------------------------------


def _first(count: int, operation: str, fault: Fault) -> Fault:
    left = [count]

    def seen(request: Request, forward: Forward) -> Answer:
        if aws.operation(request) == operation and left[0]:
            left[0] -= 1
            return fault(request, forward)
        return forward(request)

    return seen


def _lost(request: Request, forward: Forward) -> Answer:
    """It is done, and the answer does not arrive."""
    forward(request)
    return aws.dropped(request, forward)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("CreateKey", aws.refusal(400, "ThrottlingException")),
        ("CreateAlias", aws.refusal(400, "NotFoundException")),
        ("CreateAlias", aws.refusal(400, "KMSInvalidStateException", "it is creating")),
        ("CreateAlias", aws.refusal(500, "KMSInternalException")),
        ("CreateAlias", _lost),
        ("GetPublicKey", aws.refusal(400, "NotFoundException")),
        ("GetPublicKey", aws.refusal(400, "KMSInvalidStateException")),
        ("GetPublicKey", aws.dropped),
    ],
)
def test_new_key_that_is_not_known_yet_is_asked_for_again(
    operation: str, fault: Fault, proxy: FaultProxy, endpoint: aws.Aws
) -> None:
    client = endpoint.client()
    before = len(client.list_keys(Limit=1000)["Keys"])
    proxy.fault = _first(2, operation, fault)
    alias = f"alias/again-{time.monotonic_ns()}"
    made = generate_key(f"awskms:///{alias}?endpoint={proxy.url}")
    assert client.get_public_key(KeyId=alias)["PublicKey"] == made.public_key.der()
    assert len(client.list_keys(Limit=1000)["Keys"]) == before + 1


def test_key_whose_making_was_not_answered_is_not_made_twice(
    proxy: FaultProxy, endpoint: aws.Aws
) -> None:
    client = endpoint.client()
    before = len(client.list_keys(Limit=1000)["Keys"])
    proxy.fault = _first(9, "CreateKey", _lost)
    with pytest.raises(errors.SignerUnavailable, match="may have made a key") as refused:
        generate_key(f"awskms:///alias/lost?endpoint={proxy.url}", description="lost one")
    assert refused.value.details["phase"] == "generation"
    assert "lost one" in refused.value.hint
    assert len(client.list_keys(Limit=1000)["Keys"]) == before + 1


def test_given_client_makes_keys_too(endpoint: aws.Aws) -> None:
    client = boto3.Session(region_name=aws.REGION).client(
        "kms", endpoint_url=endpoint.url, config=Config(retries={"total_max_attempts": 1})
    )
    made = generate_key("awskms:///alias/by-a-given-client", client=client)
    told = client.get_public_key(KeyId="alias/by-a-given-client")["PublicKey"]
    assert told == made.public_key.der()
    assert re.fullmatch(r"awskms:///alias/by-a-given-client", made.uri)
    client.close()

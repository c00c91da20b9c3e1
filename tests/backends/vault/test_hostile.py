# SPDX-License-Identifier: Apache-2.0
"""A server, or a gateway, that answers what it likes: nothing of ours gets into a text."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.signing.opening import open_signer
from tests.leaks.known import known
from tests.servers.aws import page
from tests.servers.fault_proxy import Answer
from tests.servers.vault import asking, on_sign, refusal

if TYPE_CHECKING:
    from d1_signer.signing.signer import Signer
    from tests.conftest import LeakWatch
    from tests.servers import vault
    from tests.servers.fault_proxy import Fault, FaultProxy

TOKEN = known("hvs.CAESIJq9s3cr3tT0kenThatIsLong0123456789")
SECRET_ID = known("9b8f2c1e-5ec7-4e1d-aa11-bb22cc33dd44")
ISSUED = "hvs.ISSUEDtokenOfALogin0123456789"

pytestmark = pytest.mark.usefixtures("asked_once")


@pytest.fixture(autouse=True)
def debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def _answer(status: int, body: bytes, **headers: str) -> Fault:
    return lambda _request, _forward: Answer(
        status, {"Content-Type": "application/json", **headers}, body
    )


@pytest.mark.parametrize("status", [400, 403, 404, 500, 503])
def test_credentials_that_are_echoed_are_masked(
    proxy: FaultProxy, leak_watch: LeakWatch, status: int
) -> None:
    for secret in (TOKEN, SECRET_ID):
        leak_watch.note(secret)

    def echo(request: Any, forward: Any) -> Answer:
        said = f"not known here: {dict(request.headers)} {request.body.decode()}"
        return refusal(status, said)(request, forward)

    proxy.fault = echo
    by_token: dict[str, Any] = {"token_source": lambda: TOKEN}
    by_approle: dict[str, Any] = {"role_id": "r", "secret_id_source": lambda: SECRET_ID}
    for options in (by_token, by_approle):
        with pytest.raises(errors.SignerError) as refused:
            open_signer("hashivault://d1", address=proxy.url, **options)
        assert len(str(refused.value)) < 600
        leak_watch.errors.append(refused.value)


LOGINS: dict[str, bytes] = {
    "torn": f'{{"auth":{{"client_token":"{ISSUED}","lease_duration":60'.encode(),
    "list": f'["{ISSUED}"]'.encode(),
    "no-text": f'{{"auth":{{"client_token":["{ISSUED}"]}}}}'.encode(),
    "elsewhere": f'{{"data":{{"client_token":"{ISSUED}"}}}}'.encode(),
}


@pytest.mark.parametrize("body", LOGINS.values(), ids=LOGINS)
@pytest.mark.parametrize("status", [200, 203])
def test_login_that_is_torn_leaves_its_token_nowhere(
    proxy: FaultProxy, leak_watch: LeakWatch, body: bytes, status: int
) -> None:
    leak_watch.note(ISSUED)
    proxy.fault = _answer(status, body)
    with pytest.raises(errors.IntegrityError) as refused:
        open_signer(
            "hashivault://d1", address=proxy.url, role_id="r", secret_id_source=lambda: SECRET_ID
        )
    assert refused.value.retryable
    leak_watch.errors.append(refused.value)


def test_token_in_the_body_of_a_refusal_is_nowhere(
    proxy: FaultProxy, leak_watch: LeakWatch
) -> None:
    leak_watch.note(ISSUED)
    proxy.fault = _answer(500, f'{{"auth":{{"client_token":"{ISSUED}"}}}}'.encode())
    with pytest.raises(errors.SignerUnavailable) as refused:
        open_signer(
            "hashivault://d1", address=proxy.url, role_id="r", secret_id_source=lambda: SECRET_ID
        )
    leak_watch.errors.append(refused.value)


def _described(**changes: object) -> bytes:
    data = {"type": "ecdsa-p256", "keys": {"1": {"public_key": "x"}}, "latest_version": 1}
    return json.dumps({"data": {**data, **changes}}).encode()


DESCRIPTIONS: dict[str, bytes] = {
    "not-json": b"<html>",
    "nested": b"[" * 100_000,
    "digits": b'{"data":' + b"1" * 5000 + b"}",
    "not-utf8": b'{"data":"\xff\xfe"}',
    "list": b"[]",
    "no-data": b"{}",
    "data-list": b'{"data":[]}',
    "type-list": _described(type=["a"]),
    "no-type": _described(type=None),
    "version-text": _described(keys={"x": {}}),
    "version-digits": _described(keys={"1" * 5000: {}}),
    "version-null": _described(keys={"1": None}),
    "keys-list": _described(keys=[]),
    "latest-bool": _described(latest_version=True),
    "latest-text": _described(latest_version="1"),
    "latest-negative": _described(latest_version=-1),
    "no-key": _described(keys={"1": {}}),
    "no-pem": _described(),
    "rsa": _described(keys={"1": {"public_key": ["-----BEGIN PUBLIC KEY-----"]}}),
}


@pytest.mark.parametrize("body", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_description_that_is_none_is_an_integrity_error(proxy: FaultProxy, body: bytes) -> None:
    proxy.fault = _answer(200, body)
    with pytest.raises(errors.IntegrityError) as refused:
        open_signer("hashivault://d1", address=proxy.url)
    assert refused.value.retryable
    assert refused.value.details["phase"] == "look-up"
    assert refused.value.details["endpoint"] == proxy.url.removeprefix("http://")
    assert refused.value.hint


@pytest.mark.parametrize(
    "told",
    [
        "\u001b[31mred\r\n2026-01-01 INFO all is well",
        "x" * 500_000,
        "word " * 100_000,
        "\u202etxet desrever",
    ],
    ids=["escapes", "long-word", "long", "bidi"],
)
def test_foreign_text_is_short_and_forges_no_line(proxy: FaultProxy, told: str) -> None:
    faults: list[Fault] = [
        _answer(200, _described(type=told)),
        refusal(400, told),
        _answer(307, b"", Location=f"https://{told[:900].encode('ascii', 'replace').decode()!r}/"),
        _answer(307, b"", Location="https://[x"),
    ]
    for fault in faults:
        proxy.fault = fault
        with pytest.raises(errors.SignerError) as refused:
            open_signer("hashivault://d1", address=proxy.url)
        text = str(refused.value)
        assert text.isascii()
        assert text.isprintable()
        assert len(text) < 600


SIGNATURES: dict[str, Fault] = {
    "not-json": page(200, b"<html>"),
    "nested": page(200, b'{"data":' * 50_000),
    "number": page(200, b'{"data":{"signature":1e999}}'),
    "list": page(200, b'{"data":{"signature":["vault:v1:"]}}'),
    "huge-version": page(200, json.dumps(
        {"data": {"signature": f"vault:v{'9' * 5000}:{'A' * 86}"}}).encode()),
    "der": asking(marshaling_algorithm="asn1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SIGNATURES.values(), ids=SIGNATURES)
def test_signature_that_is_none_is_an_integrity_error(
    signer: Signer, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.fault = on_sign(fault)
    with pytest.raises(errors.IntegrityError) as refused:
        signer.sign(b"m")
    assert refused.value.details["phase"] == "signature"
    assert refused.value.details["endpoint"] == proxy.url.removeprefix("http://")


def test_request_id_of_a_gateway_is_told(signer: Signer, proxy: FaultProxy) -> None:
    for name in ("X-Request-Id", "X-Correlation-Id", "x-request-id"):
        proxy.fault = on_sign(refusal(403, "no", **{name: "7f3a-9001"}))
        with pytest.raises(errors.AccessDeniedError) as refused:
            signer.sign(b"m")
        assert refused.value.details["request_id"] == "7f3a-9001"
    proxy.fault = on_sign(refusal(403, "no", **{"X-Request-Id": "a b <script>"}))
    with pytest.raises(errors.AccessDeniedError) as refused:
        signer.sign(b"m")
    assert "request_id" not in refused.value.details


@pytest.mark.parametrize(
    ("uri", "phase"),
    [
        ("hashivault://d1?version=7", "look-up"),
        ("hashivault://nobody", "look-up"),
        ("hashivault://d1?token-source=none", "look-up"),
        ("hashivault://d1?role-id=r&secret-id-source=env:WRONG_ID", "credentials"),
        ("hashivault://d1?role-id=r&secret-id-source=env:NOT_SET", "credentials"),
        ("hashivault://d1?auth=kubernetes&role=r", "credentials"),
    ],
)
def test_every_error_names_phase_and_endpoint(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch, uri: str, phase: str
) -> None:
    monkeypatch.setenv("WRONG_ID", "an-id-that-nobody-made")
    for _ in range(2):  # the second of a refused secret id is not sent
        with pytest.raises(errors.D1SignerError) as refused:
            open_signer(uri, address=server.url)
        assert refused.value.details["phase"] == phase
        assert refused.value.details["endpoint"] == f"127.0.0.1:{server.port}"

# SPDX-License-Identifier: Apache-2.0
"""Vault's Transit engine: what is refused, what is asked for, and what a failure says."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.backends.vault import VaultBackend
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.transport.processes import fork_gate
from tests.backends.vault.conftest import signs
from tests.servers import vault
from tests.servers.aws import cut_short, dropped, held, page
from tests.servers.certificates import self_signed
from tests.servers.fault_proxy import (
    TRICKLES,
    Answer,
    Dropped,
    Fault,
    FaultProxy,
    drop,
    endless,
    listening,
)
from tests.servers.vault import asking, calls, on_sign, refusal, signature

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import LeakWatch


# -- naming a key and a server --------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "hashivault:",
        "hashivault://",
        "hashivault:///d1",
        "hashivault://d1/x",
        "hashivault://..",
        "hashivault://d1?mount=../sys",
        "hashivault://d1?mount=a//b",
        "hashivault://d1?version=latest",
        "hashivault://d1?version=0",
        "hashivault://d1?token=x",
    ],
)
def test_bad_uri_is_refused(uri: str) -> None:
    with pytest.raises(errors.KeyUriError):
        open_signer(uri)


@pytest.mark.parametrize(
    "options",
    [
        {"address": "http://vault.example.com:8200"},
        {"address": "vault.example.com"},
        {"address": "https://user:pass@vault.example.com"},
        {"address": "https://127.0.0.1:1", "ca_file": "/missing.pem"},
        {"role_id": "r"},
        {"secret_id_source": "env:X"},
        {"role_id": "r", "secret_id_source": "env:X", "token_source": "env:Y"},
        {"role_id": "r", "secret_id_source": "env:X", "auth_mount": "../x"},
    ],
)
def test_bad_settings_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_signer("hashivault://d1", **options)  # type: ignore[arg-type]


def test_mount_and_namespace(server: vault.Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    server.api("POST", "sys/namespaces/bank")
    server.api("POST", "bank/sys/mounts/keys/d1", type="transit")
    server.api("POST", "bank/keys/d1/keys/main", type="ecdsa-p256")
    monkeypatch.setenv("VAULT_TOKEN", vault.ROOT_TOKEN)
    with pytest.raises(errors.KeyNotFoundError):
        open_signer("hashivault://main?mount=keys/d1")
    with open_signer("hashivault://main?mount=keys/d1", namespace="bank") as signer:
        signs(signer)
    monkeypatch.setenv("VAULT_NAMESPACE", "bank")
    with open_signer("hashivault://main?mount=keys/d1") as signer:
        signs(signer)


def test_tls_is_verified(server: vault.Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_ADDR", server.tls_url)
    with pytest.raises(errors.SignerUnavailable, match="TLS") as refused:
        open_signer("hashivault://d1")
    assert not refused.value.retryable
    monkeypatch.setenv("VAULT_CACERT", str(server.ca_file))
    with open_signer("hashivault://d1") as signer:
        signs(signer)


def test_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, address=None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with listening(serve) as port:
        named, other = f"https://localhost:{port}", f"https://127.0.0.1:{port}"
        with pytest.raises(errors.AccessDeniedError):
            open_signer("hashivault://d1", address=named, ca_file=str(certificate))
        with pytest.raises(errors.SignerUnavailable, match="TLS") as refused:
            open_signer("hashivault://d1", address=other, ca_file=str(certificate))
    assert not refused.value.retryable


@pytest.mark.usefixtures("asked_once")
def test_handshake_that_breaks_off_may_succeed_later() -> None:
    with listening(drop) as port, pytest.raises(errors.SignerUnavailable, match="TLS") as refused:
        open_signer("hashivault://d1", address=f"https://127.0.0.1:{port}")
    assert refused.value.retryable


def test_environment_of_requests_is_not_used(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "session-keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    with open_signer("hashivault://d1") as signer:
        signs(signer)
    assert not proxy.requests
    assert not keys.exists()


def test_session_keys_of_tls_are_not_logged(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "session-keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    with open_signer(
        "hashivault://d1", address=server.tls_url, ca_file=str(server.ca_file)
    ) as signer:
        signs(signer)
    assert not keys.exists()


def test_kept_connections_are_kept_alive(server: vault.Vault) -> None:
    for address in (server.url, server.tls_url):
        with open_signer("hashivault://d1", address=address, ca_file=str(server.ca_file)) as signer:
            assert isinstance(signer._backend, VaultBackend)
            manager = signer._backend._clients.get().http._http._managers["https"]
            pool = manager.connection_from_url(address)
            connection = pool._get_conn()
            try:
                assert vars(connection)["sock"].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            finally:
                pool._put_conn(connection)
            signs(signer)


# -- keys that are refused, versions that are pinned ----------------------------------------------


@pytest.mark.parametrize("kind", ["ecdsa-p384", "rsa-2048", "ed25519", "aes256-gcm96", "hmac"])
def test_key_of_another_kind_is_refused(server: vault.Vault, kind: str) -> None:
    server.make_key(kind, type=kind, **({"key_size": 32} if kind == "hmac" else {}))
    with pytest.raises(errors.InvalidKeyError, match=kind):
        open_signer(f"hashivault://{kind}")


def test_unknown_key_version_or_mount_is_not_found() -> None:
    for uri in ("hashivault://nobody", "hashivault://d1?version=7"):
        with pytest.raises(errors.KeyNotFoundError) as refused:
            open_signer(uri)
        assert refused.value.hint
    with pytest.raises(errors.AccessDeniedError):
        open_signer("hashivault://d1?mount=elsewhere")


def test_new_version_changes_nothing_for_a_running_signer(server: vault.Vault) -> None:
    server.make_key("rotated")
    with open_signer("hashivault://rotated") as signer:
        server.api("POST", "transit/keys/rotated/rotate")
        signs(signer)
        assert isinstance(signer._backend, VaultBackend)
        assert signer._backend.version == 1
        with open_signer("hashivault://rotated") as newer:
            assert newer.public_key != signer.public_key
            signs(newer)
        with open_signer("hashivault://rotated?version=1") as older:
            assert older.public_key == signer.public_key
            signs(older)
        server.api("POST", "transit/keys/rotated/config", min_encryption_version=2)
        with pytest.raises(errors.KeyDisabledError):
            signer.sign(b"m")
        with pytest.raises(errors.KeyDisabledError, match="min_encryption_version"):
            open_signer("hashivault://rotated?version=1")


def test_archived_and_trimmed_versions_are_told_as_that(server: vault.Vault) -> None:
    server.make_key("archived")
    with open_signer("hashivault://archived?version=1") as signer:
        server.api("POST", "transit/keys/archived/rotate")
        server.api("POST", "transit/keys/archived/config", min_decryption_version=2)
        with pytest.raises(errors.KeyDisabledError) as refused:
            signer.sign(b"m")
        assert "archived" in refused.value.hint
        with pytest.raises(errors.KeyDisabledError, match="archived"):
            open_signer("hashivault://archived?version=1")
        server.api("POST", "transit/keys/archived/config", min_encryption_version=2)
        server.api("POST", "transit/keys/archived/trim", min_available_version=2)
        with pytest.raises(errors.KeyDisabledError):
            signer.sign(b"m")
        with pytest.raises(errors.KeyDisabledError, match="trimmed"):
            open_signer("hashivault://archived?version=1")
        assert not refused.value.retryable


def test_soft_deleted_key_is_told_as_that(server: vault.Vault) -> None:
    server.make_key("soft")
    with open_signer("hashivault://soft") as signer:
        server.api("DELETE", "transit/keys/soft/soft-delete")
        for attempt in (lambda: signer.sign(b"m"), lambda: open_signer("hashivault://soft")):
            with pytest.raises(errors.KeyDisabledError, match="soft-deleted") as refused:
                attempt()
            assert not refused.value.retryable
        server.api("POST", "transit/keys/soft/soft-delete-restore")
        signs(signer)


def test_key_that_is_deleted_or_made_anew_under_way(server: vault.Vault) -> None:
    server.make_key("replaced")
    server.api("POST", "transit/keys/replaced/config", deletion_allowed=True)
    with open_signer("hashivault://replaced") as signer:
        server.api("DELETE", "transit/keys/replaced")
        with pytest.raises(errors.KeyNotFoundError):
            signer.sign(b"m")
        server.make_key("replaced")
        with pytest.raises(errors.InvalidSignatureError):
            signer.sign(b"m")
        with pytest.raises(errors.KeyMismatchError):
            signer.custody()


# -- answers that went wrong ----------------------------------------------------------------------

_SEALED = refusal(503, "Vault is sealed")
_BAD = errors.InvalidSignatureError

FAULTS: list[tuple[str, Fault, type[errors.D1SignerError], bool]] = [
    ("sealed", _SEALED, errors.SignerUnavailable, True),
    ("internal", refusal(500, "internal error"), errors.SignerUnavailable, True),
    ("page-502", page(502, b"<html>bad gateway</html>"), errors.SignerUnavailable, True),
    ("standby", refusal(473), errors.SignerUnavailable, True),
    ("behind", refusal(412, "required index state not present"), errors.SignerUnavailable, True),
    ("quota", refusal(429, "rate limit quota exceeded"), errors.SignerThrottled, True),
    ("denied", refusal(403, "permission denied"), errors.AccessDeniedError, False),
    ("expired", refusal(403, "permission denied", "invalid token"), errors.LoginError, False),
    ("gone", refusal(404), errors.KeyNotFoundError, False),
    ("unknown-key", refusal(400, "signing key not found"), errors.KeyNotFoundError, False),
    ("bad-request", refusal(400, "something new"), errors.SignerError, False),
    ("method", refusal(405, "unsupported operation"), errors.SignerError, False),
    ("errors-no-list", page(400, b'{"errors": "text"}'), errors.SignerError, False),
    ("page-200", page(200, b"<html>log in</html>"), errors.IntegrityError, True),
    ("list-200", page(200, b"[]"), errors.IntegrityError, True),
    ("empty-200", page(200, b""), errors.IntegrityError, True),
    ("no-data", page(200, b'{"data": null}'), errors.IntegrityError, True),
    ("huge", page(200, b" " * (1 << 21)), errors.IntegrityError, True),
    ("dropped", dropped, errors.SignerUnavailable, True),
    ("cut-short", cut_short, errors.SignerUnavailable, True),
    ("truncated", signature(lambda text: text[:-4]), errors.IntegrityError, True),
    ("padded", signature(lambda text: text + "=="), errors.IntegrityError, True),
    ("number", signature(lambda _: 7), errors.IntegrityError, True),
    ("other-scheme", signature(lambda text: "x" + text), errors.IntegrityError, True),
    ("version", signature(lambda text: text.replace(":v1:", ":v2:")), errors.KeyMismatchError,
     False),
    ("flipped", signature(lambda text: text[:20] + ("A" if text[20] != "A" else "B") + text[21:]),
     _BAD, False),
    ("zeros", signature(lambda _: "vault:v1:" + "A" * 86), _BAD, False),
    ("other-key", asking("/v1/transit/sign/other/sha2-256"), _BAD, False),
    ("other-digest", asking(input=base64.b64encode(bytes(32)).decode()), _BAD, False),
    ("hashed-again", asking(prehashed=False), _BAD, False),
    ("der", asking(marshaling_algorithm="asn1"), errors.IntegrityError, True),
]  # fmt: skip


@pytest.mark.usefixtures("asked_once")
@pytest.mark.parametrize(
    ("fault", "error", "retryable"), [pytest.param(*rest, id=name) for name, *rest in FAULTS]
)
def test_fault_is_refused_with_our_own_error(
    signer: Signer,
    proxy: FaultProxy,
    token: str,
    fault: Fault,
    error: type[errors.D1SignerError],
    retryable: bool,
) -> None:
    proxy.fault = on_sign(fault)
    with pytest.raises(error) as refused:
        signer.sign(b"m")
    assert type(refused.value) is error
    assert refused.value.retryable is retryable
    assert refused.value.hint or error is _BAD
    assert type(refused.value.__context__).__module__.partition(".")[0] != "urllib3"
    assert token not in repr(refused.value.to_dict())
    proxy.fault = None
    signs(signer)


@pytest.mark.usefixtures("asked_once")
def test_redirect_is_not_followed_and_the_token_stays(
    signer: Signer, proxy: FaultProxy, server: vault.Vault
) -> None:
    with server.proxy() as elsewhere:
        location = f"{elsewhere.url}/v1/transit/sign/d1/sha2-256"
        proxy.fault = on_sign(refusal(307, Location=location))
        with pytest.raises(errors.SignerUnavailable, match='redirects to "http://127'):
            signer.sign(b"m")
        assert not elsewhere.requests


def test_kept_connection_that_was_closed_is_replaced_once(
    signer: Signer, proxy: FaultProxy
) -> None:
    drops = iter([True])

    def once(request: Any, forward: Any) -> Answer:
        if next(drops, False):
            raise Dropped
        return forward(request)  # type: ignore[no-any-return]

    proxy.fault = once
    signs(signer)
    assert len(calls(proxy)) == 3


@pytest.mark.usefixtures("asked_once")
def test_no_server_there() -> None:
    with pytest.raises(errors.SignerUnavailable) as refused:
        open_signer("hashivault://d1", address="http://127.0.0.1:9")
    assert refused.value.retryable


@pytest.mark.usefixtures("asked_once")
@pytest.mark.parametrize("kind", ["token", "approle"])
def test_no_answer_at_all_and_no_secret_in_the_error(leak_watch: LeakWatch, kind: str) -> None:
    secret = "hvs.not-to-be-seen-anywhere"
    leak_watch.note(secret)
    options: dict[str, Any] = (
        {"token_source": lambda: secret}
        if kind == "token"
        else {"role_id": "r", "secret_id_source": lambda: secret}
    )
    with listening(drop) as port, pytest.raises(errors.SignerUnavailable):
        open_signer("hashivault://d1", address=f"http://127.0.0.1:{port}", **options)


def test_header_lines_that_cannot_be_read_are_not_logged(
    token: str, leak_watch: LeakWatch, caplog: pytest.LogCaptureFixture
) -> None:
    leak_watch.note(token)

    def echo(connection: socket.socket) -> None:
        connection.recv(65536)
        head = f"HTTP/1.1 403 Forbidden\r\nnot a header {token}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    with listening(echo) as port, pytest.raises(errors.AccessDeniedError):
        open_signer("hashivault://d1", address=f"http://127.0.0.1:{port}")
    assert "tls.malformed_headers" in caplog.text


# -- calls, time, threads -------------------------------------------------------------------------


def test_one_call_for_each_signature_and_no_metadata(signer: Signer, proxy: FaultProxy) -> None:
    for _ in range(25):
        signer.sign(b"the message itself")
    assert calls(proxy) == ["GET transit/keys/d1"] + ["POST transit/sign/d1/sha2-256"] * 25
    assert b"the message itself" not in base64.b64decode(
        json.loads(proxy.requests[-1].body)["input"]
    )


def test_deadline_bounds_a_slow_answer_and_nothing_is_sent_after_it(
    signer: Signer, proxy: FaultProxy
) -> None:
    release, answered = threading.Event(), threading.Event()

    def hold_and_drop(*_: object) -> Answer:
        release.wait(30)
        answered.set()
        raise Dropped

    proxy.fault = on_sign(hold_and_drop)
    asked = len(proxy.requests)
    with pytest.raises(errors.SignerTimeout):
        signer.sign(b"m", timeout=0.2)
    release.set()
    answered.wait(10)
    proxy.fault = None
    signs(signer)
    assert len(proxy.requests) == asked + 2
    assert not [t for t in threading.enumerate() if t.name == "d1-signer-call"]


def test_kept_connection_that_closes_after_the_deadline_is_not_replaced(
    signer: Signer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock passes the deadline while the first attempt is under way.
    offset = 0.0
    monotonic = time.monotonic

    def drop_late(*_: object) -> Answer:
        nonlocal offset
        offset = 100.0
        raise Dropped

    monkeypatch.setattr(
        "d1_signer.transport.deadlines.time.monotonic", lambda: monotonic() + offset
    )
    proxy.fault = on_sign(drop_late)
    with pytest.raises(errors.SignerTimeout):
        signer.sign(b"m", timeout=30)
    assert len([call for call in calls(proxy) if "/sign/" in call]) == 1


@pytest.mark.stress
@pytest.mark.parametrize("serve", TRICKLES.values(), ids=TRICKLES)
def test_answer_that_trickles_in_ends_by_the_time_limit(
    serve: Callable[[socket.socket], None],
) -> None:
    with listening(serve) as port:
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            open_signer("hashivault://d1", address=f"http://127.0.0.1:{port}", timeout=0.5)
        assert time.monotonic() - started < 5.0


def test_answer_without_an_end_is_refused() -> None:
    with listening(endless) as port, pytest.raises(errors.IntegrityError, match="1 MiB"):
        open_signer("hashivault://d1", address=f"http://127.0.0.1:{port}")


def test_no_fork_happens_in_a_handshake(server: vault.Vault) -> None:
    # OpenSSL's locks would stay locked in the child.
    trusting: dict[str, Any] = {"address": server.tls_url, "ca_file": str(server.ca_file)}
    with open_signer("hashivault://d1", **trusting) as signer:
        signer._backend._clients.get().http._http.forget()  # type: ignore[attr-defined]
        fork_gate._before_fork()
        try:
            with pytest.raises(errors.SignerTimeout):
                signer.sign(b"m", timeout=0.1)
            with pytest.raises(errors.SignerUnavailable, match="forked") as refused:
                open_signer("hashivault://d1", timeout=0.1, **trusting)
            assert refused.value.retryable
        finally:
            fork_gate._after_fork_in_parent()
        signs(signer)


def test_read_timeout_bounds_a_slow_answer(proxy: FaultProxy) -> None:
    release = threading.Event()
    with open_signer("hashivault://d1", address=proxy.url, read_timeout=0.5) as signer:
        proxy.fault = on_sign(held(release))
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m")
        release.set()


def test_32_threads(signer: Signer) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda _: signs(signer), range(320)))


# -- custody, making keys -------------------------------------------------------------------------


def test_exportable_keys_do_not_meet_the_policy(server: vault.Vault, signer: Signer) -> None:
    evidence = signer.custody().evidence
    assert (evidence.exportable, evidence.generated_in_place, evidence.hardware) == (
        False,
        True,
        False,
    )
    CustodyPolicy(non_exportable=True, generated_in_place=True).check(evidence)
    for name, flag in (("exported", "exportable"), ("backed-up", "allow_plaintext_backup")):
        server.make_key(name, **{flag: True})
        with open_signer(f"hashivault://{name}") as open_one:
            facts = {fact.name: fact.value for fact in open_one.custody().evidence.facts}
            assert facts[flag] is True
        with pytest.raises(errors.CustodyError):
            open_signer(f"hashivault://{name}", custody_policy=CustodyPolicy(non_exportable=True))
    with pytest.raises(errors.CustodyError):
        open_signer("hashivault://d1", custody_policy=CustodyPolicy(hardware=True))


def test_key_that_is_made_exportable_later_is_reported(server: vault.Vault) -> None:
    server.make_key("opened-up")
    with open_signer("hashivault://opened-up") as signer:
        assert signer.custody().evidence.exportable is False
        server.api("POST", "transit/keys/opened-up/config", exportable=True)
        assert signer.custody().evidence.exportable is True


def test_imported_flag_is_reported(signer: Signer, proxy: FaultProxy) -> None:
    def imported(request: Any, forward: Any) -> Answer:
        answer: Answer = forward(request)
        told = json.loads(answer.body)
        told["data"]["imported_key"] = True
        return replace(answer, body=json.dumps(told).encode())

    proxy.fault = imported
    assert signer.custody().evidence.generated_in_place is False


def test_generated_key_signs_and_is_never_overwritten(server: vault.Vault) -> None:
    made = generate_key("hashivault://made", token_source=lambda: vault.ROOT_TOKEN)
    assert made.uri == "hashivault://made?version=1"
    with open_signer(made.uri) as signer:
        assert signer.public_key == made.public_key
        signs(signer)
        CustodyPolicy(non_exportable=True).check(signer.custody().evidence)
    with pytest.raises(errors.KeyExistsError):
        generate_key("hashivault://made", token_source=lambda: vault.ROOT_TOKEN)
    assert server.api("GET", "transit/keys/made")["data"]["latest_version"] == 1
    with pytest.raises(errors.KeyUriError):
        generate_key("hashivault://made?version=2", token_source=lambda: vault.ROOT_TOKEN)
    with pytest.raises(errors.AccessDeniedError) as refused:
        generate_key("hashivault://not-allowed")  # with a token that may only sign
    assert refused.value.details["phase"] == "generation"

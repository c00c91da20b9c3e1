# SPDX-License-Identifier: Apache-2.0
"""Doors that are further away: TLS handshakes, tokens, members of a set, real devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d1_signer import (
    AuditTrail,
    AuditUnavailable,
    ClientCertificate,
    CustodyError,
    CustodyPolicy,
    Environment,
    LazySigner,
    LoginError,
    SignerSet,
    TokenFetcher,
    generate_key,
    open_signer,
)
from d1_signer.backends.pkcs11.returns import Ckr
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SignerConformance, SoftHsmToken
from tests.audit.trails import ORIGIN, findings, records, sealing_signer, watched_signer
from tests.pkcs11.shim import Call, Shim
from tests.signing.backends import KeyBackend


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


def begun(place: Path, action: str) -> list[dict[str, object]]:
    return [record for record in records(place) if record.get("action") == action]


def of_event(place: Path, event: str) -> list[dict[str, object]]:
    return [record for record in records(place) if record["event"] == event]


def test_a_token_has_the_records_of_its_assertion_and_of_its_handshake(place: Path) -> None:
    with (
        Sandbox("issuer") as sandbox,
        AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail,
        watched_signer(trail) as signer,
        open_signer(f"file://{sandbox.client_key}", trail=trail) as client,
    ):
        sandbox.register_key("bank-2026", signer.public_key.jwk())
        with TokenFetcher(
            signer,
            issuer_id="issuer",
            environment=Environment.of(sandbox.base_url),
            client_certificate=ClientCertificate(sandbox.client_certificate, client),
            ca_file=sandbox.ca_file,
        ) as fetcher:
            fetcher.token()
            (assertion,) = sandbox.exchanges[-1:]
            assert assertion.status == 200
    purposes = {record["purpose"]: record for record in begun(place, "sign")}
    assert set(purposes) == {"d1-assertion", "tls-client-handshake"}
    assert purposes["tls-client-handshake"]["references"] == [["server", "127.0.0.1"]]
    assert [name for name, _ in purposes["d1-assertion"]["references"]] == [  # type: ignore[attr-defined]
        *("iss", "jti", "correlation_id")
    ]
    assert findings(place) == []


def test_a_set_does_not_turn_to_its_next_member_for_the_trail(place: Path) -> None:
    trail = AuditTrail(place, origin=ORIGIN)
    first, second = watched_signer(trail), watched_signer(trail)
    lazy = LazySigner(lambda: second, kid=second.kid, public_key=second.public_key)
    with SignerSet([first, lazy]) as signers:
        signers.attempt(lambda signer: signer.sign(b"x"))
        for file in place.iterdir():
            file.rename(place.with_name(file.name))
        place.rmdir()
        trail._processes.clear()
        with pytest.raises(AuditUnavailable):
            signers.attempt(lambda signer: signer.sign(b"x"))
        assert [member.failures for member in signers.health()] == [0, 0]
        place.mkdir()
        signers.attempt(lambda signer: signer.sign(b"x"))
    trail.close()


def test_the_device_is_never_asked_more_often_than_was_recorded(
    place: Path, token: SoftHsmToken, shim: Shim
) -> None:
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        with open_signer(token.uri, module_path=shim.path, trail=trail) as signer:
            for number in range(20):
                if number % 5 == 4:
                    shim.fail(Call.SIGN, 0x30, times=1)  # CKR_DEVICE_ERROR: it recovers
                signer.sign(b"x")
            signer.custody()
        asked = shim.calls(Call.SIGN)
        recorded = len(begun(place, "sign")) + len(begun(place, "open"))
        # A call that the device failed is made again within one signature.
        assert asked - 4 <= recorded == 21
        generate_key(f"pkcs11:token={token.label};object=new", **_pin(token, shim), trail=trail)
    assert len(begun(place, "generate-key")) == 1
    assert findings(place) == []


def test_a_key_that_is_opened_anew_and_held_again_is_a_record(
    place: Path, token: SoftHsmToken, shim: Shim
) -> None:
    policy = CustodyPolicy(never_exportable=True)
    limits: dict[str, Any] = {"max_sessions": 1, "timeout": 20}
    with (
        AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail,
        open_signer(
            token.uri, module_path=shim.path, custody_policy=policy, trail=trail, **limits
        ) as signer,
    ):
        signer.sign(b"x")
        assert [record["outcome"] for record in of_event(place, "policy")] == ["met"]
        shim.fail(Call.SIGN, Ckr.SESSION_HANDLE_INVALID, times=1)
        signer.sign(b"x")
        shim.script("attr:164/3=00")  # from now on the token denies CKA_NEVER_EXTRACTABLE
        shim.fail(Call.SIGN, Ckr.SESSION_HANDLE_INVALID, times=1)
        with pytest.raises(CustodyError):
            signer.sign(b"x")
    decisions = of_event(place, "policy")
    assert [record["outcome"] for record in decisions] == ["met", "met", "custody"]
    for record in decisions:
        assert record["demands"] == ["never-exportable"]
        assert record["thumbprint"] == signer.public_key.thumbprint()
    ends = [record["outcome"] for record in of_event(place, "end")]
    assert ends == ["done", "done", "done", "custody"]
    assert findings(place) == []


def test_a_refused_pin_is_a_record(place: Path, token: SoftHsmToken) -> None:
    uri = f"pkcs11:token={token.label};object=d1"
    wrong = place.with_name("wrong-pin")
    wrong.write_text("87654321")
    wrong.chmod(0o600)
    with AuditTrail(place, origin=ORIGIN) as trail, pytest.raises(LoginError):
        open_signer(uri, module_path=token.module_path, pin_source=f"file:{wrong}", trail=trail)
    outcomes = [record["outcome"] for record in records(place) if record["event"] == "end"]
    assert outcomes == ["login"]
    assert b"87654321" not in b"".join(
        file.read_bytes() for file in place.rglob("*") if file.is_file()
    )


def _pin(token: SoftHsmToken, shim: Shim) -> dict[str, str]:
    return {"module_path": shim.path, "pin_source": f"file:{token.pin_file}"}


def test_what_the_conformance_suite_asks_of_the_backend_is_recorded(place: Path) -> None:
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        signer = watched_signer(trail)
        backend = signer._backend
        assert isinstance(backend, KeyBackend)
        suite = SignerConformance()
        suite.test_backend_answers_the_encoding_it_declares(signer)
        suite.test_digest_is_signed_as_it_is(signer)
        signer.close()
    assert len(begun(place, "sign")) == len(backend.asked) == 9

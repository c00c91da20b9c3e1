# SPDX-License-Identifier: Apache-2.0
"""One login for a token, no refused PIN tried again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag

from d1_signer.backends.pkcs11.keys import P256
from d1_signer.errors import ConfigurationError, LoginError, SecretSourceError, SignerUnavailable
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

_WRONG = "wrong-pin-of-the-test"
_FINAL_TRY, _LOCKED, _PIN_PAD = 0x20000, 0x40000, 0x100
_UNCLEAR = (0x05, 0x06, 0x80000123)  # CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED, a vendor's own


def test_refused_pin_is_tried_once_in_a_process(token: SoftHsmToken, shim: Shim) -> None:
    for _ in range(3):
        with pytest.raises(LoginError) as raised:
            open_signer(token.uri, module_path=shim.path, pin_source=lambda: _WRONG)
        assert raised.value.details["step"] == "login"
        assert not raised.value.retryable
    assert shim.calls(Call.LOGIN) == 1
    assert shim.sessions == 0
    with open_signer(token.uri, module_path=shim.path) as signer:  # a corrected one is
        signer.sign(b"message")
    assert shim.calls(Call.LOGIN) == 2


@pytest.mark.parametrize("flag", [_FINAL_TRY, _LOCKED])
def test_token_that_would_lock_is_left_alone(token: SoftHsmToken, shim: Shim, flag: int) -> None:
    shim.add_token_flags(flag)
    with pytest.raises(LoginError):
        open_signer(token.uri, module_path=shim.path)
    assert shim.calls(Call.LOGIN) == 0
    assert shim.sessions == 0


def test_signers_share_one_login(token: SoftHsmToken, shim: Shim) -> None:
    with (
        open_signer(token.uri, module_path=shim.path) as one,
        open_signer(token.uri, module_path=shim.path) as two,
    ):
        one.sign(b"message")
        two.sign(b"message")
        assert shim.calls(Call.LOGIN) == 1
        assert shim.calls(Call.INITIALIZE) == 1
        assert shim.sessions == 3
        one.close()
        two.sign(b"message")
        assert shim.sessions == 2
    assert shim.sessions == 0
    assert shim.calls(Call.FINALIZE) == 1


def test_second_signer_with_another_pin_is_refused(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as first:
        # The module itself would answer "already logged in" to any PIN.
        with pytest.raises(LoginError):
            open_signer(token.uri, module_path=shim.path, pin_source=lambda: _WRONG)
        assert shim.calls(Call.LOGIN) == 1
        first.sign(b"message")


def test_login_by_other_code_in_the_process_is_success(token: SoftHsmToken) -> None:
    others = pkcs11.lib(token.module_path)
    session = others.get_token(token_label=token.label).open(user_pin=token.pin)
    try:
        with open_signer(token.uri) as signer:
            signer.public_key.verify(signer.sign(b"message"), b"message")
            facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
            assert facts["locking"] == "lock"  # its promises to the module are unknown
    finally:
        session.close()
        others.finalize()


def test_pin_pad(token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"pkcs11:token={token.label};object=d1"
    with pytest.raises(LoginError):
        open_signer(uri, module_path=shim.path, protected_authentication_path=True)
    shim.add_token_flags(_PIN_PAD)
    monkeypatch.setenv("SHIM_PIN", token.pin)  # what a person enters
    with open_signer(uri, module_path=shim.path, protected_authentication_path=True) as signer:
        signer.sign(b"message")


def test_user_type_of_a_vendor(token: SoftHsmToken, shim: Shim) -> None:
    with pytest.raises(LoginError):
        open_signer(token.uri, module_path=shim.path, user_type=0x80000001)
    assert shim.user_type == 0x80000001


def test_missing_pin_says_so(token: SoftHsmToken) -> None:
    with pytest.raises(LoginError) as raised:
        open_signer(f"pkcs11:token={token.label};object=d1", module_path=token.module_path)
    assert "pin-source" in raised.value.hint


def test_unreadable_pin_source_is_the_login_step(token: SoftHsmToken, tmp_path: Path) -> None:
    with pytest.raises(SecretSourceError) as raised:
        open_signer(token.uri, pin_source=f"file:{tmp_path}/none")
    assert raised.value.details["step"] == "login"


def test_pin_is_asked_for_in_the_callers_thread(token: SoftHsmToken) -> None:
    # Where a person types it, no time limit of the module's runs, and Ctrl-C arrives.
    asked: list[threading.Thread] = []

    def source() -> str:
        asked.append(threading.current_thread())
        return token.pin

    with open_signer(token.uri, pin_source=source, timeout=20) as signer:
        signer.sign(b"message")
    assert asked[0] is threading.current_thread()
    generate_key(token.key_uri("new"), pin_source=source)
    assert asked[-1] is threading.current_thread()


def test_pin_from_the_uri_itself(token: SoftHsmToken) -> None:
    uri = f"{token.uri.partition('?')[0]}?pin-value={token.pin}"
    with (
        pytest.warns(UserWarning, match="pin-value"),
        open_signer(uri, module_path=token.module_path) as signer,
    ):
        signer.sign(b"message")


@pytest.fixture
def careful(token: SoftHsmToken) -> str:
    """URI of a key that wants its PIN with each signature."""
    session = (
        pkcs11.lib(token.module_path)
        .get_token(token_label=token.label)
        .open(rw=True, user_pin=token.pin)
    )
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
    )
    parameters.generate_keypair(
        label="careful",
        id=b"careful",
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        private_template={Attribute.ALWAYS_AUTHENTICATE: True},
    )
    session.close()
    pkcs11.lib(token.module_path).finalize()
    return token.key_uri("careful")


def test_key_that_wants_its_pin_with_each_signature(careful: str, shim: Shim) -> None:
    with open_signer(careful, module_path=shim.path) as signer:
        before = shim.calls(Call.LOGIN)
        _sign_twice(signer)
        assert shim.calls(Call.LOGIN) == before + 2
        assert shim.user_type == 2  # CKU_CONTEXT_SPECIFIC


@pytest.mark.parametrize("code", [0xA0, 0xA3, *_UNCLEAR])  # CKR_PIN_INCORRECT, CKR_PIN_EXPIRED
def test_pin_that_fails_at_a_signature_is_sent_once(careful: str, shim: Shim, code: int) -> None:
    with open_signer(careful, module_path=shim.path) as signer:
        before = shim.calls(Call.LOGIN)
        shim.fail(Call.LOGIN, code)
        with ThreadPoolExecutor(4) as threads:
            attempts = [threads.submit(signer.sign, b"message") for _ in range(8)]
        assert {type(attempt.exception()) for attempt in attempts} == {LoginError}
        assert shim.calls(Call.LOGIN) == before + 1
        shim.heal()
    for _ in range(2):
        with pytest.raises(LoginError):
            open_signer(careful, module_path=shim.path)
    assert shim.calls(Call.LOGIN) == before + 1
    assert shim.sessions == 0


@pytest.mark.parametrize("flag", [_FINAL_TRY, _LOCKED])
def test_signature_does_not_risk_the_last_try(careful: str, shim: Shim, flag: int) -> None:
    with open_signer(careful, module_path=shim.path) as signer:
        before = shim.calls(Call.LOGIN)
        shim.add_token_flags(flag)
        with pytest.raises(LoginError):
            signer.sign(b"message")
        assert shim.calls(Call.LOGIN) == before
        shim.add_token_flags(0)
        _sign_twice(signer)


def test_pin_pad_with_each_signature(
    careful: str, token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim.add_token_flags(_PIN_PAD)
    monkeypatch.setenv("SHIM_PIN", token.pin)
    uri = careful.partition("?")[0]
    with open_signer(uri, module_path=shim.path, protected_authentication_path=True) as signer:
        before = shim.calls(Call.LOGIN)
        _sign_twice(signer)
        assert shim.calls(Call.LOGIN) == before + 2


@pytest.mark.parametrize("code", _UNCLEAR)
def test_pin_is_sent_once_to_a_token_that_fails_without_a_reason(
    token: SoftHsmToken, shim: Shim, code: int
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        before = shim.calls(Call.LOGIN)
        shim.fail(Call.LOGIN, code)
        shim.fail(Call.SIGN, 0x30, times=1)
        for _ in range(3):
            with pytest.raises(LoginError):
                signer.sign(b"message")
        assert shim.calls(Call.LOGIN) == before + 1


def test_pin_is_sent_once_for_each_initialisation_to_a_lost_device(
    token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        logins, initializations = shim.calls(Call.LOGIN), shim.calls(Call.INITIALIZE)
        shim.fail(Call.LOGIN, 0x32)  # CKR_DEVICE_REMOVED
        shim.fail(Call.SIGN, 0x30, times=1)
        for _ in range(3):
            with pytest.raises(SignerUnavailable):
                signer.sign(b"message")
        module = signer._backend._module  # type: ignore[attr-defined]
        errors = []
        for _ in range(2):
            with pytest.raises(pkcs11.exceptions.DeviceRemoved) as raised:
                module.run(lambda: _log_in(signer), None)
            errors.append(raised.value)
        assert errors[0] is not errors[1], "one that is raised again grows its traceback"
        sent = shim.calls(Call.LOGIN) - logins
        assert 1 <= sent <= shim.calls(Call.INITIALIZE) - initializations
        shim.heal()
        module.reinitialize(module.generation, None)
        signer._backend._circuit.closed_by_success()  # type: ignore[attr-defined]
        _sign_twice(signer)


def _log_in(signer: Signer) -> None:
    backend: Any = signer._backend
    backend._access._ensure_login(backend._access.token())


def _sign_twice(signer: Signer) -> None:
    for _ in range(2):
        signer.public_key.verify(signer.sign(b"message"), b"message")


def test_pin_that_changes_while_logged_in(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path, max_sessions=1) as signer:
        pin, wrong = token.pin, "another-pin-of-the-test"
        token.pin_file.write_text(wrong)
        shim.fail(Call.SIGN, 0xB3, times=1)
        signer.sign(b"message")  # a new session; the login stands
        shim.fail(Call.SIGN, 0x30, times=1)
        for _ in range(3):
            with pytest.raises(LoginError):
                signer.sign(b"message")  # everything new, the PIN read again: tried once
        assert shim.calls(Call.LOGIN) == 2
        token.pin_file.write_text(pin)
        signer.sign(b"message")


@pytest.mark.parametrize(
    ("locking", "told", "initialized"), [("auto", "os", 1), ("os", "os", 1), ("lock", "lock", 0)]
)
def test_locking_is_chosen_and_told(
    token: SoftHsmToken, shim: Shim, locking: str, told: str, initialized: int
) -> None:
    with open_signer(token.uri, module_path=shim.path, locking=locking) as signer:
        facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
        assert facts["locking"] == told
        assert shim.initialized_with_os_locking == initialized
        if told == "lock":
            with pytest.raises(ConfigurationError):
                open_signer(token.uri, module_path=shim.path, locking="os")


def test_module_that_cannot_lock_gets_one_lock(token: SoftHsmToken, shim: Shim) -> None:
    shim.fail(Call.INITIALIZE, 0xA, times=1)  # CKR_CANT_LOCK
    with open_signer(token.uri, module_path=shim.path) as signer:
        facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
        assert facts["locking"] == "lock"
    shim.fail(Call.INITIALIZE, 0xA, times=1)
    with pytest.raises(ConfigurationError):
        open_signer(token.uri, module_path=shim.path, locking="os")

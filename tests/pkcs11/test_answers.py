# SPDX-License-Identifier: Apache-2.0
"""Every answer that PKCS#11 allows to each call: a signature, or an error that says what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from d1_signer.backends.pkcs11.failures import MEANINGS, STEPS, Meaning, Recovery, meaning_of
from d1_signer.backends.pkcs11.returns import Ckr, name_of
from d1_signer.backends.pkcs11.session.pin import refused
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidSignatureError,
    KeyExistsError,
    LoginError,
    SignerError,
    SignerUnavailable,
)
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

PAGE = Path(__file__).parents[2] / "docs" / "pkcs11" / "answers.md"
VENDORS, UNKNOWN = 0x80000123, 0x999
CODES = [*(int(code) for code in Ckr if code != Ckr.OK), VENDORS, UNKNOWN]
HARMLESS = [Call.FINALIZE, Call.CLOSE_SESSION, Call.GET_INFO]
WHILE_OPENING = [
    Call.INITIALIZE,
    Call.GET_SLOT_LIST,
    Call.GET_SLOT_INFO,
    Call.GET_TOKEN_INFO,
    Call.OPEN_SESSION,
    Call.GET_SESSION_INFO,
    Call.LOGIN,
    Call.FIND_OBJECTS_INIT,
    Call.FIND_OBJECTS,
    Call.GET_ATTRIBUTE_VALUE,
    Call.SIGN_INIT,
    Call.SIGN,
]


def _called(call: Call) -> str:
    return "C_" + call.name.title().replace("_", "")


def _may_retry(meaning: Meaning) -> bool:
    return meaning.kind.default_retryable if meaning.retryable is None else meaning.retryable


def _attempt(token: SoftHsmToken, shim: Shim, **options: Any) -> D1SignerError | None:
    """Open, sign and close; the error, or None for a signature that verifies."""
    refused._digests.clear()
    try:
        with open_signer(token.uri, module_path=shim.path, **options) as signer:
            signer.public_key.verify(signer.sign(b"message"), b"message")
    except D1SignerError as error:
        return error
    return None


@pytest.mark.parametrize("call", WHILE_OPENING, ids=_called)
def test_each_return_value_of_each_call(token: SoftHsmToken, shim: Shim, call: Call) -> None:
    for code in CODES:
        shim.fail(call, code)
        error = _attempt(token, shim)
        shim.heal()
        told = f"{_called(call)} {name_of(code)}: {error!r}"
        if error is None:
            # Nothing is lost without it: who is logged in, and whether anything was told, is known
            # otherwise, or the call is made again in another way.
            assert call in {Call.LOGIN, Call.GET_SESSION_INFO, Call.INITIALIZE}, told
            continue
        assert error.hint, told
        if code == Ckr.CRYPTOKI_ALREADY_INITIALIZED and call == Call.INITIALIZE:
            assert "CKR_CRYPTOKI_NOT_INITIALIZED" in str(error), told  # which was a lie
            continue
        assert error.details["step"] == STEPS[_called(call)], told
        assert name_of(code) in str(error), told
        assert not error.retryable or _may_retry(meaning_of(code)), told
    assert _attempt(token, shim) is None
    assert shim.sessions == 0


@pytest.mark.parametrize("code", [0x07, 0x09, 0x0A, 0x54, 0x1A0, 0x1A1], ids=name_of)
def test_arguments_of_initialisation_that_are_refused(
    token: SoftHsmToken, shim: Shim, code: int
) -> None:
    shim.fail(Call.INITIALIZE, code, times=1)
    assert _attempt(token, shim) is None
    assert shim.calls(Call.INITIALIZE) == 2
    assert shim.initialized_with_os_locking == 1  # and then without


@pytest.mark.parametrize("isolation", ["none", "process"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, SignerUnavailable) for code in (0x02, 0x05, 0x06, 0x30, 0x31, 0x32, VENDORS)),
        *((code, ConfigurationError) for code in (0x07, 0x54, 0x70, UNKNOWN)),
    ],
    ids=str,
)
def test_an_initialisation_that_fails(
    token: SoftHsmToken, shim: Shim, code: int, kind: type[D1SignerError], isolation: str
) -> None:
    shim.fail(Call.INITIALIZE, code)
    error = _attempt(token, shim, isolation=isolation)
    assert type(error) is kind
    assert error.retryable is (kind is SignerUnavailable)
    told = {"step": "module", "call": "C_Initialize", "pkcs11": name_of(code)}
    assert error.details.items() >= told.items()
    shim.heal()
    assert _attempt(token, shim, isolation=isolation) is None


@pytest.mark.parametrize("call", [Call.SIGN_INIT, Call.SIGN], ids=_called)
def test_a_signature_that_fails_is_told_by_the_table(
    token: SoftHsmToken, shim: Shim, call: Call
) -> None:
    for code in CODES:
        shim.fail(call, code)
        error = _attempt(token, shim)
        shim.heal()
        meaning = meaning_of(code)
        assert type(error) is meaning.kind, f"{name_of(code)}: {error!r}"
        assert error.retryable == _may_retry(meaning)
        assert meaning.text in error.message
        told = {"step": "signature", "call": _called(call), "pkcs11": name_of(code)}
        assert error.details.items() >= told.items()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (Call.INITIALIZE, 0x05),
        (Call.GET_SLOT_LIST, 0x30),
        (Call.OPEN_SESSION, 0xB8),
        (Call.LOGIN, 0x103),
        (Call.FIND_OBJECTS, 0x54),
        (Call.SIGN_INIT, 0x68),
        (Call.SIGN, 0x200),
        (Call.SIGN, VENDORS),
    ],
    ids=str,
)
def test_a_hosting_process_tells_the_same(
    token: SoftHsmToken, shim: Shim, call: Call, code: int
) -> None:
    shim.fail(call, code)
    here = _attempt(token, shim)
    there = _attempt(token, shim, isolation="process")
    assert here is not None
    assert there is not None
    assert there.to_dict() == here.to_dict()


@pytest.mark.parametrize("code", [0xB7, 0xB8], ids=name_of)
def test_a_login_that_the_security_officer_is_in_the_way_of_may_be_tried_again(
    token: SoftHsmToken, shim: Shim, code: int
) -> None:
    shim.fail(Call.LOGIN, code, times=1)
    error = _attempt(token, shim)
    assert type(error) is LoginError
    assert not refused._digests  # the PIN was not looked at
    assert _attempt(token, shim) is None


@pytest.mark.parametrize("call", HARMLESS, ids=_called)
def test_a_call_whose_failure_costs_nothing(token: SoftHsmToken, shim: Shim, call: Call) -> None:
    for code in (Ckr.GENERAL_ERROR, Ckr.FUNCTION_NOT_SUPPORTED, Ckr.SESSION_CLOSED, VENDORS):
        shim.fail(call, code)
        # In a process of its own, since what is not closed or finalised there stays.
        assert _attempt(token, shim, isolation="process") is None
        shim.heal()


def test_a_search_that_does_not_end_is_told(token: SoftHsmToken, shim: Shim) -> None:
    shim.fail(Call.FIND_OBJECTS_FINAL, Ckr.GENERAL_ERROR)
    error = _attempt(token, shim)
    assert error is not None
    assert error.details == {
        "step": "key",
        "call": "C_FindObjectsInit",
        "pkcs11": "CKR_OPERATION_ACTIVE",
    }


@pytest.mark.parametrize("code", CODES, ids=name_of)
def test_each_return_value_of_key_generation(token: SoftHsmToken, shim: Shim, code: int) -> None:
    shim.fail(Call.GENERATE_KEY_PAIR, code)
    with pytest.raises(SignerError) as raised:
        generate_key(token.key_uri("new"), module_path=shim.path)
    assert raised.value.details["pkcs11"] == name_of(code)
    assert raised.value.details["step"] == "key"
    assert raised.value.retryable == _may_retry(meaning_of(code))
    assert shim.sessions == 0


def test_key_generation_leaves_out_what_is_refused(token: SoftHsmToken, shim: Shim) -> None:
    made = None
    for times, code in ((1, 0x13), (2, 0x05), (1, 0x12)):
        shim.fail(Call.GENERATE_KEY_PAIR, code, times=times)
        before = shim.calls(Call.GENERATE_KEY_PAIR)
        made = generate_key(token.key_uri(f"new{times}{code}"), module_path=shim.path)
        assert shim.calls(Call.GENERATE_KEY_PAIR) == before + times + 1
        with open_signer(made.uri, module_path=shim.path) as signer:
            assert signer.public_key == made.public_key
    assert made is not None
    with pytest.raises(KeyExistsError):
        generate_key(made.uri, module_path=shim.path)


@pytest.mark.parametrize("place", [2, 4, 5, 6, 12, 15, 18, 24, 26, 27, 42, 43], ids=hex)
def test_a_function_that_the_module_left_out(token: SoftHsmToken, shim: Shim, place: int) -> None:
    shim.script(f"null={place:x}")
    error = _attempt(token, shim)
    if place in {2, 15}:  # C_GetInfo and C_GetSessionInfo tell nothing that is needed
        assert error is None
    else:
        assert error is not None
        assert "CKR_FUNCTION_NOT_SUPPORTED" in str(error)
        assert not error.retryable


# -- answers that are CKR_OK and odd, and optional attributes ----------------------------------

ODD_AND_FINE = [
    "attr:202/3=rv:5",  # CKA_ALWAYS_AUTHENTICATE, which modules refuse as they like
    "attr:202/3=rv:30",
    "attr:202/3=rv:54",
    "attr:202/3=rv:7",
    "attr:202/3=rv:80000001",
    "attr:202/3=raw:6",
    "attr:202/3=len",
    "attr:202/3=0000000000000000",
    "attr:202/3=",
    "attr:100/3=rv:12",  # CKA_KEY_TYPE
    "attr:100/3=rv:54",
    "attr:100/3=len",
    "attr:100/3=",
    "attr:108/3=rv:12",  # CKA_SIGN
    "attr:108/3=",
    "attr:180/3=rv:12",  # CKA_EC_PARAMS
    "attr:180/3=1309736563703235367231",  # "secp256r1", as PKCS#11 v3.0 allows
    "attr:102/3=rv:12",  # CKA_ID
    "attr:3/3=rv:5",  # CKA_LABEL
    "attr:3/3=ffe9",
    "attr:100=small",  # CKR_BUFFER_TOO_SMALL to the question for a length
    "attr:181=small",
    "sign=room",
    "state=0",  # the session says that nobody is logged in, and is wrong
    "state=63",
    "token.clear=4",  # no CKF_LOGIN_REQUIRED
    "slot.empty",
    "slot.grow=2",
    "slot.shrink",
    "token.set=10000",  # CKF_USER_PIN_COUNT_LOW
]


@pytest.mark.parametrize("script", ODD_AND_FINE)
def test_an_odd_answer_that_costs_no_signature(
    token: SoftHsmToken, shim: Shim, script: str
) -> None:
    shim.script(script)
    assert _attempt(token, shim) is None


def test_a_module_that_tells_no_attribute_at_all(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path, isolation="process") as signer:
        public_key = signer.public_key.pem()
    shim.script("null=18")  # C_GetAttributeValue
    error = _attempt(token, shim, isolation="process")
    assert "CKA_KEY_TYPE (CKR_FUNCTION_NOT_SUPPORTED)" in str(error)
    assert _attempt(token, shim, isolation="process", public_key=public_key) is None


@pytest.mark.parametrize(
    ("script", "step", "words"),
    [
        ("attr:100/3=03000000", "key", "CKA_KEY_TYPE of 4 bytes"),
        ("attr:100=rv:12 attr:181=rv:12", "key", "CKA_KEY_TYPE (CKR_ATTRIBUTE_TYPE_INVALID)"),
        ("attr:100/3=rv:30", "key", "CKR_DEVICE_ERROR"),
        ("attr:108/3=0100000000000000", "key", "CKA_SIGN of 8 bytes"),
        ("attr:108/3=00", "key", "may not sign"),
        ("attr:180/3=06052b81040022", "key", "another curve"),
        ("attr:181/2=0102030405", "key", "CKA_EC_POINT of 5 bytes, beginning 01 02 03 04"),
        ("attr:181/2=rv:12", "key", "no public key and no certificate"),
        ("sign=der", "signature", "in DER"),
        ("sign=pad", "signature", "66 bytes, r and s with leading zeros"),
        ("slot.grow=ff", "token", "CKR_BUFFER_TOO_SMALL"),
        ("slot.count=ffffffffffffffff", "token", "slots of 0xffffffffffffffff"),
        ("slot.count=ffffffff", "token", "slots of 0xffffffff"),
        ("slot.count=f4240", "token", "slots of 0xf4240"),
        ("slot.more=ffffffffffffffff", "token", "0xffffffffffffffff slots where 2"),
        ("find.count=ffffffffffffffff", "key", "0xffffffffffffffff objects where 32"),
        ("find.count=21", "key", "0x21 objects where 32"),
        ("find.zero", "key", "an object of handle 0"),
        ("token.set=40000", "login", "CKR_PIN_LOCKED"),
        ("token.set=20000", "login", "One more wrong PIN"),
    ],
)
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_an_odd_answer_is_told(
    token: SoftHsmToken, shim: Shim, script: str, step: str, words: str, isolation: str
) -> None:
    shim.script(script)
    error = _attempt(token, shim, isolation=isolation)
    assert error is not None
    assert words in str(error)
    assert error.details["step"] == step
    assert error.retryable is (script in {"attr:100/3=rv:30", "slot.grow=ff"})
    if script.startswith(("slot.", "find.")):
        call = "C_GetSlotList" if step == "token" else "C_FindObjects"
        assert error.details["call"] == call
        assert error.details["pkcs11"] in {"CKR_OK", "CKR_BUFFER_TOO_SMALL"}


def test_a_stripped_signature_is_asked_for_again(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.script("sign=once")
        before = shim.calls(Call.SIGN)
        signer.public_key.verify(signer.sign(b"message"), b"message")
        assert shim.calls(Call.SIGN) == before + 2
        shim.script("sign=short")
        with pytest.raises(InvalidSignatureError, match="63 bytes, as where leading") as raised:
            signer.sign(b"message")
        assert raised.value.retryable  # the next one may be whole


@pytest.mark.parametrize("length", [0, 1, 32, 55])
def test_a_signature_that_is_too_short_is_not_asked_for_again(
    token: SoftHsmToken, shim: Shim, length: int
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.script(f"sign=cut sign.cut={length:x}")
        before = shim.calls(Call.SIGN)
        with pytest.raises(InvalidSignatureError, match=f"{length} bytes, in no form") as raised:
            signer.sign(b"message")
        assert shim.calls(Call.SIGN) == before + 1
        assert raised.value.details["signature_length"] == length
        assert not raised.value.retryable


# -- the page ----------------------------------------------------------------------------------


def _anew(recovery: Recovery) -> str:
    return {Recovery.NONE: "-", Recovery.SESSION: "session", Recovery.MODULE: "module"}[recovery]


def rows() -> list[str]:
    """The rows of the page's table of return values, from the table in the code."""

    def row(name: str, meaning: Meaning) -> str:
        again = "yes" if _may_retry(meaning) else "no"
        anew = _anew(meaning.recovery)
        return f"| {name} | `{meaning.kind.code}` | {again} | {anew} | {meaning.text} |"

    told = [row(f"`CKR_{Ckr(code).name}`", MEANINGS[code]) for code in sorted(MEANINGS)]
    told.append(row("a vendor's own, from `0x80000000` on", meaning_of(VENDORS)))
    told.append(row("any other", meaning_of(UNKNOWN)))
    return told


def test_the_page_is_the_table_in_the_code() -> None:
    lines = PAGE.read_text().splitlines()
    assert [line for line in lines if line.startswith(("| `CKR_", "| a vendor", "| any"))] == rows()
    calls = {match[1]: match[2] for line in lines if (match := _ROW_OF_A_CALL.match(line))}
    assert calls == STEPS


_ROW_OF_A_CALL = re.compile(r"\| `(C_\w+)` \| (module|token|login|key|signature) \|")

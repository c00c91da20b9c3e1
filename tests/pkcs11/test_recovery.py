# SPDX-License-Identifier: Apache-2.0
"""A session, a login or the whole device is lost: the next signature works, or says why not."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass

from d1_signer.backends.pkcs11.keys import P256
from d1_signer.backends.pkcs11.module import life as module_life
from d1_signer.backends.pkcs11.module.gate import Gate
from d1_signer.backends.pkcs11.session import recovery
from d1_signer.errors import (
    KeyMismatchError,
    SignerError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import HANG, Call, Shim

pytestmark = [pytest.mark.stress, pytest.mark.alone]

_DEVICE_ERROR = 0x30
_RECOVERABLE = {
    "session handle invalid": 0xB3,
    "session closed": 0xB0,
    "object handle invalid": 0x82,
    "key handle invalid": 0x60,
    "not logged in": 0x101,
    "device error": _DEVICE_ERROR,
    "device removed": 0x32,
    "token not present": 0xE0,
    "general error": 0x05,
    "function failed": 0x06,
    "not initialized": 0x190,
    "a vendor's own": 0x80000123,
}


@pytest.fixture
def signer(token: SoftHsmToken, shim: Shim) -> Iterator[Signer]:
    with open_signer(token.uri, module_path=shim.path) as opened:
        yield opened


@pytest.mark.parametrize("call", [Call.SIGN_INIT, Call.SIGN], ids=str)
@pytest.mark.parametrize("code", _RECOVERABLE.values(), ids=_RECOVERABLE.keys())
def test_one_failure_is_recovered_from(signer: Signer, shim: Shim, call: Call, code: int) -> None:
    sessions = shim.sessions
    shim.fail(call, code, times=1)
    signer.public_key.verify(signer.sign(b"message"), b"message")
    assert shim.sessions == sessions


# The binding ends a search that could not begin, and cannot tell anybody that this failed too.
_failed_searches = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. 'pkcs11:pytest.PytestUnraisableExceptionWarning"
)


@_failed_searches
@pytest.mark.parametrize(
    "call",
    [
        Call.OPEN_SESSION,
        Call.FIND_OBJECTS_INIT,
        Call.FIND_OBJECTS,
        Call.GET_ATTRIBUTE_VALUE,
        Call.GET_SESSION_INFO,
        Call.GET_SLOT_LIST,
    ],
    ids=str,
)
def test_failure_in_the_middle_of_recovery_takes_the_next_level(
    signer: Signer, shim: Shim, call: Call
) -> None:
    sessions = shim.sessions
    shim.fail(call, _DEVICE_ERROR, times=1)
    shim.fail(Call.SIGN, 0xB3, times=1)
    signer.public_key.verify(signer.sign(b"message"), b"message")
    assert shim.sessions == sessions


def test_signature_is_retried_once_on_each_level(
    signer: Signer, shim: Shim, token: SoftHsmToken
) -> None:
    shim.fail(Call.SIGN, 0xB3)
    before = shim.calls(Call.SIGN_INIT)
    with pytest.raises(SignerUnavailable) as raised:
        signer.sign(b"message")
    assert raised.value.retryable
    assert raised.value.details["needs"] == "process"
    assert raised.value.details["token"] == f"pkcs11:token={token.label}"
    assert shim.calls(Call.SIGN_INIT) == before + 3
    assert shim.calls(Call.FINALIZE) == 1


_UNTIL_FINALIZED = {
    "session handle invalid": 0xB3,
    "session closed": 0xB0,
    "object handle invalid": 0x82,
    "key handle invalid": 0x60,
    "not logged in": 0x101,
    "operation not initialized": 0x91,
    "device error": _DEVICE_ERROR,
    "a vendor's own": 0x80000123,
}


@pytest.mark.parametrize("isolation", ["none", "process"])
@pytest.mark.parametrize("call", [Call.SIGN_INIT, Call.SIGN], ids=str)
@pytest.mark.parametrize("code", _UNTIL_FINALIZED.values(), ids=_UNTIL_FINALIZED.keys())
def test_answer_that_only_an_initialisation_cures(
    token: SoftHsmToken, shim: Shim, code: int, call: Call, isolation: str
) -> None:
    with open_signer(token.uri, module_path=shim.path, isolation=isolation) as signer:
        shim.heal_when_finalized()
        for turn in range(1, 4):
            shim.fail(call, code)
            signer.public_key.verify(signer.sign(b"message"), b"message")
            assert shim.calls(Call.FINALIZE) == turn
        assert shim.sessions == 2


def test_threads_meet_an_answer_that_only_an_initialisation_cures(
    token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.heal_when_finalized()
        for _ in range(10):
            shim.fail(Call.SIGN, 0xB3)
            threads = [threading.Thread(target=signer.sign, args=(b"message",)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            signer.public_key.verify(signer.sign(b"message"), b"message")
        assert shim.finalized_beside_a_call == 0
        assert shim.calls(Call.FINALIZE) <= 20


@pytest.mark.parametrize("code", [0xB3, 0x80000123], ids=["session", "a vendor's own"])
def test_remedy_that_does_not_help_is_not_taken_all_the_time(
    token: SoftHsmToken, signer: Signer, shim: Shim, code: int
) -> None:
    with open_signer(token.uri, module_path=shim.path) as other:
        shim.fail(Call.SIGN, code)
        before = {call: shim.calls(call) for call in (Call.SIGN, Call.LOGIN, Call.FINALIZE)}
        until = time.monotonic() + 0.5
        turns = 0
        while time.monotonic() < until:
            with pytest.raises(SignerUnavailable):
                signer.sign(b"message")
            signer._backend._circuit.closed_by_success()  # type: ignore[attr-defined]
            turns += 1
        assert turns > 10
        assert shim.calls(Call.FINALIZE) - before[Call.FINALIZE] <= 2
        assert shim.calls(Call.LOGIN) - before[Call.LOGIN] <= 2
        assert shim.calls(Call.SIGN) - before[Call.SIGN] <= 2 * turns + 2
        shim.heal()
        other.public_key.verify(other.sign(b"message"), b"message")
        _until_signed(signer, 1.0)


def test_what_no_recovery_helps_against_is_not_retried(signer: Signer, shim: Shim) -> None:
    before = shim.calls(Call.SIGN_INIT)
    shim.fail(Call.SIGN_INIT, 0x70, times=1)  # CKR_MECHANISM_INVALID
    with pytest.raises(SignerError) as raised:
        signer.sign(b"message")
    assert not raised.value.retryable
    assert raised.value.details["pkcs11"] == "CKR_MECHANISM_INVALID"
    assert shim.calls(Call.SIGN_INIT) == before + 1
    signer.sign(b"message")


def test_logout_by_other_code_in_the_process(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path, max_sessions=1) as signer:
        other = ctypes.CDLL(shim.path)
        functions = ctypes.c_void_p()
        other.C_GetFunctionList(ctypes.byref(functions))
        table = (ctypes.c_void_p * 69).from_address(functions.value or 0)  # the version comes first
        log_out = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(table[1 + Call.LOGOUT] or 0)
        holder = signer._backend._access._login._holder  # type: ignore[attr-defined]
        assert log_out(holder.handle) == 0
        logins = shim.calls(Call.LOGIN)
        signer.public_key.verify(signer.sign(b"message"), b"message")
        assert shim.calls(Call.LOGIN) == logins + 1
        assert shim.sessions == 2


def test_key_that_changed_meanwhile_is_refused(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        _replace_key(signer)
        with pytest.raises(KeyMismatchError):
            signer.sign(b"message")


def _replace_key(signer: Signer) -> None:
    module = signer._backend._module  # type: ignore[attr-defined]
    slot = module.binding.get_slots(token_present=True)[0]
    with slot.get_token().open(rw=True) as session:
        for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
            for item in list(session.get_objects({Attribute.CLASS: kind})):
                item.destroy()
        parameters = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
        )
        parameters.generate_keypair(
            label="d1", id=b"other", store=True, capabilities=MechanismFlag.SIGN
        )


@pytest.mark.parametrize(
    "calls",
    [(Call.SIGN_INIT, Call.OPEN_SESSION, Call.GET_SLOT_LIST), (Call.SIGN, Call.INITIALIZE)],
    ids=["no session", "no C_Initialize"],
)
def test_device_that_is_away(
    signer: Signer, shim: Shim, caplog: pytest.LogCaptureFixture, calls: tuple[Call, ...]
) -> None:
    caplog.set_level(logging.WARNING, logger="d1_signer")
    for call in calls:
        shim.fail(call, _DEVICE_ERROR)
    before = shim.calls(Call.INITIALIZE)
    until = time.monotonic() + 1.0
    refusals = 0
    while time.monotonic() < until:
        with pytest.raises(SignerUnavailable):
            signer.sign(b"message", timeout=0.5)
        refusals += 1
        time.sleep(0.005)
    assert refusals > 50, "the circuit answers at once"
    assert shim.calls(Call.INITIALIZE) - before < 10, "and does not hammer the device"
    assert len(caplog.records) == 1, "and does not flood the log"
    shim.heal()
    _until_signed(signer, 1.0)
    assert [record.message.split()[0] for record in caplog.records] == [
        "pkcs11.away",
        "pkcs11.back",
    ]
    assert shim.sessions == 2  # the login's, and one that signs


def test_module_that_cannot_be_initialised_is_given_back(token: SoftHsmToken, shim: Shim) -> None:
    signer = open_signer(token.uri, module_path=shim.path)
    for call in (Call.SIGN, Call.INITIALIZE):
        shim.fail(call, _DEVICE_ERROR)
    with pytest.raises(SignerUnavailable) as raised:
        signer.sign(b"message")
    assert raised.value.retryable
    tried = shim.calls(Call.INITIALIZE)
    signer.close()
    assert shim.calls(Call.INITIALIZE) == tried, "there is nothing left to close"
    shim.heal()
    with open_signer(token.uri, module_path=shim.path) as again:
        again.sign(b"message")
    assert shim.calls(Call.FINALIZE) == 2, "at the recovery, and by the last one to close"
    assert shim.sessions == 0


def test_hanging_call_gives_its_caller_back(signer: Signer, shim: Shim) -> None:
    shim.fail(Call.SIGN, HANG)
    busy: object = None
    for _ in range(6):  # more than there are sessions
        started = time.monotonic()
        with pytest.raises(SignerTimeout) as raised:
            signer.sign(b"message", timeout=0.2)
        assert time.monotonic() - started < 0.5  # tests/pkcs11/test_wire.py has the bar
        busy = raised.value.details["busy_sessions"]
    assert busy == 4
    assert shim.inside == 4
    finalized = shim.calls(Call.FINALIZE)
    shim.heal()
    signer.public_key.verify(signer.sign(b"message", timeout=5), b"message")
    assert shim.calls(Call.FINALIZE) == finalized
    _until(lambda: shim.inside == 0)
    assert shim.sessions <= 5


@pytest.mark.parametrize("call", [Call.INITIALIZE, Call.LOGIN, Call.SIGN], ids=str)
def test_opening_that_is_left_behind_gives_all_back(
    token: SoftHsmToken, shim: Shim, call: Call
) -> None:
    shim.fail(call, HANG)
    started = time.monotonic()
    with pytest.raises(SignerTimeout):
        open_signer(token.uri, module_path=shim.path, timeout=0.2)
    assert time.monotonic() - started < 0.5
    shim.heal()
    _until(lambda: shim.calls(Call.FINALIZE) == 1)
    _until(lambda: shim.inside == 0)
    assert shim.sessions == 0
    with open_signer(token.uri, module_path=shim.path, timeout=5) as signer:
        signer.public_key.verify(signer.sign(b"message"), b"message")
    _until(lambda: shim.sessions == 0)


@pytest.mark.parametrize("call", [Call.CLOSE_SESSION, Call.FINALIZE], ids=str)
def test_close_leaves_a_hanging_call_behind(token: SoftHsmToken, shim: Shim, call: Call) -> None:
    signer = open_signer(token.uri, module_path=shim.path)
    shim.fail(call, HANG)
    started = time.monotonic()
    signer.close()
    assert time.monotonic() - started < 1.5
    shim.heal()
    with open_signer(token.uri, module_path=shim.path, timeout=5) as again:
        again.sign(b"message")
    _until(lambda: shim.sessions == 0)


def test_nothing_finalises_beside_a_hanging_call(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.fail(Call.SIGN, HANG, times=1)
        with pytest.raises(SignerTimeout):
            signer.sign(b"message", timeout=0.1)
        shim.fail(Call.SIGN_INIT, _DEVICE_ERROR, times=1)
        with pytest.raises(SignerUnavailable):
            signer.sign(b"message", timeout=0.3)
        assert shim.finalized_beside_a_call == 0
        shim.heal()
        _until(lambda: shim.inside == 0)
        _until_signed(signer, 1.0)


def test_hanging_call_holds_up_no_other_signer(
    token: SoftHsmToken,
    shim: Shim,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module_life, "_SECONDS_TO_DRAIN", 0.1)
    monkeypatch.setattr(recovery, "_LONGEST_PAUSE", 0.0)  # each signature tries
    shuts: list[object] = []
    shut = Gate.shut

    def counted(self: Gate, by: object, limit: float) -> bool:
        shuts.append(by)
        return shut(self, by, limit)

    with (
        open_signer(token.uri, module_path=shim.path) as one,
        open_signer(token.uri, module_path=shim.path) as other,
    ):
        shim.fail(Call.SIGN, HANG, times=1)
        with pytest.raises(SignerTimeout):
            one.sign(b"message", timeout=0.1)
        monkeypatch.setattr(Gate, "shut", counted)
        shim.fail(Call.SIGN_INIT, _DEVICE_ERROR)
        for _ in range(20):
            with pytest.raises(SignerUnavailable) as raised:
                one.sign(b"message")
            assert raised.value.retryable
        assert len(shuts) == 1
        assert [record.message.split()[0] for record in caplog.records if record.levelno > 20] == [
            "pkcs11.away"
        ]
        shim.fail(Call.SIGN_INIT, 0)
        other.sign(b"message")
        shim.fail(Call.SIGN_INIT, _DEVICE_ERROR, times=1)
        shim.fail(Call.SIGN, 0)  # it returns
        gate = one._backend._module._gate  # type: ignore[attr-defined]
        _until(lambda: not gate.inside)
        _until_signed(one, 1.0)
        assert len(shuts) == 2


def test_two_signers_survive_the_recovery_of_one(token: SoftHsmToken, shim: Shim) -> None:
    with (
        open_signer(token.uri, module_path=shim.path) as one,
        open_signer(token.uri, module_path=shim.path) as two,
    ):
        shim.fail(Call.SIGN, _DEVICE_ERROR, times=1)
        one.sign(b"message")
        two.public_key.verify(two.sign(b"message"), b"message")
        assert shim.calls(Call.FINALIZE) == 1
        assert shim.sessions == 3


def test_threads_recover_together(token: SoftHsmToken, shim: Shim) -> None:
    failures: list[BaseException] = []
    with open_signer(token.uri, module_path=shim.path) as signer:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    signer.sign(b"message")
                except SignerUnavailable:
                    stop.wait(0.01)
                except BaseException as error:  # noqa: BLE001 (told by the test's thread)
                    failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            done = shim.calls(Call.FINALIZE)
            shim.fail(Call.SIGN, _DEVICE_ERROR)
            _until(lambda seen=done: shim.calls(Call.FINALIZE) > seen)
            shim.heal()
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not failures
        assert shim.finalized_beside_a_call == 0
        _until_signed(signer, 1.0)
        assert shim.sessions <= 5
    assert shim.sessions == 0


@_failed_searches
@pytest.mark.parametrize("signatures", [2000, pytest.param(100_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(600)
def test_no_session_leaks(token: SoftHsmToken, shim: Shim, signatures: int) -> None:
    faults = (
        (Call.SIGN, 0xB3),
        (Call.SIGN_INIT, 0x101),
        (Call.OPEN_SESSION, 0xB1),  # CKR_SESSION_COUNT
        (Call.FIND_OBJECTS_INIT, 0x06),
        (Call.GET_ATTRIBUTE_VALUE, 0x30),
        (Call.SIGN, 0x30),
        (Call.LOGIN, 0x30),
        (Call.CLOSE_SESSION, 0x06),
    )
    with open_signer(token.uri, module_path=shim.path, verify=False) as signer:
        done = 0
        for turn in range(signatures):
            if turn % 50 == 0:
                call, code = faults[turn // 50 % len(faults)]
                shim.fail(call, code, times=1)
                if call is not Call.SIGN:
                    shim.fail(Call.SIGN, 0xB3, times=1)
            try:
                signer.sign(b"message")
                done += 1
            except SignerUnavailable:
                shim.heal()
                _until_signed(signer, 1.0)
    assert done > signatures * 0.98
    # One that the module would not close stays its own.
    assert shim.sessions <= signatures // 400 + 1
    assert shim.most_sessions <= 5 + signatures // 400 + 1


def _until_signed(signer: Signer, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            signer.public_key.verify(signer.sign(b"message", timeout=seconds), b"message")
        except SignerUnavailable:
            assert time.monotonic() < until
            time.sleep(0.01)
        else:
            return


def _until(true: object) -> None:
    until = time.monotonic() + 10
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.002)

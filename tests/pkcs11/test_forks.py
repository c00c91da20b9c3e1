# SPDX-License-Identifier: Apache-2.0
"""A fork that Python is told of late, or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d1_signer.backends.pkcs11.module import siblings
from d1_signer.errors import D1SignerError, SignerUnavailable
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.conftest import Run
from tests.pkcs11.shim import Call, Shim

# From 3.13 on, Python ends a child that is told without its parent having been.
_TELLING = pytest.mark.parametrize(
    "tell",
    [False, True] if sys.version_info < (3, 13) else [False],
    ids=lambda tell: "told in the child" if tell else "told nothing",
)

_fork: Any = ctypes.PyDLL(None).fork


def _in_child(work: Callable[[], object], *, tell: bool) -> str:
    """What comes of work in a child that C made: "done", or an error's code."""
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        told = "other"
        try:
            if tell:
                ctypes.pythonapi.PyOS_AfterFork_Child()  # as uWSGI does
            work()
            told = "done"
        except D1SignerError as error:
            told = error.code
        finally:
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], 20)[0]:
            return "hung"
        return os.read(reading, 100).decode()
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(params=[None, 5.0], ids=["here", "handed off"])
def timeout(request: pytest.FixtureRequest) -> float | None:
    given: float | None = request.param
    return given


@_TELLING
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_child_signs(
    token: SoftHsmToken, timeout: float | None, isolation: str, *, tell: bool
) -> None:
    with open_signer(token.uri, isolation=isolation, verify=False) as signer:

        def signs() -> None:
            signer.sign(b"message", timeout=timeout)

        signs()
        assert _in_child(signs, tell=tell) == "done"
        assert _in_child(signer.close, tell=tell) == "done"
        os.waitpid(_told_fork(), 0)
        assert _in_child(signs, tell=tell) == "done"
        signs()


def _told_fork() -> int:
    if (child := os.fork()) == 0:
        os._exit(0)
    return child


@_TELLING
def test_child_that_was_forked_beside_a_call_is_refused(token: SoftHsmToken, *, tell: bool) -> None:
    with open_signer(token.uri) as signer:
        inside, go_on = threading.Event(), threading.Event()

        def call() -> None:
            inside.set()
            go_on.wait(30)

        os.waitpid(_told_fork(), 0)  # of which nothing must be left
        module: Any = signer._backend._module  # type: ignore[attr-defined]
        calling = threading.Thread(target=lambda: module.run(call, None))
        calling.start()
        try:
            assert inside.wait(20)
            assert _in_child(lambda: _sign(signer), tell=tell) == SignerUnavailable.code
        finally:
            go_on.set()
            calling.join()
        _sign(signer)


def _sign(signer: Signer) -> None:
    signer.public_key.verify(signer.sign(b"message"), b"message")


def test_child_initialises_before_it_finalises(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        _sign(signer)
        before = {call: shim.calls(call) for call in (Call.INITIALIZE, Call.FINALIZE, Call.LOGIN)}
        # SoftHSM takes itself for initialised in the child; else it would not be finalised.
        assert _in_fork(lambda: _sign(signer)) == 0
        assert shim.calls(Call.INITIALIZE) - before[Call.INITIALIZE] == 2
        assert shim.calls(Call.FINALIZE) - before[Call.FINALIZE] == 1
        _sign(signer)
        assert shim.calls(Call.LOGIN) - before[Call.LOGIN] == 1, "the child's"


def test_module_that_notices_the_fork_is_not_finalised(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noticing = tmp_path / "noticing.conf"
    noticing.write_text(token.configuration.read_text() + "library.reset_on_fork = true\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(noticing))
    with open_signer(token.uri, module_path=shim.path) as signer:
        _sign(signer)
        assert _in_fork(lambda: _sign(signer)) == 0
        assert shim.calls(Call.FINALIZE) == 0
        _sign(signer)


_PIN_INCORRECT = 0xA0


@pytest.mark.parametrize(
    ("answer", "times", "sent", "signs"),
    [(0x05, 1, 2, True), (0x06, 1, 2, True), (0x05, 2, 2, False), (_PIN_INCORRECT, 9, 1, False)],
    ids=["general error", "function failed", "too often", "refused"],
)
def test_pin_that_was_taken_before_the_fork_is_sent_again(
    token: SoftHsmToken, shim: Shim, answer: int, times: int, sent: int, *, signs: bool
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.fail(Call.LOGIN, answer, times=times)
        before = shim.calls(Call.LOGIN)
        assert (_in_fork(lambda: _sign(signer)) == 0) is signs
        assert shim.calls(Call.LOGIN) == before + sent
        shim.heal()
        _sign(signer)


def test_pin_that_may_have_counted_is_not_sent_again_in_a_child(
    token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        shim.add_token_flags(0x10000)  # CKF_USER_PIN_COUNT_LOW; the others forbid any try
        shim.fail(Call.LOGIN, 0x05)
        before = shim.calls(Call.LOGIN)
        assert _in_fork(lambda: _sign(signer)) != 0
        assert shim.calls(Call.LOGIN) == before + 1


def test_file_that_got_the_number_of_the_siblings_file_is_left_alone(tmp_path: Path) -> None:
    def daemon() -> None:
        siblings.prepare()
        (descriptor, _), other = siblings._file or (0, 0), tmp_path / "other"
        os.dup2(os.open(other, os.O_RDWR | os.O_CREAT), descriptor)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)  # by other code, which keeps its lock
        with siblings.turn(0):
            pass
        probe = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | 4)"
        held = subprocess.run([sys.executable, "-c", probe, str(other)], check=False, timeout=30)
        if held.returncode == 0:
            raise SignerUnavailable("its lock was dropped")

    assert _in_fork(daemon) == 0


_SIBLINGS = """
import os, sys
from d1_signer import open_signer

uri, rounds = sys.argv[1], int(sys.argv[2])
signer = open_signer(uri)

failed = 0
for _ in range(rounds):
    reading, writing = os.pipe()
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.close(writing)
                os.read(reading, 1)  # until all are there
                signer.public_key.verify(signer.sign(b"message"), b"message")
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        children.append(child)
    os.close(writing)
    os.close(reading)
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
print(failed)
"""


@pytest.mark.stress
@pytest.mark.parametrize("rounds", [4, pytest.param(50, marks=pytest.mark.soak)])
@pytest.mark.timeout(300)
def test_siblings_that_begin_at_once(token: SoftHsmToken, run_python: Run, rounds: int) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        ran = run_python(_SIBLINGS, token.uri, str(rounds), timeout=280)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert ran.stdout == "0\n", ran.stderr


def _in_fork(work: Callable[[], object]) -> int:
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except D1SignerError:
            pass
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]

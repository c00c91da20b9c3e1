# SPDX-License-Identifier: Apache-2.0
"""The module in a process of its own: what happens to it costs nobody else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from d1_signer.backends.pkcs11.isolation import child, host, opening
from d1_signer.backends.pkcs11.isolation.wire import FAILED, SIGN, receive, send
from d1_signer.backends.pkcs11.session import recovery
from d1_signer.errors import (
    D1SignerError,
    LoginError,
    SignerError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import ABORT, HANG, Call, Shim

pytestmark = [pytest.mark.stress, pytest.mark.alone]

# Not written where they are used: tracebacks show those lines, and are searched for PINs.
_WRONG = [f"wrong-pin-{number}" for number in range(5)]


@pytest.fixture
def signer(token: SoftHsmToken, shim: Shim) -> Iterator[Signer]:
    with open_signer(token.uri, module_path=shim.path, isolation="process") as opened:
        yield opened


def test_library_that_crashes_costs_an_error(signer: Signer, shim: Shim) -> None:
    shim.fail(Call.SIGN, ABORT, times=1)
    with pytest.raises(SignerUnavailable) as raised:
        signer.sign(b"message")
    assert raised.value.retryable
    signer.public_key.verify(signer.sign(b"message"), b"message")


def test_process_that_no_recovery_helps_is_replaced(
    signer: Signer, shim: Shim, spawned: list[child.Host]
) -> None:
    first = _hosts(signer)[0]
    # One attempt, one on each of the two levels; the next process signs.
    shim.fail(Call.SIGN, 0xB3, times=3)
    signer.public_key.verify(signer.sign(b"message"), b"message")
    assert _hosts(signer) != [first]
    assert shim.sessions == 2, "it has closed its sessions"
    shim.fail(Call.SIGN, 0xB3)
    started = len(spawned)
    for _ in range(5):
        assert _fails(signer)
    assert len(spawned) - started <= 2, "nor is it replaced all the time"
    shim.heal()
    _until(lambda: not _fails(signer))


def test_library_that_hangs_is_killed_at_the_deadline(
    signer: Signer, shim: Shim, token: SoftHsmToken
) -> None:
    host = _hosts(signer)[0]
    shim.fail(Call.SIGN, HANG, times=1)
    started = time.monotonic()
    with pytest.raises(SignerTimeout) as raised:
        signer.sign(b"message", timeout=0.3)
    assert time.monotonic() - started < 0.4
    assert raised.value.details["token"] == f"pkcs11:token={token.label}"
    assert not Path(f"/proc/{host}").exists()
    # The stuck call never returned: a new process signs.
    signer.public_key.verify(signer.sign(b"message", timeout=10), b"message")
    assert _hosts(signer) != [host]


def test_other_callers_of_a_killed_process_are_served_by_the_next(
    signer: Signer, shim: Shim
) -> None:
    shim.fail(Call.SIGN, HANG, times=2)
    signed: list[bytes] = []
    patient = threading.Thread(target=lambda: signed.append(signer.sign(b"message", timeout=20)))
    patient.start()
    _until(lambda: shim.inside == 1)
    with pytest.raises(SignerTimeout):
        signer.sign(b"message", timeout=0.2)
    patient.join(20)
    assert len(signed) == 1


def test_parent_never_loads_the_module(signer: Signer, token: SoftHsmToken) -> None:
    signer.sign(b"message")
    host = _hosts(signer)[0]
    assert "libsofthsm2" in Path(f"/proc/{host}/maps").read_text()
    for line in Path(f"/proc/{host}/cmdline").read_bytes().split(b"\0"):
        assert token.pin.encode() not in line
    assert token.pin.encode() not in Path(f"/proc/{host}/environ").read_bytes()


def test_children_end_with_the_signer(token: SoftHsmToken) -> None:
    with open_signer(token.uri, isolation="process", processes=2) as signer:
        _until(lambda: len(_hosts(signer)) == 2)
        hosts = _hosts(signer)
    assert not [host for host in hosts if Path(f"/proc/{host}").exists()]


def test_children_end_with_their_parent(token: SoftHsmToken, shim: Shim) -> None:
    shim.fail(Call.SIGN, HANG)
    shim.fail(Call.SIGN, 0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signer = open_signer(token.uri, module_path=shim.path, isolation="process")
            shim.fail(Call.SIGN, HANG)
            os.write(writing, str(_hosts(signer)[0]).encode())
            signer.sign(b"message")
        finally:
            os._exit(1)
    os.close(writing)
    host = int(os.read(reading, 20))
    os.close(reading)
    _until(lambda: shim.inside == 1)  # it hangs
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _until(lambda: not Path(f"/proc/{host}").exists() or _is_zombie(host))


def test_refused_pin_is_tried_by_no_further_child(token: SoftHsmToken, shim: Shim) -> None:
    for _ in range(3):
        with pytest.raises(LoginError):
            open_signer(
                token.uri,
                module_path=shim.path,
                isolation="process",
                pin_source=lambda: _WRONG[1],
            )
    assert shim.calls(Call.LOGIN) == 1


def test_child_killed_from_outside_is_replaced(signer: Signer) -> None:
    os.kill(_hosts(signer)[0], signal.SIGKILL)
    with pytest.raises(SignerUnavailable):
        signer.sign(b"message")
    signer.sign(b"message")


@pytest.mark.parametrize("source", ["callable", "file"])
def test_wrong_pin_reaches_the_token_once_whatever_the_number_of_processes(
    token: SoftHsmToken, shim: Shim, tmp_path: Path, source: str, spawned: list[child.Host]
) -> None:
    wrong = f"wrong-pin-{source}"
    file = tmp_path / "pin"
    file.touch(0o600)
    file.write_text(wrong)
    for _ in range(3):
        with pytest.raises(LoginError) as raised:
            open_signer(
                token.uri,
                module_path=shim.path,
                isolation="process",
                processes=4,
                pin_source=f"file:{file}" if source == "file" else lambda: wrong,
            )
        assert not raised.value.retryable
        assert raised.value.details["step"] == "login"
    assert shim.calls(Call.LOGIN) == 1
    assert len(spawned) == 1


def test_signers_that_are_opened_at_once_send_a_wrong_pin_once(
    token: SoftHsmToken, shim: Shim
) -> None:
    errors: list[D1SignerError] = []

    def opens() -> None:
        try:
            open_signer(
                token.uri,
                module_path=shim.path,
                isolation="process",
                pin_source=lambda: _WRONG[3],
            )
        except D1SignerError as error:
            errors.append(error)

    _together(opens, 3)
    assert [type(error) for error in errors] == [LoginError] * 3
    assert shim.calls(Call.LOGIN) == 1


def test_pin_that_became_wrong_reaches_the_token_once(
    token: SoftHsmToken, shim: Shim, spawned: list[child.Host]
) -> None:
    pin = token.pin
    errors: list[D1SignerError] = []
    with open_signer(
        token.uri,
        module_path=shim.path,
        isolation="process",
        processes=2,
        pin_source=lambda: pin,
    ) as signer:
        _until(lambda: len(_hosts(signer)) == 2)
        before, children = shim.calls(Call.LOGIN), len(spawned)
        pin = _WRONG[4]

        def signs() -> None:
            for _ in range(3):
                try:
                    signer.sign(b"message")
                except D1SignerError as error:
                    errors.append(error)

        for opened in _hosts(signer):
            os.kill(opened, signal.SIGKILL)
        _together(signs, 4)
        _until(lambda: not signer._backend._starting)  # type: ignore[attr-defined]
        assert shim.calls(Call.LOGIN) == before + 1
        assert len(spawned) == children + 1
        assert isinstance(errors[-1], LoginError)


def test_pin_is_sent_once_more_after_a_child_ended_in_the_login(
    signer: Signer, token: SoftHsmToken, shim: Shim
) -> None:
    before = shim.calls(Call.LOGIN)
    shim.fail(Call.LOGIN, ABORT)
    os.kill(_hosts(signer)[0], signal.SIGKILL)
    errors: list[D1SignerError] = []

    def refused() -> bool:
        try:
            signer.sign(b"message")
        except D1SignerError as error:
            errors.append(error)
        return isinstance(errors[-1], LoginError)

    _until(refused)
    assert not errors[-1].retryable
    assert {type(error) for error in errors[:-1]} == {SignerUnavailable}
    shim.heal()
    with pytest.raises(LoginError):
        open_signer(token.uri, module_path=shim.path, isolation="process")
    assert shim.calls(Call.LOGIN) == before + 2


def test_child_that_ends_after_the_login_says_nothing_about_the_pin(
    signer: Signer, shim: Shim, spawned: list[child.Host]
) -> None:
    shim.fail(Call.FIND_OBJECTS_INIT, ABORT)
    os.kill(_hosts(signer)[0], signal.SIGKILL)
    _until(lambda: _fails(signer) and len(spawned) > 3)
    shim.heal()
    _until(lambda: not _fails(signer))


def test_token_that_is_away_costs_one_child_for_a_pause(
    token: SoftHsmToken,
    shim: Shim,
    spawned: list[child.Host],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "_SHORTEST_PAUSE", 60.0)
    monkeypatch.setattr(recovery, "_LONGEST_PAUSE", 60.0)
    failed: list[bool] = []
    with open_signer(token.uri, module_path=shim.path, isolation="process", processes=2) as signer:
        _until(lambda: len(_hosts(signer)) == 2)
        shim.fail(Call.OPEN_SESSION, 0x32)  # CKR_DEVICE_REMOVED
        children = len(spawned)
        for opened in _hosts(signer):
            os.kill(opened, signal.SIGKILL)
        _together(lambda: failed.extend(_fails(signer) for _ in range(20)), 4)
        assert failed == [True] * 80
        assert len(spawned) == children + 1
        shim.heal()
        signer._backend._circuit.closed_by_success()  # type: ignore[attr-defined]
        _until(lambda: not _fails(signer))


def test_token_that_was_there_at_opening_is_away_for_now(
    signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    empty = tmp_path / "empty.conf"
    empty.write_text(f"directories.tokendir = {nothing}\n")
    with monkeypatch.context() as patched:
        patched.setenv("SOFTHSM2_CONF", str(empty))
        os.kill(_hosts(signer)[0], signal.SIGKILL)
        for _ in range(2):  # the first sees the end of the child, the second that of its successor
            with pytest.raises(SignerUnavailable):
                signer.sign(b"message")
    _until(lambda: not _fails(signer))


def test_module_that_worked_at_opening_is_away_for_now(signer: Signer, shim: Shim) -> None:
    shim.fail(Call.INITIALIZE, 0x30)  # CKR_DEVICE_ERROR
    os.kill(_hosts(signer)[0], signal.SIGKILL)
    for _ in range(2):  # the first sees the end of the child, the second that of its successor
        with pytest.raises(SignerUnavailable) as raised:
            signer.sign(b"message")
        assert raised.value.retryable
    shim.heal()
    _until(lambda: not _fails(signer))


def test_nothing_is_imported_from_the_current_directory(
    token: SoftHsmToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pkcs11.py", "json.py", "d1_signer.py"):
        (here / name).write_text("open('ran', 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(here)
    with open_signer(token.uri, isolation="process") as signer:
        signer.sign(b"message")
    assert not (here / "ran").exists()


class _SoftLimit(BaseException):
    pass


def test_exception_of_a_signal_handler_costs_no_connection(token: SoftHsmToken, shim: Shim) -> None:
    def interrupts(*_: object) -> None:
        raise _SoftLimit

    before = signal.signal(signal.SIGALRM, interrupts)
    try:
        with open_signer(
            token.uri, module_path=shim.path, isolation="process", max_sessions=1
        ) as signer:
            first = _hosts(signer)[0]
            shim.fail(Call.SIGN, HANG, times=1)
            main = threading.get_ident()

            def alarm() -> None:
                _until(lambda: shim.inside == 1)
                signal.pthread_kill(main, signal.SIGALRM)

            clock = threading.Thread(target=alarm)
            clock.start()
            with pytest.raises(_SoftLimit):
                signer.sign(b"message")
            clock.join()
            assert not Path(f"/proc/{first}").exists()
            signer.public_key.verify(signer.sign(b"message"), b"message")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_thread_that_cannot_start_is_tried_again(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    os.kill(_hosts(signer)[0], signal.SIGKILL)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        for _ in range(2):
            with pytest.raises(SignerUnavailable) as raised:
                signer.sign(b"message")
            assert not isinstance(raised.value, SignerTimeout)
    signer.public_key.verify(signer.sign(b"message"), b"message")


def test_unexpected_failure_in_the_host_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        failure: BaseException = ValueError("secret-text")

        def sign_digest(self, *_: object) -> bytes:
            raise self.failure

    ours, theirs = socket.socketpair()
    broken = Broken()

    def serve() -> None:
        with contextlib.suppress(SystemExit):
            host._serve(broken, theirs)  # type: ignore[arg-type]

    serving = threading.Thread(target=serve)
    with ours:
        ours.settimeout(5)
        serving.start()
        for _ in range(2):  # it goes on serving
            send(ours, SIGN, bytes(32))
            answered, answer = receive(ours)
            assert answered == FAILED
            assert b"ValueError" in answer
            assert b"secret-text" not in answer
        told = capfd.readouterr().err
        assert "in sign_digest" in told
        assert "secret-text" not in told
        broken.failure = SystemExit()
        send(ours, SIGN, bytes(32))
        assert ours.recv(1) == b""  # closed, rather than never answered
    serving.join(5)
    assert not serving.is_alive()


def test_answer_in_drops_is_bounded_as_a_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = threading.Event()

        def drips() -> None:
            for byte in b"D\x00\x00\x00\x40" + bytes(64):
                if done.wait(0.02):
                    return
                theirs.send(bytes([byte]))

        dripping = threading.Thread(target=drips)
        dripping.start()
        try:
            ours.settimeout(0.2)
            with pytest.raises(TimeoutError):
                receive(ours, time.monotonic() + 0.2)
        finally:
            done.set()
            dripping.join(20)


def test_host_tells_why_it_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", host.__name__, str(os.getpid()), "0", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        send(ours, b"O", b"no json: secret-text")
        _, told = process.communicate(timeout=20)
    assert b"JSONDecodeError" in told
    assert b"in main" in told
    assert b"secret-text" not in told


def test_killing_a_child_holds_up_nobody_else(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_signer(token.uri, module_path=shim.path, isolation="process", processes=2) as signer:
        _until(lambda: len(_hosts(signer)) == 2)
        reaping, go_on = threading.Event(), threading.Event()
        kill = child.Host.kill

        def slow(self: child.Host) -> None:
            reaping.set()
            assert go_on.wait(20)
            kill(self)

        monkeypatch.setattr(child.Host, "kill", slow)
        shim.fail(Call.SIGN, HANG, times=1)
        late = threading.Thread(target=lambda: _fails(signer, timeout=0.2))
        late.start()
        try:
            assert reaping.wait(10)
            signer.sign(b"message", timeout=5)
        finally:
            go_on.set()
            late.join(20)


def test_fork_waits_for_a_child_that_is_being_started(
    token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _open_sockets()
    starting, forked = threading.Event(), threading.Event()
    found: list[set[str]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            starting.set()
            forked.wait(0.2)

    def forks() -> None:
        assert starting.wait(20)
        found.append(_in_fork(_open_sockets))
        forked.set()

    monkeypatch.setattr(subprocess, "Popen", Popen)
    forking = threading.Thread(target=forks)
    forking.start()
    with open_signer(token.uri, isolation="process") as signer:
        forking.join(20)
        signer.sign(b"message")
    assert found[0] <= before


def test_fork_keeps_no_connection_that_is_in_use(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _open_sockets()
    with open_signer(token.uri, module_path=shim.path, isolation="process") as signer:
        shim.fail(Call.SIGN, HANG, times=1)
        signing = threading.Thread(target=lambda: signer.sign(b"message"))
        signing.start()
        _until(lambda: shim.inside == 1)
        assert _in_fork(_open_sockets) <= before
        shim.heal()
        signing.join(20)

    def cannot(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(subprocess, "Popen", cannot)
    with pytest.raises(SignerUnavailable):
        open_signer(token.uri, module_path=shim.path, isolation="process")
    assert _open_sockets() <= before


def _open_sockets() -> set[str]:
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own
            links.add(str(descriptor.readlink()))
    return {link for link in links if link.startswith("socket:")}


def _in_fork(work: Callable[[], set[str]]) -> set[str]:
    reading, writing = os.pipe()
    forked = os.fork()
    if forked == 0:
        try:
            os.write(writing, "\n".join(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        answer = set(told.read().split("\n")) - {""}
    os.waitpid(forked, 0)
    return answer


def test_prompt_is_read_once_before_any_clock(
    token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[threading.Thread] = []
    started: list[float] = []

    def person(_: str, **__: object) -> str:
        asked.append(threading.current_thread())
        started.append(time.monotonic())
        _until(lambda: time.monotonic() > started[0] + 0.2)  # longer than session_timeout
        return token.pin

    monkeypatch.setattr("d1_signer.secret.getpass.getpass", person)
    monkeypatch.setattr("d1_signer.secret.sys.stdin.isatty", lambda: True, raising=False)
    uri = token.uri.replace("pin-source", "x-unused")
    with open_signer(
        uri, pin_source="prompt", isolation="process", processes=2, session_timeout=0.1
    ) as signer:
        _until(lambda: len(_hosts(signer)) == 2)
        signer.sign(b"message")
    assert asked == [threading.main_thread()]


def test_opening_is_bounded_by_the_limit_for_starting(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch, spawned: list[child.Host]
) -> None:
    monkeypatch.setattr(opening, "_SECONDS_TO_START", 1.0)
    shim.fail(Call.LOGIN, HANG)
    began = time.monotonic()
    with pytest.raises(SignerTimeout) as raised:
        open_signer(token.uri, module_path=shim.path, isolation="process", session_timeout=600)
    assert time.monotonic() - began < 3
    # How far it comes in a second is the machine's affair; that it found the token is not known.
    assert raised.value.details["step"] in {"module", "login"}
    assert len(spawned) == 1
    assert spawned[0].process.returncode == -signal.SIGKILL


def test_opening_is_bounded_by_the_time_that_is_given(
    token: SoftHsmToken, shim: Shim, spawned: list[child.Host]
) -> None:
    shim.fail(Call.INITIALIZE, HANG)
    began = time.monotonic()
    with pytest.raises(SignerTimeout) as raised:
        open_signer(token.uri, module_path=shim.path, isolation="process", timeout=1.0)
    assert time.monotonic() - began < 3
    assert raised.value.details["step"] == "module"
    assert spawned[0].process.returncode == -signal.SIGKILL


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[child.Host]:
    """Each child that is started, by whomever."""
    made: list[child.Host] = []
    start = child.Host.__init__

    def counted(self: child.Host, connections: int, **options: Any) -> None:
        made.append(self)
        start(self, connections, **options)

    monkeypatch.setattr(child.Host, "__init__", counted)
    return made


def _fails(signer: Signer, timeout: float | None = None) -> bool:
    try:
        signer.sign(b"message", timeout=timeout)
    except SignerError:
        return True
    return False


def _together(run: Callable[[], None], number: int) -> None:
    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def _hosts(signer: Signer) -> list[int]:
    return [host.process.pid for host in signer._backend._hosts]  # type: ignore[attr-defined]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)

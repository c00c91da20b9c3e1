# SPDX-License-Identifier: Apache-2.0
"""An HSM on a wire that is killed, restarted and frozen while threads sign.

In processes of their own: a crash or a freeze there is a failed test here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from d1_signer.backends.pkcs11.module import life as module_life
from d1_signer.cli import main
from d1_signer.errors import SignerTimeout, SignerUnavailable
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.conftest import ROOT, Run
from tests.pkcs11.shim import Shim
from tests.pkcs11.wire import Wire, module, proxy, wire

pytestmark = [pytest.mark.stress, pytest.mark.alone]

# Signs in a number of threads until its input closes; tells each change between working and not.
_LOAD = """
import json, sys, threading, time
from d1_signer import open_signer
from d1_signer.errors import SignerUnavailable, SignerTimeout

uri, options, threads, timeout = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
timeout = float(timeout) if timeout else None
signer = open_signer(uri, **options)
lock, stop = threading.Lock(), threading.Event()
tell = lambda **what: (lock.acquire(), print(json.dumps(what), flush=True), lock.release())
wrong = []

def work(number):
    works = None
    while not stop.is_set():
        started = time.monotonic()
        try:
            signer.sign(b"message", timeout=timeout)
            now = True
        except SignerUnavailable as error:
            now = False
            stop.wait(0.01)
        except BaseException as error:
            tell(thread=number, wrong=repr(error))
            return
        took = time.monotonic() - started
        if timeout and took > timeout * 1.1 + 0.02:
            tell(thread=number, late=took)
        if now is not works:
            works = now
            tell(thread=number, works=now)

workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
[w.start() for w in workers]
sys.stdin.read()
stop.set()
[w.join(20) for w in workers]
signer.close()
tell(ended=True)
"""


class Load:
    """Threads that sign in another process, and what they tell."""

    def __init__(self, process: subprocess.Popen[str], threads: int) -> None:
        self._process = process
        self._told: Queue[dict[str, object]] = Queue()
        self.works = dict.fromkeys(range(threads), False)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._told.put(json.loads(line))
        self._told.put({"closed": True})

    def until_all(self, *, work: bool, seconds: float) -> float:
        """Wait until every thread works, or none does; returns the seconds it took."""
        began = time.monotonic()
        while set(self.works.values()) != {work}:
            left = seconds - (time.monotonic() - began)
            assert left > 0, f"after {seconds} s: {self.works}"
            told = self._told.get(timeout=max(left, 0.01) + 0.5)
            assert told.keys() == {"thread", "works"}, told
            self.works[int(str(told["thread"]))] = bool(told["works"])
        return time.monotonic() - began

    def end(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(40) == 0
        assert self._process.stderr is not None
        while not (told := self._told.get(timeout=5)).get("ended"):
            assert "wrong" not in told, told
            assert "late" not in told, told
        return self._process.stderr.read()


@contextmanager
def load(
    hsm: Wire, token: SoftHsmToken, threads: int, timeout: str = "", **options: object
) -> Iterator[Load]:
    options = {"module_path": hsm.client, **options}
    with subprocess.Popen(
        [sys.executable, "-c", _LOAD, token.uri, json.dumps(options), str(threads), timeout],
        cwd=ROOT,
        env={**os.environ, **hsm.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Load(process, threads)
        finally:
            process.kill()


# p11-kit's client (0.24.1) loses a wake-up when its server dies beside several calls: one of them
# waits for ever. So the first has a time limit, at which the caller is given back and the instance
# left behind; with one call at a time there is no such wait; a hosted module is killed with it.
@pytest.mark.parametrize(
    ("timeout", "options"),
    [("1", {}), ("", {"locking": "lock"}), ("1", {"isolation": "process"})],
    ids=["in this process", "one lock", "hosted"],
)
@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.timeout(300)
def test_server_killed_under_load_and_started_again(
    token: SoftHsmToken,
    shim: Shim,
    tmp_path: Path,
    rounds: int,
    timeout: str,
    options: dict[str, object],
) -> None:
    # The shim stands in the server, so that it counts the sessions at the HSM's end.
    with (
        wire(token, tmp_path, provider=shim.path, env=shim.env) as hsm,
        load(hsm, token, 8, timeout, **options) as threads,
    ):
        threads.until_all(work=True, seconds=20)
        for _ in range(rounds):
            hsm.kill()
            threads.until_all(work=False, seconds=5)
            time.sleep(2.0 if rounds > 3 else 0.5)
            hsm.start()
            assert threads.until_all(work=True, seconds=5) < (1.0 if rounds > 3 else 3.0)
        # Without the sessions that died with a killed server: one for the login, four that sign.
        assert shim.most_sessions <= 5 * (rounds + 1)
        logged = threads.end()
    assert logged.count("pkcs11.away") <= rounds


def test_frozen_server_keeps_no_caller(token: SoftHsmToken, hsm: Wire) -> None:
    with load(hsm, token, 8, "0.4") as threads:
        threads.until_all(work=True, seconds=20)
        hsm.signal(signal.SIGSTOP)
        threads.until_all(work=False, seconds=2)
        time.sleep(1.0)
        hsm.signal(signal.SIGCONT)
        threads.until_all(work=True, seconds=2)
        threads.end()


@pytest.fixture
def own_client(hsm: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the client: one that is loaded keeps to the server of its first use."""
    monkeypatch.setenv("P11_KIT_SERVER_ADDRESS", hsm.env["P11_KIT_SERVER_ADDRESS"])
    return str(shutil.copy2(hsm.client, tmp_path / "client.so"))


def test_frozen_server_keeps_nobody_who_opens(
    token: SoftHsmToken, hsm: Wire, own_client: str
) -> None:
    hsm.signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # the second one waits for the first one's C_Initialize
            started = time.monotonic()
            with pytest.raises(SignerUnavailable) as failure:
                open_signer(token.uri, module_path=own_client, timeout=0.4)
            assert time.monotonic() - started < 1.0
            assert failure.value.details["step"] in {"module", "token"}
    finally:
        hsm.signal(signal.SIGCONT)
    with open_signer(token.uri, module_path=own_client, timeout=5) as signer:
        signer.sign(b"message")


def test_frozen_server_keeps_nobody_who_makes_a_key(
    token: SoftHsmToken, hsm: Wire, own_client: str
) -> None:
    options: dict[str, Any] = {"module_path": own_client, "pin_source": lambda: token.pin}
    uri = f"pkcs11:token={token.label};object=another"
    generate_key(uri + "1", **options)
    hsm.signal(signal.SIGSTOP)
    try:
        with pytest.raises(SignerTimeout, match="may still be made"):
            generate_key(uri + "2", timeout=0.4, **options)
    finally:
        hsm.signal(signal.SIGCONT)
    made = generate_key(uri + "3", **options)
    with open_signer(made.uri, timeout=5, **options) as signer:
        assert signer.public_key == made.public_key


def test_frozen_server_keeps_no_command(
    token: SoftHsmToken,
    hsm: Wire,
    own_client: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("d1_signer.signing.options.HSM_PATIENCE", 0.4)
    monkeypatch.setenv("D1_SIGNER_KEY", token.uri.replace(token.module_path, own_client))
    hsm.signal(signal.SIGSTOP)
    try:
        assert main(["check", "--json"]) == 1
    finally:
        hsm.signal(signal.SIGCONT)
    told = json.loads(capsys.readouterr().out)
    assert told["stopped_at"]["step"] in {"module", "token"}
    assert {step["error"]["code"] for step in told["steps"] if step["error"]} == {"signer_timeout"}
    assert main(["check"]) == 0


def test_frozen_server_keeps_nobody_who_closes(
    token: SoftHsmToken, hsm: Wire, own_client: str
) -> None:
    signer = open_signer(token.uri, module_path=own_client)
    hsm.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        signer.close()
        assert time.monotonic() - started < 2.0
    finally:
        hsm.signal(signal.SIGCONT)
    with open_signer(token.uri, module_path=own_client, timeout=5) as again:
        again.sign(b"message")


def test_frozen_server_and_a_hosted_module(token: SoftHsmToken, hsm: Wire) -> None:
    with load(hsm, token, 4, "0.5", isolation="process") as threads:
        threads.until_all(work=True, seconds=20)
        hsm.signal(signal.SIGSTOP)
        threads.until_all(work=False, seconds=3)
        time.sleep(1.0)
        hsm.signal(signal.SIGCONT)
        threads.until_all(work=True, seconds=5)
        threads.end()


def test_instance_with_a_hanging_call_is_left_behind(
    token: SoftHsmToken, hsm: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P11_KIT_SERVER_ADDRESS", hsm.env["P11_KIT_SERVER_ADDRESS"])
    with open_signer(token.uri, module_path=hsm.client, max_sessions=1) as signer:
        hsm.signal(signal.SIGSTOP)
        try:
            with pytest.raises(SignerTimeout):
                signer.sign(b"message", timeout=0.2)
            with wire(token, tmp_path):  # another server under the same name
                module = signer._backend._module  # type: ignore[attr-defined]
                module.reinitialize(module.generation, time.monotonic() + 0.2)
                assert module.instance == 1
                # The only session is stuck for good: another one has taken its place.
                signature = signer.sign(b"message", timeout=10)
                signer.public_key.verify(signature, b"message")
        finally:
            hsm.signal(signal.SIGCONT)


def test_fork_that_waits_for_a_call_is_not_taken_for_a_call_that_hangs(
    token: SoftHsmToken, own_client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_life, "_SECONDS_TO_DRAIN", 0.2)
    with open_signer(token.uri, module_path=own_client) as signer:
        module = signer._backend._module  # type: ignore[attr-defined]
        inside, go_on = threading.Event(), threading.Event()

        def long_call() -> None:
            inside.set()
            go_on.wait(20)

        def forks() -> None:
            if (child := os.fork()) == 0:
                os._exit(0)
            os.waitpid(child, 0)

        threads = [
            threading.Thread(target=lambda: module.run(long_call, None)),
            threading.Thread(target=forks),
        ]
        try:
            threads[0].start()
            assert inside.wait(20)
            threads[1].start()
            until = time.monotonic() + 3
            while not module._gate.shut_by:
                assert time.monotonic() < until
                time.sleep(0.001)
            with pytest.raises(SignerUnavailable):
                module.reinitialize(module.generation, None)
        finally:
            go_on.set()
            for thread in threads:
                thread.join(20)
        assert module.instance == 0
        signer.public_key.verify(signer.sign(b"message", timeout=5), b"message")


_HANG = """
import sys, threading
from d1_signer import open_signer
from d1_signer.backends.pkcs11.module import life as module_life
from d1_signer.cli import main
from d1_signer.errors import SignerTimeout
signer = open_signer(sys.argv[1], module_path=sys.argv[2])
print("open", flush=True)
sys.stdin.readline()
try:
    signer.sign(b"message", timeout=0.2)
except SignerTimeout:
    print("timeout", flush=True)
"""


def test_process_ends_with_a_call_that_hangs(token: SoftHsmToken, hsm: Wire) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HANG, token.uri, hsm.client],
        cwd=ROOT,
        env={**os.environ, **hsm.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "open\n"
            hsm.signal(signal.SIGSTOP)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "timeout\n"
            assert process.wait(5) == 0
        finally:
            process.kill()


_FORK = """
import os, sys, threading, time
from d1_signer import open_signer

uri, path, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
signer = open_signer(uri, module_path=path)
stop, failures = threading.Event(), []

def work():
    while not stop.is_set():
        try:
            signer.sign(b"parent")
        except BaseException as error:
            failures.append(repr(error))
            return

threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
statuses = []
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        try:
            ts = [threading.Thread(target=signer.sign, args=(b"child",)) for _ in range(3)]
            [t.start() for t in ts]
            signer.sign(b"child")
            [t.join() for t in ts]
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    until = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.002)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    statuses.append(ended[1] if ended[0] else "hung")
stop.set()
[t.join() for t in threads]
print(statuses.count(0), [s for s in statuses if s != 0], failures)
"""


@pytest.mark.parametrize("through", ["softhsm", "client", "proxy"])
@pytest.mark.timeout(200)
def test_fork_while_threads_sign(
    token: SoftHsmToken, hsm: Wire, run_python: Run, tmp_path: Path, through: str
) -> None:
    env: dict[str, str] = {}
    prefix: tuple[str, ...] = ()
    if through == "client":
        path, env = hsm.client, hsm.env
    elif through == "proxy":
        path, env, prefix = proxy(tmp_path, {"token": f"module: {token.module_path}\n"})
    else:
        path = token.module_path
    ran = run_python(_FORK, token.uri, path, "15", timeout=150, prefix=prefix, **env)
    assert ran.stdout == "15 [] []\n", ran.stdout + ran.stderr


def test_spy_counts_two_calls_a_signature(
    token: SoftHsmToken, run_python: Run, tmp_path: Path
) -> None:
    log = tmp_path / "spy.log"
    code = (
        "import sys\nfrom d1_signer import open_signer\n"
        "with open_signer(sys.argv[1], module_path=sys.argv[2]) as signer:\n"
        "    for _ in range(int(sys.argv[3])): signer.sign(b'message')\n"
    )
    calls = {}
    for count in (10, 110):
        ran = run_python(
            code,
            token.uri,
            module("pkcs11-spy.so"),
            str(count),
            PKCS11SPY=token.module_path,
            PKCS11SPY_OUTPUT=str(log),
        )
        assert ran.returncode == 0, ran.stderr
        lines = log.read_text(errors="replace").splitlines()
        calls[count] = sum(": C_" in line and line.split(":")[0].isdigit() for line in lines)
        log.unlink()
    assert calls[110] - calls[10] == 2 * 100  # C_SignInit, C_Sign

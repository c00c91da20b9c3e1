# SPDX-License-Identifier: Apache-2.0
"""One client for each process and signer, and no lock that one service's trouble hands on."""

from __future__ import annotations

import subprocess
import sys
import threading

from d1_signer.transport.processes import PerProcess


def test_a_function_may_use_another_signers_client() -> None:
    inner = PerProcess(lambda: "inner")
    outer = PerProcess(lambda: inner.get() + " in outer")
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(outer.get()), daemon=True)
    thread.start()
    thread.join(5)
    assert done == ["inner in outer"]


def test_one_that_hangs_holds_up_no_other() -> None:
    released = threading.Event()
    hanging = PerProcess(lambda: released.wait(30))
    thread = threading.Thread(target=hanging.get)
    thread.start()
    try:
        assert PerProcess(lambda: "at once").get() == "at once"
    finally:
        released.set()
        thread.join()


FORK_AMID_A_HANDSHAKE = """
import os, threading, time
from d1_signer.transport.deadlines import run_until
from d1_signer.transport.processes import fork_gate

inside, told = threading.Event(), []

def handshake():
    until = time.monotonic() + 10
    with fork_gate.call(until):
        inside.set()
        while not fork_gate._forks:  # until the fork waits for this call
            pass
        # Signed by a key service, whose connection is made by a thread of its own.
        run_until(until, key_service)

def key_service():
    with fork_gate.call(time.monotonic() + 10):
        told.append("signed")

thread = threading.Thread(target=handshake)
thread.start()
inside.wait(10)
started = time.monotonic()
child = os.fork()
if child == 0:
    with fork_gate.call(time.monotonic() + 1):
        os._exit(7)
thread.join()
print(*told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - started < 5)
"""


def test_a_call_inside_a_call_does_not_wait_for_the_fork_that_waits_for_both() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK_AMID_A_HANDSHAKE]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert ran.stdout.split() == ["signed", "7", "True"]


FORK_INSIDE_A_CALL = """
import os, time
from d1_signer.transport.processes import fork_gate

started = time.monotonic()
with fork_gate.call(started + 10):
    child = os.fork()
    if child == 0:
        os._exit(0)
print(os.waitpid(child, 0)[1], time.monotonic() - started < 5)
"""


def test_a_thread_that_forks_inside_its_own_call_does_not_wait_for_itself() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK_INSIDE_A_CALL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert ran.stdout.split() == ["0", "True"]

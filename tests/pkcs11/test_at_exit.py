# SPDX-License-Identifier: Apache-2.0
"""A process that ends without ``close()`` leaves no session on the device."""

from __future__ import annotations

import time

import pytest

from d1_signer.errors import SignerClosedError
from d1_signer.signing.opening import open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.conftest import Run
from tests.pkcs11.shim import Call, Shim

_ENDS = """
import atexit, sys, threading
from d1_signer import open_signer
from d1_signer.errors import SignerTimeout

def late():
    try:
        signer.sign(b"late")
    except Exception as error:
        print(type(error).__name__, flush=True)
    signer.close()

atexit.register(late)  # before ours, so that it runs after
signer = open_signer(sys.argv[1], module_path=sys.argv[2], **eval(sys.argv[3]))
other = open_signer(sys.argv[1], module_path=sys.argv[2], **eval(sys.argv[3]))
signer.sign(b"message")
"""
_SIGNS_TO_THE_END = (
    _ENDS
    + """
def work():
    # Not told on standard error: CPython aborts where a daemon thread writes to it at its end.
    try:
        while True:
            other.sign(b"message")
    except Exception:
        pass

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
"""
)
_CHILDREN = """
import multiprocessing, os, sys
from d1_signer import open_signer

signer = open_signer(sys.argv[1], module_path=sys.argv[2])
signer.sign(b"message")
context = multiprocessing.get_context("fork")
children = [context.Process(target=signer.sign, args=(b"message",)) for _ in range(2)]
[child.start() for child in children]
[child.join(20) for child in children]
if os.fork() == 0:
    signer.sign(b"message")
    sys.exit()
os.wait()
"""
_SET = """
import mmap, os, struct
with open(os.environ["SHIM_STATE"], "r+b") as file:
    state = mmap.mmap(file.fileno(), 0)
for place, value in ((68 + CALL, 2**62), (CALL, 0x40000002)):
    struct.pack_into("L", state, 8 * place, value)
"""
_HANGS_AT_CLOSE = _SET.replace("CALL", str(int(Call.CLOSE_SESSION)))
_HANGS = (
    _ENDS
    + _SET.replace("CALL", str(int(Call.SIGN)))
    + """
try:
    signer.sign(b"message", timeout=0.1)
except SignerTimeout:
    print("timeout", flush=True)
"""
)


@pytest.mark.parametrize("options", ["{}", "{'timeout': 20}"])
@pytest.mark.parametrize("code", [_ENDS, _SIGNS_TO_THE_END], ids=["idle", "signing"])
def test_sessions_are_closed(
    token: SoftHsmToken, shim: Shim, run_python: Run, code: str, options: str
) -> None:
    ran = run_python(code, token.uri, shim.path, options)
    assert (ran.returncode, ran.stdout) == (0, SignerClosedError.__name__ + "\n"), ran.stderr
    assert shim.sessions == 0
    assert shim.calls(Call.CLOSE_SESSION) == shim.calls(Call.OPEN_SESSION)
    assert shim.calls(Call.FINALIZE) == 0
    with open_signer(token.uri) as signer:  # the token is whole
        signer.public_key.verify(signer.sign(b"message"), b"message")


def test_sessions_of_a_hosting_process_are_closed(
    token: SoftHsmToken, shim: Shim, run_python: Run
) -> None:
    ran = run_python(_ENDS, token.uri, shim.path, "{'isolation': 'process'}")
    assert ran.returncode == 0, ran.stderr
    until = time.monotonic() + 10
    while shim.calls(Call.CLOSE_SESSION) < shim.calls(Call.OPEN_SESSION):
        assert time.monotonic() < until
        time.sleep(0.005)
    assert shim.sessions == 0


def test_sessions_of_forked_children_are_closed(
    token: SoftHsmToken, shim: Shim, run_python: Run
) -> None:
    ran = run_python(_CHILDREN, token.uri, shim.path)
    assert ran.returncode == 0, ran.stderr
    assert shim.calls(Call.CLOSE_SESSION) == shim.calls(Call.OPEN_SESSION)


def test_nothing_is_closed_beside_a_call_that_hangs(
    token: SoftHsmToken, shim: Shim, run_python: Run
) -> None:
    closed = shim.calls(Call.CLOSE_SESSION)
    started = time.monotonic()
    ran = run_python(_HANGS, token.uri, shim.path, "{}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "timeout"
    assert time.monotonic() - started < 6
    assert shim.calls(Call.FINALIZE) == 0
    assert shim.inside == 1
    # Those that looked for the key at opening.
    assert shim.calls(Call.CLOSE_SESSION) - closed == 2


def test_close_that_hangs_keeps_the_process_for_a_second(
    token: SoftHsmToken, shim: Shim, run_python: Run
) -> None:
    started = time.monotonic()
    ran = run_python(_ENDS + _HANGS_AT_CLOSE, token.uri, shim.path, "{}", timeout=20)
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - started < 6
    assert shim.inside == 1

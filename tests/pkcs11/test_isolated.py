# SPDX-License-Identifier: Apache-2.0
"""The module in a process of its own: what happens to it costs nobody else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d1_signer.errors import LoginError, SignerTimeout, SignerUnavailable
from d1_signer.signer import Signer, open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import ABORT, HANG, Call, Shim

pytestmark = pytest.mark.stress


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


def test_library_that_hangs_is_killed_at_the_deadline(signer: Signer, shim: Shim) -> None:
    host = _hosts(signer)[0]
    shim.fail(Call.SIGN, HANG, times=1)
    started = time.monotonic()
    with pytest.raises(SignerTimeout):
        signer.sign(b"message", timeout=0.3)
    assert time.monotonic() - started < 0.4
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
                pin_source=lambda: "wrong-pin-1",
            )
    assert shim.calls(Call.LOGIN) == 1


def test_child_killed_from_outside_is_replaced(signer: Signer) -> None:
    os.kill(_hosts(signer)[0], signal.SIGKILL)
    with pytest.raises(SignerUnavailable):
        signer.sign(b"message")
    signer.sign(b"message")


def _hosts(signer: Signer) -> list[int]:
    return [host.process.pid for host in signer._backend._hosts]  # type: ignore[attr-defined]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)

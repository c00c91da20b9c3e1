# SPDX-License-Identifier: Apache-2.0
"""A module with an OpenSSL library context of its own, which dies with C_Finalize."""

from __future__ import annotations

from pathlib import Path

import pytest

from d1_signer.backends.pkcs11.module import contexts, owners
from d1_signer.testing import SoftHsmToken
from tests.pkcs11 import shim as shims
from tests.pkcs11.conftest import Run
from tests.pkcs11.shim import Call, Shim

_CLOSES = """
import sys
from d1_signer import open_signer
with open_signer(sys.argv[1], module_path=sys.argv[2], **eval(sys.argv[3])) as signer:
    signer.sign(b"message")
print("done", flush=True)
"""
_RECOVERS = """
import sys, threading
from d1_signer import open_signer
signer = open_signer(sys.argv[1], module_path=sys.argv[2])
go_on, ready = threading.Event(), threading.Barrier(5)

def work():
    signer.sign(b"before"); ready.wait(30); go_on.wait(30); signer.sign(b"after")

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
ready.wait(30)
import mmap, struct, os
with open(os.environ["SHIM_STATE"], "r+b") as file:
    state = mmap.mmap(file.fileno(), 0)
struct.pack_into("L", state, 8 * (68 + 43), 2**62)
struct.pack_into("L", state, 8 * 43, 0xB3)
for _ in range(3):
    signer.public_key.verify(signer.sign(b"after"), b"after")
go_on.set()
[thread.join(30) for thread in threads]
signer.close()
print("done", flush=True)
"""


@pytest.fixture
def own_context(tmp_path: Path) -> str:
    """The shim with a context; ``shim`` sees what it does."""
    folder = tmp_path / "own"
    folder.mkdir()
    return str(shims.build(folder, "-DOWN_CONTEXT"))


@pytest.mark.parametrize("options", ["{}", "{'timeout': 20}", "{'isolation': 'process'}"])
def test_process_ends_well_after_close(
    token: SoftHsmToken, shim: Shim, own_context: str, run_python: Run, options: str
) -> None:
    for _ in range(3):
        ran = run_python(_CLOSES, token.uri, own_context, options)
        assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
    assert shim.sessions == 0


def test_threads_end_well_after_a_recovery(
    token: SoftHsmToken, shim: Shim, own_context: str, run_python: Run
) -> None:
    shim.heal_when_finalized()
    ran = run_python(_RECOVERS, token.uri, own_context, MALLOC_PERTURB_="165")
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
    assert shim.calls(Call.FINALIZE) == 2  # at the recovery, and at close


def test_modules_of_the_kind_are_told_by_their_file(
    token: SoftHsmToken, shim: Shim, own_context: str
) -> None:
    for path, expected in ((own_context, True), (shim.path, False), (token.module_path, False)):
        module = owners.acquire(path, locking="auto", reserved=None)
        try:
            assert module.thread_bound is expected
        finally:
            module.release()
    assert not contexts.has_own(0)

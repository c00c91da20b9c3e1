# SPDX-License-Identifier: Apache-2.0
"""Many threads on one token, in processes of their own: a crash there is a failed test here."""

from __future__ import annotations

import threading

import pytest

from d1_signer.backends.pkcs11.session.handoff import Handoff
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.conftest import Run

pytestmark = pytest.mark.stress

_SIGN = """
import hashlib, sys, threading
from concurrent.futures import ThreadPoolExecutor
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from d1_signer import open_signer

uri, threads, each, locking = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
barrier = threading.Barrier(threads, timeout=30)

def work(number):
    barrier.wait()
    return [
        (message, signer.sign(message))
        for message in (f"{number}/{turn}".encode() for turn in range(each))
    ]

with open_signer(uri, verify=False, locking=locking) as signer:
    key = signer.public_key.cryptography_key()
    with ThreadPoolExecutor(threads) as pool:
        made = [pair for pairs in pool.map(work, range(threads)) for pair in pairs]
for message, signature in made:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
print(len(made))
"""


@pytest.mark.parametrize("locking", ["os", "lock"])
def test_16_threads_in_processes_one_after_the_other(
    token: SoftHsmToken, run_python: Run, locking: str
) -> None:
    for _ in range(5 if locking == "os" else 1):
        ran = run_python(_SIGN, token.uri, "16", "200", locking)
        assert (ran.returncode, ran.stdout) == (0, "3200\n"), ran.stderr


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_16_threads_in_20_processes(token: SoftHsmToken, run_python: Run) -> None:
    for _ in range(20):
        ran = run_python(_SIGN, token.uri, "16", "200", "os")
        assert (ran.returncode, ran.stdout) == (0, "3200\n"), ran.stderr


def test_a_thread_that_is_ready_is_enough() -> None:
    handoff = Handoff("d1-signer-ready")
    for _ in range(3):
        handoff.prepare()
    try:
        assert [each.name for each in threading.enumerate()].count("d1-signer-ready") == 1
        assert handoff.run(threading.get_ident, None) != threading.get_ident()
    finally:
        handoff.close()

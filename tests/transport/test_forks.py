# SPDX-License-Identifier: Apache-2.0
"""One client for each process and signer, and no lock that one service's trouble hands on."""

from __future__ import annotations

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

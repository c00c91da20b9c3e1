# SPDX-License-Identifier: Apache-2.0
"""A fork that Python is told of late, or not at all."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from d1_signer.errors import D1SignerError, SignerUnavailable
from d1_signer.signing.signer import Signer, open_signer
from d1_signer.testing import SoftHsmToken

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

# SPDX-License-Identifier: Apache-2.0
"""An exception of a signal's handler, wherever it comes, costs a signature and nothing else.

Handlers run at the first line of a function and after a call into C. A profile function is told of
just these moments, so that every one of them can be tried in turn.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pkcs11
import pytest

import d1_signer
from d1_signer.backends.pkcs11.backend import Pkcs11Backend
from d1_signer.errors import SignerError, SignerTimeout, SignerUnavailable
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

# Not logging, which keeps its handlers' lock.
_SEEN = (
    str(Path(d1_signer.__file__).parent),
    str(Path(pkcs11.__file__).parent),
    threading.__file__,
)


class _SoftLimit(BaseException):
    pass


def _interrupted(work: Callable[[], object], moment: int) -> bool:
    """Do work, with an exception at a moment of it; whether it was long enough for that."""
    left = moment

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(_SEEN):
            left -= 1
            if left < 0:
                raise _SoftLimit  # which also ends the profiling

    sys.setprofile(profile)
    try:
        work()
    except (_SoftLimit, SignerError):
        pass
    finally:
        sys.setprofile(None)
    return left < 0


def _moments(work: Callable[[], object], step: int = 1) -> Iterator[int]:
    for moment in itertools.count(0, step):
        if not _interrupted(work, moment):
            assert moment > 40, "the moments were seen"
            return
        yield moment


@pytest.fixture(params=["os", "lock"])
def signer(request: pytest.FixtureRequest, token: SoftHsmToken, shim: Shim) -> Iterator[Signer]:
    with open_signer(
        token.uri, module_path=shim.path, max_sessions=1, locking=request.param
    ) as opened:
        yield opened


def test_signature_that_is_interrupted_anywhere(signer: Signer) -> None:
    for moment in _moments(lambda: signer.sign(b"message")):
        _check(signer, moment)


# A generator that is dropped, and the PIN's file, which is closed by being freed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_recovery_that_is_interrupted(signer: Signer, shim: Shim) -> None:
    def recovers() -> None:
        shim.fail(Call.SIGN, 0x30, times=1)
        signer.sign(b"message")

    for moment in _moments(recovers, 3):
        shim.heal()
        _check(signer, moment)
    assert shim.finalized_beside_a_call == 0


def test_question_to_a_child_that_is_interrupted_before_the_answer(token: SoftHsmToken) -> None:
    with open_signer(token.uri, isolation="process", max_sessions=1, session_timeout=20) as signer:
        # Until the question is sent, and a little further: each of these costs a child.
        for _ in itertools.islice(_moments(lambda: signer.sign(b"message")), 28):
            _until_signed(signer)


def _until_signed(signer: Signer) -> None:
    while True:
        try:
            signer.sign(b"message")
        except SignerTimeout:  # the only connection is lost
            raise
        except SignerUnavailable:  # the child is being replaced
            time.sleep(0.002)
        else:
            return


def _check(signer: Signer, moment: int) -> None:
    backend: Any = signer._backend
    assert isinstance(backend, Pkcs11Backend)
    gate = backend._module._gate
    assert not gate.inside, moment
    assert not gate.shut_by, moment
    assert signer._backend.pool_use() == (0, 1), moment  # type: ignore[attr-defined]
    signed: list[bytes] = []
    other = threading.Thread(target=lambda: signed.append(signer.sign(b"message")), daemon=True)
    other.start()
    other.join(10)
    assert signed, moment

# SPDX-License-Identifier: Apache-2.0
"""An exception of a signal's handler, wherever it comes, leaves nothing locked and nothing torn.

Handlers run at the first line of a function and after a call into C. A profile function is told of
just these moments, so that every one of them is tried in turn.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import d1_signer
from d1_signer import AuditTrail, AuditUnavailable, Signer
from d1_signer.audit import folder
from tests.audit.trails import ORIGIN, findings, records, sealing_signer, watched_signer
from tests.signing.backends import KeyBackend

_SEEN = (str(Path(d1_signer.__file__).parent), threading.__file__)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class SoftLimit(BaseException):
    pass


def interrupted(work: Callable[[], object], moment: int) -> bool:
    """Do work, with an exception at a moment of it; whether it was long enough for that."""
    left = moment

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(_SEEN):
            left -= 1
            if left < 0:
                raise SoftLimit  # which also ends the profiling

    sys.setprofile(profile)
    try:
        work()
    except SoftLimit as limit:
        # What it cut off is given back now, and not amid another test.
        traceback.clear_frames(limit.__traceback__)
    finally:
        sys.setprofile(None)
    return left < 0


def asked(signer: Signer) -> int:
    backend = signer._backend
    assert isinstance(backend, KeyBackend)
    return len(backend.asked)


@pytest.mark.parametrize("sync", ["none", "group"])
def test_a_signature_that_is_interrupted_anywhere(tmp_path: Path, sync: str) -> None:
    place = tmp_path / "trail"
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer(), sync=sync)
    with trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        for moment in itertools.count():
            if not interrupted(lambda: signer.sign(b"interrupted"), moment):
                break
            signer.sign(b"after", timeout=20)
        assert moment > 60, "the moments were seen"
        begun = sum(record.get("action") == "sign" for record in records(place))
        assert asked(signer) <= begun
    assert findings(place) == []
    assert len(folder.instances(place)) == 1


@pytest.mark.parametrize("again", [False, True])
def test_an_opening_that_is_interrupted_anywhere(tmp_path: Path, *, again: bool) -> None:
    for moment in itertools.count(step=7):
        place = tmp_path / str(moment)
        if again:
            with AuditTrail(place, origin=ORIGIN) as before:
                before.note("before", {})
        with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
            went_on = interrupted(functools.partial(trail.note, "first", {}), moment)
            trail.note("after", {})
        assert findings(place) == []
        if not went_on:
            break
    assert moment > 60, "the moments were seen"


def test_a_seal_that_is_interrupted(tmp_path: Path) -> None:
    place = tmp_path / "trail"
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        for moment in itertools.count(step=7):
            trail.note("x", {})
            if not interrupted(trail.seal, moment):
                break
            trail.note("after", {})
    assert findings(place) == []


def test_a_handler_that_signs_amid_a_record_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "trail"
    write = os.pwrite
    refused: list[AuditUnavailable] = []
    with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
        signer.sign(b"x")

        def handler_runs(file: int, data: bytes, at: int) -> int:
            monkeypatch.setattr(os, "pwrite", write)
            with pytest.raises(AuditUnavailable) as caught:
                signer.sign(b"in the handler")
            refused.append(caught.value)
            return write(file, data, at)

        monkeypatch.setattr(os, "pwrite", handler_runs)
        signer.sign(b"y")
        assert asked(signer) == 2
    assert "handler" in refused[0].message
    assert findings(place) == []

# SPDX-License-Identifier: Apache-2.0
"""A forked child has an instance of its own, also where Python was not told of the fork."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from d1_signer import AuditTrail
from d1_signer.audit import folder, record
from d1_signer.events import Recordable
from tests.audit.trails import ORIGIN, findings, records, sealing_signer, watched_signer

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def fork_in_c() -> int:
    return int(ctypes.PyDLL(None).fork())


def in_child(fork: Callable[[], int], work: Callable[[], object]) -> None:
    pid = fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("fork", [os.fork, fork_in_c])
def test_a_child_opens_an_instance_of_its_own(tmp_path: Path, fork: Callable[[], int]) -> None:
    place = tmp_path / "trail"
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
    with trail, watched_signer(trail) as signer:
        signer.sign(b"parent")

        def child() -> None:
            signer.sign(b"child")
            trail.close()

        in_child(fork, child)
        signer.sign(b"parent again")
        in_child(fork, child)
    assert len(folder.instances(place)) == 2, "the second child took that of the first one over"
    assert findings(place) == []
    opened = [told for told in records(place) if told["event"] == "opened"]
    assert len({told["process"] for told in opened}) == 3
    signed = [told for told in records(place) if told.get("action") == "sign"]
    assert sorted(told["process"] == os.getpid() for told in signed) == [
        *(False, False, True, True)
    ]


@pytest.mark.parametrize("fork", [os.fork, fork_in_c])
def test_a_child_of_a_fork_amid_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Callable[[], int]
) -> None:
    # A signal's handler forks between two lines of the trail, and both processes go on from there.
    place = tmp_path / "trail"
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
    signer = watched_signer(trail)
    signer.sign(b"x")
    me = os.getpid()
    children: list[int] = []
    encode = record.encode

    def forking(told: Mapping[str, Recordable]) -> bytes:
        if not children and os.getpid() == me:
            children.append(fork())
        return encode(told)

    monkeypatch.setattr(record, "encode", forking)
    try:
        signer.sign(b"y")
        signer.sign(b"z")
        trail.close()
    finally:
        if os.getpid() != me:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert findings(place) == []
    signed = [told["process"] for told in records(place) if told.get("action") == "sign"]
    assert signed.count(me) == 3
    assert len(signed) == 5, "the child has signed twice, with records of its own"


def test_a_fork_beside_a_thread_that_holds_the_lock(tmp_path: Path) -> None:
    place = tmp_path / "trail"
    going_on = True
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer(), sync="none")
    signer = watched_signer(trail)

    def sign() -> None:
        while going_on:
            signer.sign(b"thread")

    threads = [threading.Thread(target=sign) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            in_child(os.fork, lambda: signer.sign(b"child", timeout=20))
    finally:
        going_on = False
        for thread in threads:
            thread.join(30)
    signer.close()
    trail.close()
    assert findings(place) == []


def test_what_was_begun_before_a_fork_is_ended_by_both(tmp_path: Path) -> None:
    place = tmp_path / "trail"
    with AuditTrail(place, origin=ORIGIN) as trail:
        begun = trail.begin("sign", {})
        in_child(os.fork, lambda: trail.end(begun, "done"))
        trail.end(begun, "done")
    assert findings(place) == []
    ends = [told for told in records(place) if told["event"] == "end"]
    assert sorted("instance" in told for told in ends) == [False, True]


def test_processes_that_open_a_trail_at_once_never_share_an_instance(tmp_path: Path) -> None:
    place = tmp_path / "trail"

    def child() -> None:
        with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
            for _ in range(10):
                with watched_signer(trail) as signer:
                    signer.sign(b"x")

    for _ in range(2):
        pids = []
        for _ in range(6):
            if not (pid := os.fork()):
                status = 1
                try:
                    child()
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert findings(place) == []
    assert len(folder.instances(place)) <= 6, "those of the first round are used again"
    assert sum(told.get("action") == "sign" for told in records(place)) == 120

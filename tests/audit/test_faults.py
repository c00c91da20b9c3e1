# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, fail, or are gone: no signature without a record, and a clean log after."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d1_signer import AuditTrail, AuditUnavailable, Signer
from d1_signer.audit import folder, instance
from tests.audit.trails import (
    ORIGIN,
    findings,
    records,
    records_file,
    sealing_signer,
    verified,
    watched_signer,
)
from tests.signing.backends import KeyBackend


def _can_mount() -> bool:
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and (
        subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


# Where this user may not mount, a limit on the size of files stands for the full disk.
DISKS = ["limit", *(["tmpfs"] if _can_mount() else [])]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


def asked(signer: Signer) -> int:
    backend = signer._backend
    assert isinstance(backend, KeyBackend)
    return len(backend.asked)


def refused(signer: Signer) -> AuditUnavailable:
    before = asked(signer)
    with pytest.raises(AuditUnavailable) as caught:
        signer.sign(b"x")
    assert asked(signer) == before, "the backend was asked"
    assert caught.value.retryable
    return caught.value


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_is_full(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-m", "tests.audit.full_disk", kind, str(tmp_path)]
    if kind == "tmpfs":
        mount = f'mount -t tmpfs -o size=400k tmpfs "{tmp_path}" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["signed"] > 20
    # A device may have been asked for a signature that was not handed out; it is begun then.
    assert told["signed"] <= told["asked"] <= told["begun"]
    assert told["asked in all"] == told["asked"] + 1
    reasons = {errno.ENOSPC, errno.EFBIG if kind == "limit" else errno.ENOSPC}
    possible = [[True, f"{os.strerror(number)}."] for number in reasons]
    assert told["refused"] != []
    assert [reason for reason in told["refused"] if reason not in possible] == []
    assert told["findings"] == []
    assert told["instances"] == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("at", ["pwrite", "fdatasync"])
def test_a_disk_that_fails_for_a_while(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
    with trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        with monkeypatch.context() as patched:
            patched.setattr(os, at, fail)
            for _ in range(5):
                assert os.strerror(number) in refused(signer).message or at == "fdatasync"
        signer.sign(b"y")
    assert findings(place) == []
    signed = [record for record in records(place) if record.get("action") == "sign"]
    assert len(signed) >= 2


def test_half_a_record_is_cut_off_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        size = records_file(place).stat().st_size
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", lambda file, data, at: write(file, data[:50], at))
            refused(signer)
        assert records_file(place).stat().st_size == size
        signer.sign(b"y")
    assert findings(place) == []
    assert not [record for record in records(place) if record["event"] == "torn-tail"]


def test_a_folder_that_is_removed(place: Path) -> None:
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
    with trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        shutil.rmtree(place)
        for _ in range(3):
            refused(signer)
        place.mkdir()
        signer.sign(b"y")
        assert [r["event"] for r in records(place)] == ["opened", "begin", "end"]
    assert findings(place) == []


def test_a_folder_that_is_moved_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Looked for once a second; here at each record.
    monkeypatch.setattr(instance, "_LOOK_EVERY", 0.0)
    with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        moved = place.rename(place.with_name("moved"))
        refused(signer)
        moved.rename(place)
        signer.sign(b"y")
    assert findings(place) == []
    assert len(folder.instances(place)) == 1


def test_a_folder_that_may_not_be_written(place: Path) -> None:
    place.mkdir(0o555)
    for above in place.parents[:-2]:
        above.chmod(above.stat().st_mode | 0o011)
    code = (
        "import os, sys\n"
        "from d1_signer import AuditTrail, AuditUnavailable\n"
        "if os.geteuid() == 0:  # whom no mode keeps from writing\n"
        "    os.setgroups([])\n"
        "    os.setgid(65534)\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    AuditTrail(sys.argv[1], origin='o').note('x', {})\n"
        "except AuditUnavailable as error:\n"
        "    print(error.retryable, error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.startswith("True "), done.stderr
    assert "Permission denied" in done.stdout


def test_a_file_in_place_of_the_folder(place: Path) -> None:
    place.write_text("")
    with pytest.raises(AuditUnavailable):
        AuditTrail(place, origin=ORIGIN)


def test_a_clock_that_is_set_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = time.time_ns
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
    with trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        monkeypatch.setattr(time, "time_ns", lambda: ahead() - 3_600 * 10**9)
        signer.sign(b"y")
    told = records(place)
    (back,) = [record for record in told if record["event"] == "clock-set-back"]
    assert back["before"] == told[back["number"] - 1]["time"] > back["time"]
    (report,) = verified(place)
    assert report.findings == []
    assert f"Record {back['number']}: the clock was set back." in report.notes


def test_an_instance_whose_lock_is_held_is_left_alone(place: Path) -> None:
    with AuditTrail(place, origin=ORIGIN) as trail:
        watched_signer(trail).close()
    (held,) = folder.instances(place)
    with (held / folder.LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with AuditTrail(place, origin=ORIGIN) as trail:
            watched_signer(trail).close()
        assert len(folder.instances(place)) == 2
    assert findings(place) == []


def test_going_on_without_records_is_a_choice_that_is_recorded(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trail = AuditTrail(
        place, origin=ORIGIN, checkpoint_signer=sealing_signer(), on_failure="continue"
    )
    with trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fail)
            signer.sign(b"y")
            signer.sign(b"z")
        signer.sign(b"w")
        assert asked(signer) == 4
    assert caplog.text.count("audit.without_record") == 2
    told = records(place)
    assert told[0]["on_failure"] == "continue"
    (gap,) = [record for record in told if record["event"] == "gap"]
    assert gap["missed"] == 2
    assert findings(place) == [
        f"{gap['number']}: Before it, 2 things were done without a record (on_failure=continue)."
    ]


@pytest.mark.parametrize("cut", [1, 30, 200])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_torn_tail_is_told_at_the_next_opening(
    place: Path, cut: int, *, checkpointed: bool
) -> None:
    sealing = sealing_signer() if checkpointed else None
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing) as trail:
        watched_signer(trail).close()
    file = records_file(place)
    with file.open("ab") as opened:
        opened.write(file.read_bytes()[:cut])
    (report,) = verified(place)
    assert report.findings == []
    assert f"{cut} bytes behind the last record" in report.notes[0]
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing) as trail:
        watched_signer(trail).close()
    (torn,) = [record for record in records(place) if record["event"] == "torn-tail"]
    assert torn["bytes"] == cut
    (report,) = verified(place)
    assert report.findings == []
    assert f"Record {torn['number']} tells" in report.notes[0]


def test_a_torn_checkpoint_is_made_again(place: Path) -> None:
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        watched_signer(trail).close()
    (path,) = folder.instances(place)
    checkpoints = path / folder.CHECKPOINTS
    whole = checkpoints.read_bytes()
    checkpoints.write_bytes(whole + whole[:77])
    (report,) = verified(place)
    assert report.findings == []
    assert report.notes == ["The last checkpoint was not written to its end."]
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        watched_signer(trail).close()
    (report,) = verified(place)
    assert (report.findings, report.notes) == ([], [])
    assert report.sealed == report.records
    assert [r["torn_checkpoint"] for r in records(place) if "torn_checkpoint" in r] == [77]


@pytest.mark.parametrize("damage", ["gone", "empty", "zeros", "short"])
def test_stored_hashes_are_made_again(place: Path, damage: str) -> None:
    def use() -> None:
        trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer())
        with trail, watched_signer(trail) as signer:
            for _ in range(150):
                signer.sign(b"x")

    use()
    (path,) = folder.instances(place)
    hashes = path / folder.HASHES
    before = hashes.read_bytes()
    if damage == "gone":
        hashes.unlink()
    else:
        kept = {"empty": b"", "zeros": bytes(len(before)), "short": before[:-3]}[damage]
        hashes.write_bytes(kept)
    use()
    assert findings(place) == []
    assert len(folder.instances(place)) == 1
    assert hashes.read_bytes()[: len(before) - 64] == before[:-64]


def test_an_instance_that_was_altered_is_left_alone_and_named(place: Path) -> None:
    def use() -> None:
        with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
            watched_signer(trail).close()

    use()
    file = records_file(place)
    (altered,) = folder.instances(place)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    use()
    assert len(folder.instances(place)) == 2
    opened = [record for record in records(place) if record["event"] == "opened"]
    opened.sort(key=lambda record: record["time"])  # names of one second are in any order
    assert [record.get("left_alone") for record in opened] == [None, [altered.name]]
    assert len(findings(place)) == 1

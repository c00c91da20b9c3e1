# SPDX-License-Identifier: Apache-2.0
"""What a trail tells an operator: how much it has written, and what can be altered unseen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from d1_signer import AuditTrail, Signer, SignerError
from d1_signer.audit import instance, process
from tests.audit.trails import (
    ORIGIN,
    SEALING,
    findings,
    records,
    sealing_signer,
    watched_signer,
)
from tests.signing.backends import KeyBackend


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


def sealed_trail(place: Path, sealing: Signer | None = None) -> AuditTrail:
    return AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing or sealing_signer())


def hundred_seconds_after(
    record: dict[str, str], monkeypatch: pytest.MonkeyPatch, trail: AuditTrail
) -> float | None:
    """What the trail says a hundred seconds after a record was written."""
    moment = datetime.fromisoformat(record["time"]).timestamp() + 100
    with monkeypatch.context() as patched:
        patched.setattr(process, "time", SimpleNamespace(time=lambda: moment))
        return trail.status().unsealed_for


def test_a_trail_that_nobody_has_used(place: Path) -> None:
    with sealed_trail(place) as trail:
        assert trail.status().to_dict() == {
            "records": 0,
            "instance": None,
            "sealed": 0,
            "unsealed": 0,
            "unsealed_for": 0.0,
        }
    assert not list(place.iterdir())


def test_what_is_written_and_what_is_sealed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sealed_trail(place) as trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        told = records(place)
        status = trail.status()
        assert (status.records, status.sealed, status.unsealed) == (4, 0, 4)
        assert status.instance == next(place.iterdir()).name
        assert hundred_seconds_after(told[0], monkeypatch, trail) == pytest.approx(100, abs=0.01)
        assert trail.seal()
        status = trail.status()
        assert (status.records, status.sealed, status.unsealed) == (4, 4, 0)
        assert status.unsealed_for == 0.0
        signer.sign(b"y")
        signer.sign(b"z")
        assert trail.status().unsealed == 4
        oldest = records(place)[4]
        assert hundred_seconds_after(oldest, monkeypatch, trail) == pytest.approx(100, abs=0.01)
        # A clock that was set back makes nobody younger than new.
        monkeypatch.setattr(process, "time", SimpleNamespace(time=lambda: 0.0))
        assert trail.status().unsealed_for == 0.0


class SigningAmid(KeyBackend):
    """Seals, while a signature is made and recorded."""

    watched: Signer

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        self.watched.sign(b"amid a seal")
        return super().sign_digest(digest, deadline)


def test_what_is_written_amid_a_seal_is_not_sealed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SigningAmid(SEALING)
    with sealed_trail(place, Signer(backend)) as trail, watched_signer(trail) as signer:
        backend.watched = signer
        signer.sign(b"x")
        assert trail.seal()
        status = trail.status()
        assert (status.sealed, status.unsealed) == (4, 2)
        amid = records(place)[4]
        assert hundred_seconds_after(amid, monkeypatch, trail) == pytest.approx(100, abs=0.01)


class Down(KeyBackend):
    down = True

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        if self.down:
            raise SignerError("the sealing HSM is down")
        return super().sign_digest(digest, deadline)


def test_a_seal_that_fails_makes_nothing_younger(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Down(SEALING)
    with sealed_trail(place, Signer(backend)) as trail, watched_signer(trail) as signer:
        for _ in range(3):
            signer.sign(b"x")
            with pytest.raises(SignerError, match="down"):
                trail.seal()
        first = records(place)[0]
        assert hundred_seconds_after(first, monkeypatch, trail) == pytest.approx(100, abs=0.01)
        backend.down = False
        assert trail.seal()
        assert trail.status().unsealed_for == 0.0


def test_what_an_earlier_process_left_unsealed_counts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AuditTrail(place, origin=ORIGIN) as trail:
        watched_signer(trail).close()
    left = records(place)
    with sealed_trail(place) as trail, watched_signer(trail) as signer:
        signer.sign(b"x")
        status = trail.status()
        assert status.records == len(records(place)) - len(left) == 4
        assert status.unsealed == len(records(place))
        oldest = left[0]
        assert hundred_seconds_after(oldest, monkeypatch, trail) == pytest.approx(100, abs=0.01)


def test_the_number_of_records_only_grows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_LOOK_EVERY", 0.0)
    numbers = []
    with sealed_trail(place) as trail:
        with watched_signer(trail) as signer:
            signer.sign(b"x")
            numbers.append(trail.status().records)
            assert trail.seal()
            signer.sign(b"y")
            kept = place.rename(place.with_name("kept"))
            status = trail.status()
            assert status.unsealed == 2
            assert status.unsealed_for is None  # it cannot be read, and is no error
            numbers.append(status.records)
            place.mkdir()
            signer.sign(b"z")
            numbers.append(trail.status().records)
        numbers.append(trail.status().records)
    numbers.append(trail.status().records)
    assert trail.status().instance is None
    assert trail.status().unsealed_for == 0.0
    assert numbers == sorted(numbers)
    assert numbers[-1] == len(records(place)) + len(records(kept))
    shutil.rmtree(kept)
    assert findings(place) == []


def test_a_forked_child_has_a_status_of_its_own(place: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from tests.audit.test_status import sealed_trail
from tests.audit.trails import watched_signer
trail = sealed_trail(Path(sys.argv[1]))
signer = watched_signer(trail)
signer.sign(b"x")
ours = trail.status()
if not (child := os.fork()):
    assert trail.status().records == 0 and trail.status().instance is None
    signer.sign(b"y")
    status = trail.status()
    os._exit(not (status.records == 3 and status.instance != ours.instance))
assert os.waitpid(child, 0)[1] == 0
assert trail.status().records == ours.records == 4
signer.close()
trail.close()
"""
    subprocess.run([sys.executable, "-c", code, str(place)], check=True, timeout=120)

# SPDX-License-Identifier: Apache-2.0
"""What somebody who can write the trail's folder puts there, or a crash leaves there.

It keeps nobody from recording, hides no instance, is waited for by nobody and fills no memory.
"""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer import AuditError, AuditTrail, ConfigurationError, InvalidInputError, Signer, Use
from d1_signer.audit import folder, record, verifying
from d1_signer.audit.hashes import BLOCK
from d1_signer.audit.note import SignedNote, VerifierKey, split_notes
from d1_signer.audit.proving import prove
from d1_signer.audit.sealing import checkpoint_key
from tests.audit.trails import (
    ORIGIN,
    findings,
    records,
    records_file,
    sealing_signer,
    verified,
    verifier_key,
    watched_signer,
)
from tests.owners import give_away
from tests.signing.backends import KeyBackend

FOREIGN = "29991231T235959Z-0123456789abcdef"  # newer than all, so that it is tried first


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A trail of one instance, which is closed and sealed."""
    place = tmp_path / "trail"
    use(place)
    return place


def use(place: Path, *, origin: str = ORIGIN, **options: Any) -> None:
    with (
        AuditTrail(place, origin=origin, checkpoint_signer=sealing_signer(), **options) as trail,
        watched_signer(trail) as signer,
    ):
        signer.sign(b"x")


def only(place: Path) -> Path:
    (found,) = folder.instances(place)
    return found


def as_file(path: Path) -> None:
    path.write_bytes(b"")


def as_link_elsewhere(path: Path) -> None:
    elsewhere = path.parent.with_name("elsewhere")
    only(path.parent).rename(elsewhere)
    path.symlink_to(elsewhere)


def with_a_linked_lock(path: Path) -> None:
    path.mkdir()
    (path / folder.LOCK).symlink_to("/dev/null")


def with_a_pipe(name: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.mkdir()
        (path / folder.LOCK).touch()
        os.mkfifo(path / name)

    return put


@pytest.mark.parametrize(
    "put",
    [
        as_file,
        as_link_elsewhere,
        with_a_linked_lock,
        with_a_pipe(folder.CHECKPOINTS),
        with_a_pipe("records-0000000000000000.jsonl"),
        with_a_pipe(folder.HASHES),
    ],
    ids=["file", "link", "linked lock", "checkpoints", "records", "hashes"],
)
def test_what_is_named_like_an_instance_keeps_nobody_from_recording(
    place: Path, put: Callable[[Path], None]
) -> None:
    path = place / FOREIGN
    put(path)
    use(place)
    used = [found for found in folder.instances(place) if found != path]
    assert len(used) == 1
    assert sum(json.loads(line)["event"] == "begin" for line in lines(used[0])) >= 1
    if path.is_symlink():
        assert len(lines(path)) == len(lines(used[0])), "what it leads to was not written"


def lines(path: Path) -> list[bytes]:
    return [line for _, file in folder.segments(path) for line in file.read_bytes().splitlines()]


def test_an_instance_of_another_user_is_not_gone_on_with(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = only(place)
    before = lines(theirs)
    give_away(theirs, monkeypatch)
    use(place)
    assert lines(theirs) == before
    assert len(folder.instances(place)) == 2


def test_a_file_beside_the_instances_hides_none(place: Path) -> None:
    (place / folder.LOCK).touch()
    named = {report.name: report for report in verified(place)}
    assert [*named] == [place.name, only_below(place).name]
    assert named[only_below(place).name].sealed > 0
    assert named[place.name].notes == ["It has no record."]


def only_below(place: Path) -> Path:
    (found,) = [path for path in folder.instances(place) if path != place]
    return found


def test_however_many_are_left_alone_a_record_names_some(place: Path) -> None:
    checkpoints = (only(place) / folder.CHECKPOINTS).read_bytes()
    for number in range(120):  # of thousands the names do not fit into a record
        path = place / f"29991231T235959Z-{number:016x}"
        path.mkdir()
        (path / folder.LOCK).touch()
        (path / folder.CHECKPOINTS).write_bytes(checkpoints)
    use(place)
    opened = [told for told in records(place) if told["event"] == "opened"]
    assert max(len(told.get("left_alone", [])) for told in opened) == 100


@pytest.mark.parametrize("name", [folder.CHECKPOINTS, "records-0000000000000009.jsonl"])
def test_a_pipe_or_a_link_is_told_and_not_waited_for(place: Path, name: str) -> None:
    file = only(place) / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(OSError, match="no regular file"):
        verified(place)
    file.unlink()
    file.symlink_to(records_file(place))
    with pytest.raises(OSError, match="symbolic links"):
        verified(place)


def test_a_file_of_checkpoints_without_an_end_fills_no_memory(place: Path) -> None:
    os.truncate(only(place) / folder.CHECKPOINTS, 64 << 20)
    tracemalloc.start()
    try:
        found = findings(place)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 << 20
    assert found == [
        "None: Checkpoint 2: The signed note cannot be read: it is larger than 65536 bytes."
    ]


@pytest.mark.parametrize("cut", [1, 3, 60])
def test_the_first_checkpoint_may_be_torn(place: Path, cut: int) -> None:
    checkpoints = only(place) / folder.CHECKPOINTS
    os.truncate(checkpoints, checkpoints.stat().st_size - cut)
    torn = checkpoints.stat().st_size
    use(place)
    (report,) = verified(place)
    assert (report.findings, report.sealed) == ([], report.records)
    assert [told["torn_checkpoint"] for told in records(place) if "torn_checkpoint" in told] == [
        torn
    ]


@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK])
def test_a_block_of_stored_hashes_may_lack_its_root(tmp_path: Path, size: int) -> None:
    place = tmp_path / "trail"
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        for number in range(size - 2):
            trail.note("test", {"n": number})  # with its opening and its closing whole blocks
    hashes = only(place) / folder.HASHES
    os.truncate(hashes, 32 * BLOCK)
    if size > BLOCK:
        with pytest.raises(AuditError, match="stored hashes are not those"):
            prove(only(place), size - 1)
    use(place)
    assert findings(place) == []
    assert len(folder.instances(place)) == 1
    assert prove(only(place), size - 1)


@pytest.mark.parametrize(
    "given",
    [
        Use(purpose=1.5),  # type: ignore[arg-type]
        Use(purpose=b"x"),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", 1.5),)),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", 1 << 60),)),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", {"A": 1}),)),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", object()),)),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", (("b",),)),)),  # type: ignore[arg-type]
        Use(purpose="x", references=(("a", "\ud800"),)),
    ],
    ids=lambda given: repr(given).encode("ascii", "replace").decode().split(" at ")[0],
)
def test_what_no_reader_keeps_is_not_recorded_and_not_signed(place: Path, given: Use) -> None:
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        signer = watched_signer(trail)
        backend = signer._backend
        assert isinstance(backend, KeyBackend)
        with pytest.raises(InvalidInputError, match=r"record|audit trail"):
            signer.sign(b"x", use=given)
        assert backend.asked == []
        signer.sign(b"x")
        signer.close()
    assert findings(place) == []


def test_a_member_has_a_name_that_its_canonical_form_can_have() -> None:
    with pytest.raises(InvalidInputError):
        record.encode({"Ä": 1})


@pytest.mark.parametrize(
    "limit",
    [
        {"timeout": math.inf},
        {"timeout": math.nan},
        {"timeout": 1e12},
        {"seal_seconds": math.inf},
        {"seal_seconds": 0},
    ],
    ids=str,
)
def test_limits_in_time_have_a_limit(tmp_path: Path, limit: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="more than a day"):
        AuditTrail(tmp_path / "trail", origin=ORIGIN, **limit)  # type: ignore[arg-type]


def test_a_full_file_is_on_the_disk_before_another_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a machine that loses its power keeps the second one and not the end of the first."""
    order: list[str] = []
    begin, sync = folder.open_segment, os.fdatasync

    def begun(path: Path, first: int) -> Any:
        order.append(f"begin {first}")
        return begin(path, first)

    def synced(file: Any) -> None:
        order.append("sync")
        sync(file)

    monkeypatch.setattr(folder, "open_segment", begun)
    monkeypatch.setattr(os, "fdatasync", synced)
    with AuditTrail(tmp_path / "trail", origin=ORIGIN, sync="none", segment_bytes=400) as trail:
        for number in range(4):
            trail.note("test", {"n": number})
    begins = [at for at, what in enumerate(order) if what.startswith("begin") and at]
    assert len(begins) >= 2
    assert all(order[at - 1] == "sync" for at in begins)


def test_a_checkpoint_of_another_origin_does_not_vouch_for_the_records(place: Path) -> None:
    """Whose key is known to the auditor as another host's cannot seal what this one wrote."""
    foreign = Signer(KeyBackend(ec.derive_private_key(0xF0E, ec.SECP256R1())))
    other = checkpoint_key("other.example/d1", foreign)
    file = only(place) / folder.CHECKPOINTS
    (note,) = [note for note, _ in split_notes(file.read_bytes().splitlines(keepends=True))]
    text = SignedNote.parse(note).text.replace(ORIGIN, other.name)
    file.write_bytes(SignedNote(text, (other.signature(foreign.sign(text.encode())),)).encode())
    (report,) = verifying.verify([only(place)], [verifier_key(), other])
    (finding,) = report.findings
    assert "is of other.example/d1, and the records are not" in finding.text
    assert report.origins == ["other.example/d1"]


def test_keys_of_one_name_are_told_apart(place: Path) -> None:
    another = VerifierKey(
        ORIGIN, Signer(KeyBackend(ec.derive_private_key(0xF0E, ec.SECP256R1()))).public_key
    )
    for keys in ([another, verifier_key()], [verifier_key(), another]):
        (report,) = verifying.verify([only(place)], keys)
        assert report.findings == []
    (report,) = verifying.verify([only(place)], [another])
    assert report.sealed == 0
    assert "None of the given keys signed it" in report.findings[0].text


def test_an_explicit_choice_to_go_on_without_records_is_told(tmp_path: Path) -> None:
    use(tmp_path / "trail", on_failure="continue")
    (report,) = verified(tmp_path / "trail")
    assert report.findings == []
    assert "Record 0: from here on keys were used without a record" in report.notes[0]

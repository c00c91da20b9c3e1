# SPDX-License-Identifier: Apache-2.0
"""A thousand tamperings are found and named; in logs of crashed processes nothing is.

Whoever tampers here may write every file, and has no sealing key. What was not sealed yet is not
touched: nothing can show what becomes of it.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer import AuditTrail, Signer, Use
from d1_signer.audit import folder, record
from d1_signer.audit.hashes import HashWriter
from d1_signer.audit.merkle import leaf_hash
from d1_signer.audit.note import Checkpoint, SignedNote, VerifierKey, split_notes
from tests.audit.trails import (
    ORIGIN,
    SIGNING,
    findings,
    records,
    records_file,
    sealing_signer,
    verified,
)
from tests.signing.backends import KeyBackend

EACH = 100  # of ten kinds
FOREIGN = Signer(KeyBackend(ec.derive_private_key(0xBAD, ec.SECP256R1())))


class Signs(KeyBackend):
    """Answers at once; what is signed does not matter here."""

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        self.asked.append((digest, deadline))
        return bytes([1]) * 64


def write_log(place: Path, seed: int, *, seals: int = 6) -> None:
    """A trail of one instance, with a checkpoint after every few signatures."""
    chance = random.Random(seed)
    for _ in range(2):
        trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer(), sync="none")
        backend = Signs(SIGNING)
        backend.encoding = backend.encoding.__class__("raw")
        with trail, Signer(backend, verify=False, trail=trail) as signer:
            for number in range(seals):
                for _ in range(chance.randint(1, 5)):
                    signer.sign(b"%d" % number, use=Use(purpose="test", references=(("jti", "é"),)))
                trail.seal()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("honest") / "trail"
    write_log(place, 1)
    assert findings(place) == []
    return place


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("other") / "trail"
    write_log(place, 2)
    return place


class Tampered:
    """The files of a trail's only instance, to be changed and written again."""

    def __init__(self, place: Path, chance: random.Random) -> None:
        self.chance = chance
        self.file = records_file(place)
        self.lines = self.file.read_bytes().splitlines(keepends=True)
        self.checkpoints = self.file.with_name(folder.CHECKPOINTS)
        self.notes = [note for note, _ in split_notes(io.BytesIO(self.checkpoints.read_bytes()))]

    def pick(self) -> int:
        return self.chance.randrange(len(self.lines))

    def renumber(self) -> None:
        for number, line in enumerate(self.lines):
            told = json.loads(line)
            self.lines[number] = record.encode({**told, "number": number}) + b"\n"

    def save(self) -> None:
        self.file.write_bytes(b"".join(self.lines))
        self.checkpoints.write_bytes(b"".join(self.notes))
        if self.chance.random() < 0.5:  # whoever knows of the stored hashes makes them fit
            hashes = HashWriter(self.file.parent, 0)
            for number, line in enumerate(self.lines):
                hashes.put(number, leaf_hash(line[:-1]))
            hashes.close()


def edit(log: Tampered, _: Tampered) -> int:
    number = log.pick()
    told: dict[str, Any] = json.loads(log.lines[number])
    name = log.chance.choice(sorted(set(told) - {"number"}))
    told[name] = {
        "outcome": "login",
        "begin": 1,
        "time": told["time"][:-2] + ("0Z" if told["time"][-2] != "0" else "1Z"),
    }.get(name, "x" if told[name] != "x" else "y")
    log.lines[number] = record.encode(told) + b"\n"
    return number


def flip(log: Tampered, _: Tampered) -> int:
    number = log.pick()
    line = bytearray(log.lines[number])
    line[log.chance.randrange(len(line))] ^= 1 << log.chance.randrange(8)
    log.lines[number] = bytes(line)
    return number


def delete(log: Tampered, _: Tampered) -> int:
    number = log.chance.randrange(len(log.lines) - 1)
    del log.lines[number]
    if log.chance.random() < 0.5:
        log.renumber()
    return number


def insert(log: Tampered, _: Tampered) -> int:
    number = log.pick()
    told = json.loads(log.chance.choice(log.lines))
    log.lines.insert(number, record.encode({**told, "number": number}) + b"\n")
    if log.chance.random() < 0.5:
        log.renumber()
    return number


def reorder(log: Tampered, _: Tampered) -> int:
    number = log.chance.randrange(len(log.lines) - 1)
    log.lines[number : number + 2] = reversed(log.lines[number : number + 2])
    if log.chance.random() < 0.5:
        log.renumber()
    return number


def cut(log: Tampered, _: Tampered) -> int:
    number = log.pick()
    del log.lines[number:]
    kept = log.chance.random()
    if kept < 0.5:  # the newest checkpoint is taken away too, and not the one before
        del log.notes[-1]
        newest = Checkpoint.parse(SignedNote.parse(log.notes[-1]).text).size
        del log.lines[newest - 1 :]
        return len(log.lines)
    return number


def splice(log: Tampered, other: Tampered) -> int:
    start, end = sorted(log.chance.sample(range(min(len(log.lines), len(other.lines))), 2))
    if log.chance.random() < 0.3:
        log.notes = other.notes
        return 0
    log.lines[start:end] = other.lines[start:end]
    return start


def replay(log: Tampered, _: Tampered) -> int:
    if log.chance.random() < 0.3:
        log.notes.append(log.chance.choice(log.notes[:-1]))
        return 0
    size = len(log.lines)
    start, end = sorted(log.chance.sample(range(size + 1), 2))
    log.lines += log.lines[start:end]
    if log.chance.random() < 0.5:
        log.renumber()
    return size


def foreign_key(log: Tampered, _: Tampered) -> int:
    place = log.chance.randrange(len(log.notes))
    told = Checkpoint.parse(SignedNote.parse(log.notes[place]).text)
    key = VerifierKey(ORIGIN, FOREIGN.public_key)
    text = told.text()
    signature = key.signature(FOREIGN.sign(text.encode()))
    if log.chance.random() < 0.5:  # under the name and the identity of the true one
        real = SignedNote.parse(log.notes[place]).signatures[0]
        signature = real._replace(value=signature.value)
    log.notes[place] = SignedNote(text, (signature,)).encode()
    return place


def take_checkpoints(log: Tampered, _: Tampered) -> int:
    del log.notes[log.chance.randrange(len(log.notes) - 2) :]
    return 0


KINDS: list[Callable[[Tampered, Tampered], int]] = [
    *(edit, flip, delete, insert, reorder, cut, splice, replay, foreign_key, take_checkpoints)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_hundred_tamperings_of_each_kind(
    honest: Path, other: Path, tmp_path: Path, kind: Callable[[Tampered, Tampered], int]
) -> None:
    unseen = []
    done = 0
    for seed in range(1000):
        if done == EACH:
            break
        place = tmp_path / str(seed)
        shutil.copytree(honest, place)
        log = Tampered(place, random.Random(f"{kind.__name__} {seed}"))
        before = (list(log.lines), list(log.notes))
        at = kind(log, Tampered(other, log.chance))
        if (log.lines, log.notes) == before:
            continue  # it changed nothing
        log.save()
        done += 1
        found = [finding for report in verified(place) for finding in report.findings]
        named = [
            finding
            for finding in found
            if "heckpoint" in finding.text or (finding.record is not None and finding.record <= at)
        ]
        if not named:
            unseen.append((seed, at, found))
        shutil.rmtree(place)
    assert done == EACH
    assert unseen == []


def test_an_edited_record_is_named_exactly(honest: Path, tmp_path: Path) -> None:
    for number in range(len(records(honest))):
        place = tmp_path / str(number)
        shutil.copytree(honest, place)
        file = records_file(place)
        lines = file.read_bytes().splitlines(keepends=True)
        told = json.loads(lines[number])
        lines[number] = record.encode({**told, "extra": "forged"}) + b"\n"
        file.write_bytes(b"".join(lines))
        (report,) = verified(place)
        (finding,) = report.findings
        assert finding.record == number
        assert finding.text.startswith("It is not the record that the checkpoint")


def test_a_copy_and_a_renamed_instance_are_found(honest: Path, tmp_path: Path) -> None:
    place = tmp_path / "trail"
    shutil.copytree(honest, place / "a")
    shutil.copytree(honest, place / "b")
    assert findings(place) == ["None: The instance is there twice: one is a copy of the other."]
    shutil.rmtree(place / "b")
    (instance,) = folder.instances(place)
    instance.rename(instance.with_name("20200101T000000Z-0123456789abcdef"))
    assert any("another instance" in finding for finding in findings(place))


def test_what_was_taken_back_is_found_by_a_checkpoint_that_was_kept(tmp_path: Path) -> None:
    place, kept = tmp_path / "trail", tmp_path / "kept"
    write_log(place, 3, seals=2)
    shutil.copytree(place, kept)
    write_log(place, 4, seals=2)
    newest = Tampered(place, random.Random(0)).notes[-1]
    middle = Tampered(place, random.Random(0)).notes[3]
    assert findings(place, newest, middle) == []
    size = Checkpoint.parse(SignedNote.parse(newest).text).size
    shutil.rmtree(place)
    kept.rename(place)
    assert findings(place) == [], "inside of the folder nothing shows it"
    have = len(records(place))
    assert findings(place, newest) == [
        f"{have}: The records {have} to {size - 1} are missing: there is a checkpoint over {size}."
    ]
    shutil.rmtree(place)
    place.mkdir()
    assert "The instance is not there" in findings(place, newest)[0]


def crash(place: Path, chance: random.Random) -> None:
    """Leave the files as a machine may that loses its power: what was not synced may be gone."""
    (instance,) = folder.instances(place)
    file = max(file for _, file in folder.segments(instance))
    data = file.read_bytes()
    kept = io.BytesIO((instance / folder.CHECKPOINTS).read_bytes())
    notes = [note for note, _ in split_notes(kept)]
    dropped = chance.randrange(2)
    notes, torn = notes[: len(notes) - dropped], b"".join(notes[len(notes) - dropped :])
    sealed = Checkpoint.parse(SignedNote.parse(notes[-1]).text).size if notes else 0
    first = max(number for number, _ in folder.segments(instance))
    lines = data.splitlines(keepends=True)
    least = sum(map(len, lines[: max(0, sealed - first)]))
    # A checkpoint that is lost was never there for anybody, so no record may speak of it.
    told = [
        number for number, line in enumerate(lines) if json.loads(line).get("sealed", 0) > sealed
    ]
    most = sum(map(len, lines[: told[0]])) if told else len(data)
    end = chance.randint(least, most)
    file.write_bytes(data[:end] + bytes(chance.choice([0, 0, 40])))
    (instance / folder.CHECKPOINTS).write_bytes(
        b"".join(notes) + torn[: chance.randrange(1 + len(torn))][:-1]
    )
    hashes = instance / folder.HASHES
    data = hashes.read_bytes()
    hashes.write_bytes(data[: chance.randint(0, len(data))] + bytes(chance.choice([0, 64])))


def honest_log_with_crashes(place: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        write_log(place, chance.randrange(1 << 30), seals=chance.randint(0, 2))
        crash(place, chance)
        assert findings(place) == [], f"after a crash; seed {seed}"
    write_log(place, seed, seals=1)
    (report,) = verified(place)
    assert report.findings == [], f"at the end; seed {seed}"
    assert report.sealed == report.records


@pytest.mark.parametrize("block", range(3))
def test_nothing_is_found_in_honest_logs_with_crashes(tmp_path: Path, block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        honest_log_with_crashes(tmp_path / str(seed), seed)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nothing_is_found_in_a_thousand(tmp_path: Path) -> None:
    for seed in range(1000, 2000):
        honest_log_with_crashes(tmp_path / "trail", seed)
        shutil.rmtree(tmp_path / "trail")

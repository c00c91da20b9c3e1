# SPDX-License-Identifier: Apache-2.0
"""Verifying a trail: its folders, a key, and nothing else.

Records are read once, in order, whatever their number. Each root that a checkpoint tells is
compared with the tree over the records before it, so that checkpoints are held against each other
as well: two that agree with one list of records are consistent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d1_signer.audit import folder, merkle, record, stored
from d1_signer.audit.hashes import StoredHashes
from d1_signer.audit.note import Checkpoint, SignedNote, VerifierKey
from d1_signer.audit.reading import Told, read
from d1_signer.audit.sealing import instance_line
from d1_signer.errors import AuditError

MOST_FINDINGS = 100
"""Findings that are told of one instance."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was recorded.

    Attributes:
        instance: Name of the instance.
        record: Number of the record, or of the first one; None where it is about a checkpoint.
        text: What it is.
    """

    instance: str
    record: int | None
    text: str


@dataclass(slots=True)
class InstanceReport:
    """What was found in one instance.

    Attributes:
        name: Its name.
        records: How many there are.
        sealed: How many of them the newest checkpoint that holds vouches for.
        checkpoints: How many checkpoints hold.
        origins: Whose they are.
        unfinished: Records of a beginning without an end: what came of it is not known.
        notes: What an auditor should know and is no finding.
        findings: What is not as it was recorded.
    """

    name: str
    records: int = 0
    sealed: int = 0
    checkpoints: int = 0
    origins: list[str] = field(default_factory=list)
    unfinished: int = 0
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def find(self, number: int | None, text: str) -> None:
        """Keep a finding; after `MOST_FINDINGS` they say nothing new."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(self.name, number, text))


def verify(
    instances: Sequence[Path],
    keys: Sequence[VerifierKey],
    since: Sequence[bytes] = (),
    taken: Callable[[int], None] = lambda _: None,
) -> list[InstanceReport]:
    """Verify instance folders.

    Args:
        instances: The folders.
        keys: Whose checkpoints are believed.
        since: Checkpoints that were kept elsewhere; the instances must hold what they tell.
        taken: Told how many bytes each record has, as it is read.

    Raises:
        AuditError: A checkpoint of ``since`` cannot be read, or none of the keys signed it.
        OSError: A folder cannot be read.
    """
    kept = _kept(since, keys)
    reports: dict[str, InstanceReport] = {}
    for path in instances:
        report = _Verification(path, keys, kept.pop(path.name, {}), taken).run()
        if path.name in reports:
            report.find(None, "The instance is there twice: one is a copy of the other.")
            report.findings += reports[path.name].findings
        reports[path.name] = report
    for name, roots in kept.items():
        missing = reports.setdefault(name, InstanceReport(name))
        missing.find(
            None,
            f"The instance is not there; a checkpoint over {max(roots)} of its records was kept.",
        )
    return list(reports.values())


def _kept(since: Sequence[bytes], keys: Sequence[VerifierKey]) -> dict[str, dict[int, bytes]]:
    """Sizes and roots of the checkpoints that were kept elsewhere, by instance."""
    kept: dict[str, dict[int, bytes]] = {}
    for note in since:
        told = believed(note, keys)
        names = [line.removeprefix("instance ") for line in told.extensions]
        if len(names) != 1 or kept.setdefault(names[0], {}).get(told.size, told.root) != told.root:
            raise AuditError("A kept checkpoint names no instance, or two of them contradict.")
        kept[names[0]][told.size] = told.root
    return kept


def believed(note: bytes, keys: Sequence[VerifierKey]) -> Checkpoint:
    """What a note tells, once one of the keys has verified it.

    Raises:
        AuditError: It is no checkpoint of these keys.
    """
    signed = SignedNote.parse(note)
    key = signed.verified_by(keys)
    told = Checkpoint.parse(signed.text)
    if told.origin != key.name:
        raise AuditError(f"It is of {told.origin}, and its key is of {key.name}.")
    return told


class _Verification:
    """One instance, read from its first record to its last."""

    def __init__(
        self,
        path: Path,
        keys: Sequence[VerifierKey],
        kept: Mapping[int, bytes],
        taken: Callable[[int], None],
    ) -> None:
        self._path = path
        self._taken = taken
        self._keys = keys
        self._kept = dict(kept)
        self._report = InstanceReport(path.name)
        self._nodes: merkle.Range = ()
        self._size = 0  # leaves of the tree
        self._number = 0  # that the next record has
        self._broken = False  # a tree over what is there would say the same at each checkpoint
        self._time = ""
        self._open: set[int] = set()
        self._claimed = 0
        self._origin: object = None  # of the records, as the last opening tells
        self._last_event = ""
        self._sealing = False
        self._checkpoints = self._believed_checkpoints()
        self._next = next(self._checkpoints, None)
        self._due = 0.0  # the size of the tree at which it is compared next

    def run(self) -> InstanceReport:
        self._hold_against_checkpoints()
        segments = folder.segments(self._path)
        for place, (first, file) in enumerate(segments):
            self._begin_file(first, file.name)
            self._take_file(file, last=place == len(segments) - 1)
        self._finish()
        return self._report

    def _begin_file(self, first: int, name: str) -> None:
        if first > self._number:
            self._miss(self._number, first)
            self._number = first
        elif first < self._number:
            self._break(first, f"The file {name} begins with a record that is there already.")

    def _take_file(self, file: Path, *, last: bool) -> None:
        size = self._size
        for line, whole in stored.lines(file):
            self._taken(len(line) + 1)
            if not whole:
                self._torn(line, last=last)
                break
            self._take(line)
            size += 1
            self._size = size
            self._nodes = merkle.appended(self._nodes, size - 1, merkle.leaf_hash(line))
            if size >= self._due:
                self._hold_against_checkpoints()

    def _torn(self, line: bytes, *, last: bool) -> None:
        if not last or len(line) > record.LONGEST:
            self._break(self._number, "The line ends without a line feed, or is too long.")
            return
        self._report.notes.append(
            f"{len(line)} bytes behind the last record are of one that was not written to its end."
        )

    def _take(self, line: bytes) -> None:
        try:
            told = read(line)
        except AuditError as error:
            self._break(self._number, f"The line is no record. {error.message}")
            self._number += 1
            return
        if told.number != self._number:
            self._misplaced(told)
        self._number = told.number + 1
        if told.time < self._time and told.event != "clock-set-back":
            self._report.find(told.number, "Its time is before that of the record before it.")
        self._time = told.time
        self._claimed = max(self._claimed, told.sealed)
        self._last_event = told.event
        if told.event == "begin":
            self._open.add(told.number)
        elif told.begin is not None:
            self._end(told.number, told.begin)
        elif told.rest:
            self._take_other(told)

    def _end(self, number: int, begin: int) -> None:
        if begin not in self._open:
            self._report.find(number, f"It ends the record {begin}, which did not begin anything.")
        self._open.discard(begin)

    def _take_other(self, told: Told) -> None:
        if told.event == "opened":
            self._report.unfinished += len(self._open)
            self._open.clear()
            self._sealing = "sealed_by" in told.rest
            self._origin = told.rest.get("origin")
            if told.rest.get("on_failure") == "continue":
                self._report.notes.append(
                    f"Record {told.number}: from here on keys were used without a record where one "
                    "could not be written (on_failure=continue)."
                )
            if told.rest.get("instance") != self._path.name:
                self._report.find(told.number, "It is of another instance than the folder's name.")
            names = {key.name for key in self._keys}
            if told.rest.get("origin") not in names:
                self._report.find(told.number, "It is of another origin than the key.")
        elif told.number == 0:
            self._report.find(0, "The first record is not that of an opening.")
        if told.event == "gap":
            missed = told.rest.get("missed")
            self._report.find(
                told.number,
                f"Before it, {missed} things were done without a record (on_failure=continue).",
            )
        elif told.event == "torn-tail":
            self._report.notes.append(
                f"Record {told.number} tells of a record that was not written to its end."
            )
        elif told.event == "clock-set-back":
            self._report.notes.append(f"Record {told.number}: the clock was set back.")

    def _misplaced(self, told: Told) -> None:
        if told.number > self._number:
            self._miss(self._number, told.number)
        else:
            self._break(
                told.number,
                f"It stands where the record {self._number} belongs: twice, or out of order.",
            )

    def _miss(self, start: int, end: int) -> None:
        self._break(start, f"{_these(start, end)} missing.")

    def _break(self, number: int, text: str) -> None:
        self._broken = True
        self._report.find(number, text)

    def _hold_against_checkpoints(self) -> None:
        """Compare the tree with what is told of its size: here, and kept elsewhere."""
        kept = self._kept.pop(self._size, None)
        if kept is not None and kept != merkle.root(self._nodes) and not self._broken:
            self._break(
                self._report.sealed,
                f"The first {self._size} records are not those of the checkpoint that was kept.",
            )
        while self._next is not None and self._next.size <= self._size:
            told, self._next = self._next, next(self._checkpoints, None)
            if self._broken:
                continue
            if told.root == merkle.root(self._nodes):
                self._seal(told)
            else:
                self._tell_altered(told)
        sizes = [*self._kept, *([] if self._next is None else [self._next.size])]
        self._due = min(sizes, default=math.inf)

    def _seal(self, told: Checkpoint) -> None:
        report = self._report
        report.sealed = told.size
        report.checkpoints += 1
        if told.origin not in report.origins:
            report.origins.append(told.origin)
        if told.origin != self._origin:
            report.find(
                None,
                f"The checkpoint over {told.size} is of {told.origin}, and the records are not.",
            )

    def _tell_altered(self, told: Checkpoint) -> None:
        """Name what differs between the newest checkpoint that holds and one that does not."""
        start, size = self._report.sealed, told.size
        altered = _altered(self._path, start, told)
        for number in altered:
            text = f"It is not the record that the checkpoint over {size} was made of."
            self._report.find(number, text)
        if not altered:
            self._report.find(
                start,
                f"One or more of the records {start} to {size - 1} are not those that the "
                f"checkpoint over {size} was made of.",
            )
        self._broken = True

    def _believed_checkpoints(self) -> Iterator[Checkpoint]:
        """The checkpoints in order; those that cannot be believed are findings."""
        newest = Checkpoint("", 0, b"")
        for place, (note, whole) in enumerate(stored.notes(self._path), start=1):
            if not whole:
                self._report.notes.append("The last checkpoint was not written to its end.")
                return
            try:
                told = believed(note, self._keys)
            except AuditError as error:
                self._report.find(None, f"Checkpoint {place}: {error.message}")
                continue
            if told.extensions != (instance_line(self._path),):
                self._report.find(None, f"Checkpoint {place} is of another instance.")
            elif told.size < newest.size or (told.size == newest.size and told != newest):
                self._report.find(
                    None, f"Checkpoint {place} is over fewer records than the one before it."
                )
            else:
                newest = told
                yield told

    def _finish(self) -> None:
        report = self._report
        report.records = self._size
        report.unfinished += len(self._open)
        beyond = [self._next] if self._next is not None else []
        beyond += self._checkpoints
        largest = max([told.size for told in beyond] + list(self._kept), default=0)
        if largest and not self._broken:
            report.find(
                self._size,
                f"{_these(self._size, largest)} missing: there is a checkpoint over {largest}.",
            )
        newest = max([report.sealed, *(told.size for told in beyond)])
        if not self._broken and newest < self._claimed and not self._is_sealed_since():
            report.find(None, f"A checkpoint over {self._claimed} records is missing.")
        if self._last_event == "closed" and self._sealing and not newest and not self._broken:
            report.find(None, "It was closed, and no checkpoint seals it. Have it sealed.")
        if report.sealed < report.records and not self._broken:
            report.notes.append(
                f"{report.records - report.sealed} of {report.records} records are not sealed: "
                "nothing shows that they are whole."
            )
        if not report.records:
            report.notes.append("It has no record.")

    def _is_sealed_since(self) -> bool:
        """Whether a process that writes beside us has made the checkpoint that is told of."""
        try:
            newest = stored.last_checkpoint(self._path)
            return newest is not None and believed(newest.note, self._keys).size >= self._claimed
        except AuditError:
            return False


def _these(start: int, end: int) -> str:
    return f"The records {start} to {end - 1} are" if end - start > 1 else "The record is"


def _altered(path: Path, start: int, told: Checkpoint) -> list[int]:
    """The records that differ from stored hashes which fit a checkpoint."""
    try:
        with StoredHashes(path) as hashes:
            if hashes.count < told.size:
                return []
            if merkle.root(merkle.range_of(told.size, hashes.subtree)) != told.root:
                return []
            altered: list[int] = []
            pieces = (stored.lines(file) for _, file in folder.segments(path))
            whole = (line for piece in pieces for line, ended in piece if ended)
            for number, line in enumerate(whole):
                if number >= told.size or len(altered) >= MOST_FINDINGS:
                    break
                if number >= start and hashes.leaves(number, number + 1) != [
                    merkle.leaf_hash(line)
                ]:
                    altered.append(number)
            return altered
    except OSError:
        return []

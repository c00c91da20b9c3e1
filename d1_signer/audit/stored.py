# SPDX-License-Identifier: Apache-2.0
"""Reading what an instance folder holds: its records from any number on, and its checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from d1_signer.audit import folder, record
from d1_signer.audit.note import LARGEST_NOTE, Checkpoint, SignedNote, split_notes
from d1_signer.errors import AuditError


class Line(NamedTuple):
    """A line of the records: its bytes without the line feed, and whether it has one."""

    text: bytes
    whole: bool


def lines(file: Path, offset: int = 0) -> Iterator[Line]:
    """The lines of one file of records; one that is too long comes in pieces without line feed."""
    with io.BufferedReader(folder.open_to_read(file)) as opened:
        opened.seek(offset)
        while line := opened.readline(record.LONGEST + 1):
            whole = line.endswith(b"\n")
            yield Line(line[:-1] if whole else line, whole)


def place_of(instance: Path, number: int) -> tuple[int, Path, int]:
    """Where a record is, or would be behind the last one.

    Returns:
        The number of the first record of its file, the file, and the offset there.

    Raises:
        AuditError: The records before it are not there, or cannot be read.
    """
    found = [(first, file) for first, file in folder.segments(instance) if first <= number]
    if not found:
        raise AuditError(f"There is no file with the record {number}.")
    first, file = found[-1]
    low, high = 0, file.stat().st_size  # the record begins in between
    if number == first:
        return first, file, 0
    with io.BufferedReader(folder.open_to_read(file)) as opened:
        while high - low > record.LONGEST:
            middle = (low + high) // 2
            opened.seek(middle)
            begin = middle + len(opened.readline(record.LONGEST + 1))
            line = opened.readline(record.LONGEST + 1)
            if not line.endswith(b"\n") or number_of(line[:-1]) > number:
                high = middle
            else:
                low = begin
        opened.seek(low)
        at = number_of(opened.readline(record.LONGEST + 1).removesuffix(b"\n"))
        opened.seek(low)
        while at < number:
            if not (line := opened.readline(record.LONGEST + 1)).endswith(b"\n"):
                raise AuditError(f"The records end before the record {number}.")
            at += 1
        return first, file, opened.tell()


def number_of(line: bytes) -> int:
    """The number that a record tells of itself.

    Raises:
        AuditError: It is no record.
    """
    number = record.decode(line).get("number")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise AuditError("It is a record without its number.")
    return number


def entry(instance: Path, number: int) -> bytes:
    """The bytes of one record.

    Raises:
        AuditError: It is not there.
    """
    _, file, offset = place_of(instance, number)
    line = next(lines(file, offset), None)
    if line is None or not line.whole or number_of(line.text) != number:
        raise AuditError(f"The record {number} is not there.")
    return line.text


def notes(instance: Path) -> Iterator[tuple[bytes, bool]]:
    """The bytes of the checkpoints of an instance in order, and whether each is whole.

    Those are read that are there when the first one is asked for: a process may be writing.
    """
    try:
        file = io.BufferedReader(folder.open_to_read(instance / folder.CHECKPOINTS))
    except FileNotFoundError:
        return
    with file:
        left = os.fstat(file.fileno()).st_size

        def read_line() -> bytes:
            nonlocal left
            line = file.readline(min(left, LARGEST_NOTE))
            left -= len(line)
            return line

        yield from split_notes(iter(read_line, b""))


class LastCheckpoint(NamedTuple):
    """The newest checkpoint: its bytes, and what it tells."""

    note: bytes
    told: Checkpoint


def last_checkpoint(instance: Path) -> LastCheckpoint | None:
    """The newest checkpoint that is written to its end; None where there is none."""
    found: LastCheckpoint | None = None
    for note, whole in _last_notes(instance):
        # What does not parse may be cut by where the reading began.
        with contextlib.suppress(AuditError):
            if whole:
                found = LastCheckpoint(note, Checkpoint.parse(SignedNote.parse(note).text))
    return found


def torn_checkpoint(instance: Path) -> int:
    """How many bytes behind the last checkpoint are of one that was not written to its end."""
    return sum(len(note) for note, whole in _last_notes(instance) if not whole)


def _last_notes(instance: Path) -> Iterator[tuple[bytes, bool]]:
    try:
        file = io.BufferedReader(folder.open_to_read(instance / folder.CHECKPOINTS))
    except FileNotFoundError:
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * LARGEST_NOTE))
        yield from split_notes(file)

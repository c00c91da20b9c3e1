# SPDX-License-Identifier: Apache-2.0
"""Going on with an instance whose process is gone, or closed it.

The tree is taken from the stored hashes as far as a checkpoint vouches for them; what was written
after it is read again. Nothing here judges whether the records are whole: `verifying` does.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from d1_signer.audit import folder, merkle, record, stored
from d1_signer.audit.hashes import HashWriter, StoredHashes
from d1_signer.errors import AuditError

LONGEST_UNSEALED = 64 << 20
"""Bytes of unsealed records that are read again at most, or the instance is left alone."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of an instance's records.

    Attributes:
        number: How many there are, which is the number of the next one.
        first: Number of the first record of the file that is written.
        offset: Where in it the next one begins.
        nodes: The range of the tree.
        time: Of the last record; `""` where there is none.
    """

    number: int = 0
    first: int = 0
    offset: int = 0
    nodes: merkle.Range = ()
    time: str = ""

    def behind(self, line: bytes, leaf: bytes, time: str) -> Head:
        """The end behind one record more."""
        nodes = merkle.appended(self.nodes, self.number, leaf)
        return Head(self.number + 1, self.first, self.offset + len(line) + 1, nodes, time)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an instance is gone on with.

    Attributes:
        head: The end of its records.
        hashes: Writes its hashes.
        sealed: Size of its newest checkpoint; 0 where there is none.
        torn: Bytes behind the last record that are none.
    """

    head: Head
    hashes: HashWriter
    sealed: int
    torn: bytes


def recover(instance: Path, *, most_unsealed: float = LONGEST_UNSEALED) -> Recovered:
    """Find the end of an instance whose lock this process holds.

    Args:
        instance: Its folder.
        most_unsealed: Bytes of unsealed records that may have to be read.

    Raises:
        AuditError: It cannot be gone on with; the text says why.
        OSError: It cannot be read or written.
    """
    checkpoint = stored.last_checkpoint(instance)
    sealed = 0 if checkpoint is None else checkpoint.told.size
    if not folder.segments(instance):
        if sealed:
            raise AuditError("It has a checkpoint and no records.")
        return Recovered(Head(), HashWriter(instance, 0), 0, b"")
    nodes = None if checkpoint is None else _sealed_range(instance, checkpoint)
    start = 0 if nodes is None else sealed
    first, _, offset = stored.place_of(instance, start)
    if _bytes_behind(instance, first, offset) > most_unsealed:
        raise AuditError("Too many of its records are not sealed.")
    hashes = HashWriter(instance, start)
    try:
        head, torn = read_on(instance, Head(start, first, offset, nodes or ()), hashes)
        head = _checked(instance, head, hashes, checkpoint, known=nodes is not None)
    except BaseException:
        hashes.close()
        raise
    return Recovered(head, hashes, sealed, torn)


def read_on(instance: Path, head: Head, hashes: HashWriter) -> tuple[Head, bytes]:
    """Take in the records behind an end that is known.

    Returns:
        The end of the records, and the bytes behind it that are no record.

    Raises:
        AuditError: A line is no record, or not the next one.
        OSError: They cannot be read.
    """
    torn = bytearray()  # may be long
    for first, file in folder.segments(instance):
        if first < head.first:
            continue
        if first != head.first:
            if first != head.number or torn:
                raise AuditError(f"Records before number {first} are missing.")
            head = Head(head.number, first, 0, head.nodes, head.time)
        for line in stored.lines(file, head.offset):
            if not line.whole:
                torn += line.text
                continue
            told = record.decode(line.text)
            if torn or told.get("number") != head.number:
                raise AuditError(f"The record {head.number} is not where it belongs.")
            leaf = merkle.leaf_hash(line.text)
            hashes.put(head.number, leaf)
            head = head.behind(line.text, leaf, str(told.get("time", "")))
    return head, bytes(torn)


def _sealed_range(instance: Path, checkpoint: stored.LastCheckpoint) -> merkle.Range | None:
    """The range of the tree at a checkpoint; None where the stored hashes do not fit it."""
    size = checkpoint.told.size
    with contextlib.suppress(FileNotFoundError), StoredHashes(instance) as hashes:
        if hashes.count >= size:
            nodes = merkle.range_of(size, hashes.subtree)
            if merkle.root(nodes) == checkpoint.told.root:
                return nodes
    return None


def _checked(
    instance: Path,
    head: Head,
    hashes: HashWriter,
    checkpoint: stored.LastCheckpoint | None,
    *,
    known: bool,
) -> Head:
    """Hold the end that was found against the newest checkpoint."""
    if checkpoint is not None:
        size = checkpoint.told.size
        if head.number < size:
            raise AuditError(f"It has {head.number} records, and a checkpoint over {size}.")
        hashes.flush()
        if not known and _sealed_range(instance, checkpoint) is None:
            raise AuditError("Its records are not those that its newest checkpoint was made of.")
    if head.number and not head.time:  # all of it is sealed, and nothing was read
        last = record.decode(stored.entry(instance, head.number - 1))
        return replace(head, time=str(last.get("time", "")))
    return head


def _bytes_behind(instance: Path, first: int, offset: int) -> int:
    sizes = (file.stat().st_size for begin, file in folder.segments(instance) if begin >= first)
    return sum(sizes) - offset

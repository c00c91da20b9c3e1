# SPDX-License-Identifier: Apache-2.0
"""The hashes of an instance's tree as they are stored, so that a proof needs no other record.

The file holds 32 bytes for each leaf and, behind each 256 of them, the root of those: leaf ``i``
is at ``32 * (i + i // 256)``. It is made of the records, can be made again, and proves nothing.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Self

from d1_signer.audit import merkle
from d1_signer.audit.folder import HASHES, open_to_read

BLOCK = 256
_STRIDE = BLOCK + 1

_log = logging.getLogger("d1_signer.audit")


def _place(leaf: int) -> int:
    return merkle.HASH_LENGTH * (leaf + leaf // BLOCK)


class StoredHashes:
    """Reads the file; close it."""

    def __init__(self, instance: Path) -> None:
        """Open the file of an instance folder.

        Raises:
            OSError: It cannot be read.
        """
        self._opened = open_to_read(instance / HASHES)
        self._file = self._opened.fileno()
        blocks, rest = divmod(os.fstat(self._file).st_size // merkle.HASH_LENGTH, _STRIDE)
        self.count = blocks * BLOCK + min(rest, BLOCK)

    def leaves(self, start: int, end: int) -> list[bytes]:
        """The leaf hashes from a number up to, and without, another; fewer where there are none."""
        found: list[bytes] = []
        while start < end:
            stop = min(end, (start // BLOCK + 1) * BLOCK)
            found += self._hashes(_place(start), stop - start)
            start = stop
        return found

    def subtree(self, start: int, end: int) -> bytes:
        """The hash of a range of leaves that begins where a subtree of its size may begin."""
        blocks: merkle.Range = ()
        whole = 0
        if start % BLOCK == 0:
            for block in range(start // BLOCK, end // BLOCK):
                # Nothing where the file ends early: the root does not fit then.
                node = b"".join(self._hashes(_place((block + 1) * BLOCK) - merkle.HASH_LENGTH, 1))
                blocks = merkle.appended(blocks, whole, node)
                whole += 1
        rest: merkle.Range = ()
        for size, leaf in enumerate(self.leaves(start + whole * BLOCK, end)):
            rest = merkle.appended(rest, size, leaf)
        return merkle.root(blocks + rest)

    def _hashes(self, place: int, count: int) -> list[bytes]:
        length = merkle.HASH_LENGTH
        data = os.pread(self._file, count * length, place)
        return [data[at : at + length] for at in range(0, len(data), length)]

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HashWriter:
    """Writes the file, a block at a time. A failure keeps nobody from signing: it is made up."""

    def __init__(self, instance: Path, count: int) -> None:
        """Go on behind ``count`` leaves; what the file holds beyond them is dropped.

        Raises:
            OSError: The file cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(instance / HASHES, flags, 0o640)
        self._count = count
        self._leaves: dict[int, bytes] = {}
        os.ftruncate(self._file, _place(count))
        start = count - count % BLOCK
        data = os.pread(self._file, BLOCK * merkle.HASH_LENGTH, _place(start))
        for number in range(start, count):
            at = (number - start) * merkle.HASH_LENGTH
            self._leaves[number] = data[at : at + merkle.HASH_LENGTH]

    def put(self, number: int, leaf: bytes) -> None:
        """Keep the hash of a leaf; written when its block is full. Again is harmless."""
        self._leaves[number] = leaf
        if (number + 1) % BLOCK == 0:
            self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        try:
            while self._count in self._leaves:
                self._write_block()
        except OSError as error:
            _log.warning("audit.hashes_not_written %s", error.strerror)

    def _write_block(self) -> None:
        first = self._count - self._count % BLOCK
        end = self._count
        while end in self._leaves and end < first + BLOCK:
            end += 1
        leaves = [self._leaves[number] for number in range(first, end)]
        full = len(leaves) == BLOCK
        data = b"".join(leaves) + (merkle.hash_of(leaves) if full else b"")
        if os.pwrite(self._file, data, _place(first)) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._count = end
        if full:
            for number in range(first, end):
                del self._leaves[number]

    def close(self) -> None:
        """Write what is kept and close the file."""
        self.flush()
        os.close(self._file)

# SPDX-License-Identifier: Apache-2.0
"""The instance that one process appends to: its records, its tree, its files."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from d1_signer.audit import folder, merkle, moments, record, stored
from d1_signer.audit.committing import Committer
from d1_signer.audit.recovery import Head, Recovered, read_on, recover
from d1_signer.errors import AuditError
from d1_signer.events import Recordable

_log = logging.getLogger("d1_signer.audit")

_MOST_TORN = 16_384  # bytes of a torn tail that are kept
_SET_BACK = "clock-set-back"
_LOOK_EVERY = 1.0  # seconds: whether the file is still where its name says


class Unusable(Exception):
    """The instance cannot be appended to any more; another one can."""


class Snapshot(NamedTuple):
    """The tree at one moment."""

    size: int
    root: bytes


@functools.cache
def _program() -> str:
    try:
        return f"d1-signer {version('d1-signer')}"
    except PackageNotFoundError:  # run from a copy of its files
        return "d1-signer"


class Instance:
    """Appends records. Safe in threads; a forked child has to open one of its own."""

    def __init__(self, path: Path, held: FileIO, recovered: Recovered, segment_bytes: int) -> None:
        """Take over a locked and recovered folder; `close` gives it back.

        Raises:
            OSError: A file cannot be opened.
        """
        self.path = path
        self.process = os.getpid()
        self.sealed = recovered.sealed
        self.unusable = False
        self._told_sealed = 0
        self._began_at = recovered.head.number
        self._oldest = -1, ""  # the number and the time of the record that was asked for last
        self._lock_file = held
        self._segment_bytes = segment_bytes
        self._head = recovered.head
        self._hashes = recovered.hashes
        self._torn = recovered.torn
        self._file = folder.open_segment(path, recovered.head.first)
        self._name = folder.segment_file(path, recovered.head.first)
        self._retired: list[FileIO] = []
        # Reentrant, so that a signal's handler that signs finds out instead of waiting for ever.
        self._lock = threading.RLock()
        self._appending = False
        # Whether something, such as an exception of a signal's handler, kept the end of the file
        # from being noted; it is looked at before the next record then.
        self._unsure = True
        self._look_again = 0.0  # on time.monotonic()
        self._syncing = threading.Lock()
        self._committer = Committer(self.sync)
        self._whoami: dict[str, Recordable] = {
            "host": socket.gethostname(),
            "process": self.process,
            "version": _program(),
        }

    def append(self, event: str, members: Mapping[str, Recordable]) -> int:
        """Append one record; it is written, not yet durable.

        Args:
            event: What it is of.
            members: What it says beside its number, time and origin.

        Returns:
            Its number.

        Raises:
            InvalidInputError: It does not fit into a record.
            OSError: It cannot be written.
            Unusable: The instance is gone, or is another's.
        """
        with self._lock:
            if self._appending:
                raise OSError(errno.EBUSY, "a signal handler asks for a record amid another one")
            self._appending = True
            try:
                if event != "end" or self._unsure:
                    self._be_ready()
                return self._append(event, members)
            finally:
                self._appending = False

    def commit(self, until: float) -> None:
        """Wait until all records are durable; see `Committer.commit`."""
        self._committer.commit(until)

    @property
    def size(self) -> int:
        """How many records there are."""
        return self._head.number

    @property
    def written(self) -> int:
        """How many of them were written since it was opened."""
        return self._head.number - self._began_at

    def oldest_unsealed(self) -> str | None:
        """Time of the oldest record that is not sealed; None where all are.

        Raises:
            AuditError: It is not there, or is none.
            OSError: It cannot be read.
        """
        sealed = self.sealed
        if self._head.number <= sealed:
            return None
        number, told = self._oldest
        if number != sealed:
            told = str(record.decode(stored.entry(self.path, sealed)).get("time"))
            self._oldest = sealed, told
        return told

    def snapshot(self) -> Snapshot:
        """The tree over all records so far, which are durable, as are their hashes."""
        with self._lock:
            head = self._head
            self._hashes.flush()
        self.sync()
        return Snapshot(head.number, merkle.root(head.nodes))

    def sync(self) -> None:
        """Make durable what is written.

        Raises:
            OSError: It is not, and what of it is there after a crash is not known.
        """
        with self._syncing:
            with self._lock:
                file = self._file
                retired = [old for old in self._retired if old is not file]
            try:
                for written in (*retired, file):
                    os.fdatasync(written)
            except (OSError, ValueError) as error:
                # The system may forget what it could not write, and not fail again.
                self.unusable = True
                raise OSError(errno.EIO, getattr(error, "strerror", "closed")) from None
            for written in retired:
                written.close()
                self._retired.remove(written)

    def close(self) -> None:
        """Give the folder back; what is written stays."""
        self._committer.stop()
        with self._syncing, self._lock:
            self.unusable = True
            with contextlib.suppress(OSError):
                self._hashes.close()
            for file in (*self._retired, self._file, self._lock_file):
                file.close()

    def leave_to_parent(self) -> None:
        """Close what a forked child has inherited, and touch nothing that is the parent's."""
        for file in (self._file, self._lock_file):
            with contextlib.suppress(OSError):
                file.close()

    def _be_ready(self) -> None:
        """See that the file is there and ends where the last record does."""
        if self.unusable:
            raise Unusable
        status = os.fstat(self._file.fileno())
        moment = time.monotonic()
        if moment > self._look_again:
            self._look_again = moment + _LOOK_EVERY
            self.unusable = not self._is_in_place(status)
        if not status.st_nlink or self.unusable:
            self.unusable = True
            raise Unusable
        if status.st_size != self._head.offset:
            self._catch_up(status.st_size)
        self._unsure = False
        if self._torn:
            self._tell_torn()
        if self._head.offset >= self._segment_bytes:
            self._rotate()

    def _is_in_place(self, status: os.stat_result) -> bool:
        try:
            return os.path.samestat(self._name.stat(), status)
        except OSError:
            return False

    def _catch_up(self, size: int) -> None:
        """Take in what was written before something kept it from being noted."""
        if size < self._head.offset:
            self.unusable = True
            raise Unusable
        try:
            self._head, torn = read_on(self.path, self._head, self._hashes)
            self._torn = self._torn or torn
        except AuditError as error:
            _log.error("audit.instance_altered %s %s", self.path.name, error.message)
            self.unusable = True
            raise Unusable from None

    def _tell_torn(self) -> None:
        """Put a record of a torn tail in its place."""
        torn = self._torn
        self._append(
            "torn-tail",
            {
                "bytes": len(torn),
                "sha256": hashlib.sha256(torn).hexdigest(),
                "content": base64.b64encode(torn[:_MOST_TORN]).decode(),
            },
        )
        os.ftruncate(self._file.fileno(), self._head.offset)
        self._torn = b""
        _log.warning("audit.torn_tail %s bytes=%d", self.path.name, len(torn))

    def _append(self, event: str, members: Mapping[str, Recordable]) -> int:
        head = self._head
        moment = moments.text(moments.now())
        if moment < head.time and event != _SET_BACK:
            self._append(_SET_BACK, {"before": head.time})
            head, moment = self._head, moments.text(moments.now())
        told: dict[str, Recordable] = {"event": event, "number": head.number, "time": moment}
        if event != "end":
            told |= self._whoami
            if (state := moments.clock_state()) is not None:
                told["clock"] = state
        sealed = self.sealed
        if sealed != self._told_sealed:
            told["sealed"] = sealed
        line = record.encode({**members, **told})
        leaf = merkle.leaf_hash(line)
        self._unsure = True
        self._write(line + b"\n", head.offset)
        self._hashes.put(head.number, leaf)
        self._head = head.behind(line, leaf, moment)
        self._told_sealed = sealed
        self._unsure = bool(self._torn)
        return head.number

    def _write(self, data: bytes, offset: int) -> None:
        """Write at the end of the file: all of it, or nothing."""
        file = self._file.fileno()
        if self.process != os.getpid():  # a signal's handler has forked, and goes on in the child
            raise Unusable
        try:
            written = os.pwrite(file, data, offset)
        except OSError:
            self._cut_off(file, offset)
            raise
        if written < len(data):
            self._cut_off(file, offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _cut_off(self, file: int, offset: int) -> None:
        if not self._torn:  # or a crash here would lose what is not told yet
            with contextlib.suppress(OSError):
                os.ftruncate(file, offset)

    def _rotate(self) -> None:
        head = self._head
        try:
            # Were its end lost with the machine's power, and not what follows, records would miss.
            os.fdatasync(self._file)
        except OSError:
            self.unusable = True
            raise
        following = folder.open_segment(self.path, head.number)
        self._retired.append(self._file)
        self._name = folder.segment_file(self.path, head.number)
        self._file = following
        self._head = Head(head.number, head.number, 0, head.nodes, head.time)


def open_instance(trail: Path, segment_bytes: int) -> tuple[Instance, list[str]]:
    """Open an instance that nobody writes, or a new one.

    Returns:
        The instance, and the names of those that could not be gone on with.

    Raises:
        OSError: The folder is not there, or nothing can be written in it.
    """
    left: list[str] = []
    for path in folder.own_instances(trail):
        held = None
        try:
            held = folder.lock(path)
            if held is None:
                continue
            return Instance(path, held, recover(path), segment_bytes), left
        except (AuditError, OSError) as error:
            if held is not None:
                held.close()
            reason = error.message if isinstance(error, AuditError) else error.strerror
            _log.warning("audit.instance_left_alone %s %s", path.name, reason)
            left.append(path.name)
    path, held = folder.new_instance(trail)
    return Instance(path, held, recover(path), segment_bytes), left

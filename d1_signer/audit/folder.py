# SPDX-License-Identifier: Apache-2.0
"""Where a trail lies: a folder of instance folders, each of which one process writes at a time.

An instance folder holds::

    lock                             locked (flock) by the process that writes
    records-0000000000000000.jsonl   the records; the name tells the number of the first one
    hashes                           hashes of the tree, which can be made again from the records
    checkpoints                      signed notes, one behind the other
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from io import FileIO
from pathlib import Path

LOCK = "lock"
HASHES = "hashes"
CHECKPOINTS = "checkpoints"

_SEGMENT = re.compile(r"records-([0-9]{16})\.jsonl", re.ASCII)
_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{16}", re.ASCII)
_MODE = 0o640  # a group of auditors may read


def segment_file(instance: Path, first: int) -> Path:
    """The file of the records from a number on."""
    return instance / f"records-{first:016d}.jsonl"


def segments(instance: Path) -> list[tuple[int, Path]]:
    """The files of an instance's records, each with the number of its first one."""
    found = [
        (int(match[1]), instance / name)
        for name in os.listdir(instance)  # noqa: PTH208 (names alone)
        if (match := _SEGMENT.fullmatch(name))
    ]
    return sorted(found)


def is_instance(folder: Path) -> bool:
    """Whether a folder is an instance's, by what is in it."""
    return (folder / LOCK).exists() or bool(segments(folder))


def instances(folder: Path) -> list[Path]:
    """The instance folders in a folder and below, in order; the folder itself where it is one.

    What is below an instance counts as well, or a file that somebody puts into the trail's folder
    would hide all that is in it.
    """
    todo, found = [folder], []
    while todo:
        place = todo.pop()
        found += [place] if is_instance(place) else []
        entries = [entry for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False)]
        todo += sorted((Path(entry.path) for entry in entries), reverse=True)
    return found


def own_instances(folder: Path) -> list[Path]:
    """The instance folders that a trail of this user made in its folder, the newest first.

    Those of other users, links and files are nobody's that this process can go on with.
    """
    entries = [entry for entry in os.scandir(folder) if _NAME.fullmatch(entry.name)]
    own = [
        Path(entry.path)
        for entry in entries
        if entry.is_dir(follow_symlinks=False)
        and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    ]
    return sorted(own, reverse=True)


def lock(instance: Path, *, create: bool = False) -> FileIO | None:
    """Lock an instance folder for this process.

    Returns:
        An open file, which unlocks it when this process and its forked children have closed it;
        None where it is another's, or is no instance folder yet.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        held = FileIO(instance / LOCK, "r+", opener=lambda path, _: os.open(path, flags, _MODE))
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        held.close()
        if isinstance(error, BlockingIOError):
            return None
        raise
    return held


def new_instance(folder: Path) -> tuple[Path, FileIO]:
    """Make an instance folder and lock it."""
    while True:
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        instance = folder / f"{moment}-{secrets.token_hex(8)}"
        instance.mkdir(0o750)
        held = lock(instance, create=True)
        if held is not None:  # another process may have been quicker to take it over
            sync_folder(folder)
            return instance, held


def open_segment(instance: Path, first: int) -> FileIO:
    """Open the file of the records from a number on for writing; makes it where it is not."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = FileIO(
        segment_file(instance, first), "r+", opener=lambda path, _: os.open(path, flags, _MODE)
    )
    sync_folder(instance)
    return file


def open_to_read(file: Path) -> FileIO:
    """Open a file of an instance for reading.

    Raises:
        OSError: It is not there, is a link, or no regular file, which may never end.
    """
    # A pipe that nobody writes would be waited for.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    opened = FileIO(file, opener=lambda path, _: os.open(path, flags))
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return opened


def append(file: Path, data: bytes) -> None:
    """Append to a file durably: all of it, or nothing.

    Raises:
        OSError: It cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(file, flags, _MODE)
    try:
        size = os.fstat(descriptor).st_size
        written = 0
        try:
            written = os.write(descriptor, data)
        finally:
            if written < len(data):
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what a short write means
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut(file: Path, length: int) -> None:
    """Take the last bytes off a file.

    Raises:
        OSError: It cannot be written.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - length)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

# SPDX-License-Identifier: Apache-2.0
"""The module's file, for the custody report: which one it is, and what it holds."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def file_of(path: str) -> Path | None:
    """The file that was loaded: links followed, or as the loader found a bare name."""
    if "/" in path:
        return Path(path).resolve()
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return None
    loaded = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line)
    return next((Path(name) for name in loaded if Path(name).name == path), None)


def sha256_of(file: Path | None) -> str | None:
    """SHA-256 of its content as it is on disk now, hexadecimal; None where it cannot be read."""
    try:
        if file is None:
            return None
        status = file.stat()
        return _sha256(file, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=16)
def _sha256(file: Path, _inode: int, _size: int, _modified: int) -> str:
    # Some are 50 MB large, and the file is looked at whenever a policy is held again.
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

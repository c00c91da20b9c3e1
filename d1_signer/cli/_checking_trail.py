# SPDX-License-Identifier: Apache-2.0
"""The steps of `d1-signer check` that are about the audit trail: record, folder, seal."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from d1_signer.cli._checklist import Checklist
from d1_signer.cli._trail import current_trail, trail_settings
from d1_signer.errors import AuditError, AuditUnavailable, ConfigurationError, D1SignerError

if TYPE_CHECKING:
    from d1_signer.audit.trail import AuditTrail

_LEAST_FREE = 64 << 20  # bytes: as many as one file of records takes
_LEAST_FILES = 100  # an instance has four, and each process has an instance


def check_trail(checklist: Checklist) -> bool:
    """Record this check and seal it, as every use of a service's keys will be.

    Returns:
        Whether keys can be used: not without a record, where there is a trail.
    """
    folder = trail_settings().folder
    if folder is None:
        current_trail()  # refuses settings without a folder
        return True
    checklist.begin(f"Audit trail {folder}", f"audit trail {folder}")
    try:
        trail = current_trail()
    except D1SignerError as error:
        checklist.failed("audit-record" if isinstance(error, AuditError) else "audit-seal", error)
        return False
    assert trail is not None  # noqa: S101 (there is a folder)
    with checklist.step("audit-record"):
        trail.note("check", {})
    recorded = checklist.passed()
    with checklist.step("audit-folder") as detail:
        detail(_look_at_folder(trail.folder))
    _check_seal(checklist, trail)
    return recorded


def _look_at_folder(folder: Path) -> str:
    """What room there is for records.

    Raises:
        ConfigurationError: Others can write there, or there soon is no room.
    """
    try:
        mode, space = folder.stat().st_mode, os.statvfs(folder)
    except OSError as error:
        raise AuditUnavailable(
            f"The folder cannot be looked at: {error.strerror}.", hint="Look at its permissions."
        ) from None
    if mode & stat.S_IWOTH:
        raise ConfigurationError(
            "Every user of this machine can write in the folder.",
            hint=f"Take that away: chmod o-w {shlex.quote(str(folder))}",
        )
    free = space.f_bavail * space.f_frsize
    no_files = space.f_files and space.f_favail < _LEAST_FILES  # some systems do not count them
    if free < _LEAST_FREE or no_files:
        left = f"{space.f_favail} more files" if no_files else f"{free >> 20} MiB"
        raise ConfigurationError(
            f"There is room for {left} only, and nothing is signed once it is used up.",
            hint=f"Make room for {_LEAST_FREE >> 20} MiB and {_LEAST_FILES} files at least; a "
            "signature takes about a kilobyte.",
        )
    return f"{free >> 20} MiB free"


def _check_seal(checklist: Checklist, trail: AuditTrail) -> None:
    if trail_settings().key is None:
        checklist.skipped("audit-seal", "no key is given that seals (D1_AUDIT_KEY)")
        return
    with checklist.step("audit-seal") as detail:
        trail.seal()
        name, key_id, _ = str(trail.verifier_key()).split("+", 2)
        detail(f"verifier key {name}+{key_id}…")

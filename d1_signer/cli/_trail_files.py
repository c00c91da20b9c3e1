# SPDX-License-Identifier: Apache-2.0
"""What the commands of the audit trail read: folders, files and verifier keys."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d1_signer.errors import AuditError, ConfigurationError
from d1_signer.secret import shown_path

if TYPE_CHECKING:
    from d1_signer.audit.note import VerifierKey

_LARGEST_FILE = 1 << 20


def verifier_keys(texts: Sequence[str]) -> list[VerifierKey]:
    """The keys of ``--key``: each is one, or ``file:`` and a file with one on each line."""
    from d1_signer.audit.note import VerifierKey

    found: list[VerifierKey] = []
    for text in texts:
        if text.startswith("file:"):
            name = text.removeprefix("file:").removeprefix("//")
            lines = read_file(name).decode(errors="replace")
        else:
            lines = text
        try:
            found += [VerifierKey.parse(line) for line in lines.split("\n") if line.strip()]
        except AuditError as error:
            raise ConfigurationError(error.message, hint=error.hint) from None
    if not found:
        raise ConfigurationError("The file of --key holds no verifier key.")
    return found


def notes_of(file: str, option: str = "--since") -> list[bytes]:
    """The signed notes of a file."""
    from d1_signer.audit.note import split_notes

    found = list(split_notes(io.BytesIO(read_file(file))))
    if not found or not all(whole for _, whole in found):
        raise ConfigurationError(f"The file of {option} holds no signed checkpoint.")
    return [note for note, _ in found]


def instances_of(name: str) -> list[Path]:
    """The instances in a folder."""
    from d1_signer.audit import folder as folders

    path = Path(name).absolute()
    try:
        return folders.instances(path)
    except OSError as error:
        raise unreadable(error) from None


def moment_of(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A moment in the form that records have."""
    if value is None:
        return None
    try:
        told = datetime.fromisoformat(value)
        told = told.replace(tzinfo=UTC) if told.tzinfo is None else told.astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            "it is no time such as 2026-11-27T09:00:00Z or 2026-11-27."
        ) from None
    return told.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def read_file(name: str | Path) -> bytes:
    """The content of a small file."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise unreadable(error) from None
    if len(data) > _LARGEST_FILE:
        raise ConfigurationError(f"{shown_path(name)} is larger than {_LARGEST_FILE} bytes.")
    return data


def unreadable(error: OSError) -> ConfigurationError:
    """Our error for a file or folder that cannot be read."""
    where = shown_path(Path(str(error.filename)).absolute()) if error.filename else "A file"
    return ConfigurationError(f"{where} cannot be read or written: {error.strerror}.")

# SPDX-License-Identifier: Apache-2.0
"""Files that a command makes: whole or not at all, and never over another one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from d1_signer.errors import ConfigurationError
from d1_signer.secret import shown_path


def refuse_existing(*paths: str | None) -> None:
    """Refuse a path that is taken, before anything is done for it.

    Raises:
        ConfigurationError: It exists.
    """
    for path in paths:
        if path is not None and os.path.lexists(path):
            raise _exists(path)


def write_new(path: str, content: bytes) -> None:
    """Write a file that does not exist yet.

    Raises:
        ConfigurationError: It exists by now, or cannot be written.
    """
    target = Path(path)
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", dir=target.parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644 & ~_umask())
            os.link(name, target)  # fails where it exists, as renaming would not
        finally:
            with contextlib.suppress(OSError):
                Path(name).unlink()
    except FileExistsError:
        raise _exists(path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ConfigurationError(f"{shown_path(path)} cannot be written: {reason}.") from None


def _exists(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{shown_path(path)} exists.", hint="It is not overwritten; choose another name."
    )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

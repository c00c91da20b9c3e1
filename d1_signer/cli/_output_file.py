# SPDX-License-Identifier: Apache-2.0
"""Files that commands write: never over anything by accident, and never over a secret."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

from d1_signer.cli._config import texts_in
from d1_signer.cli._output import Command, Output
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.secret import is_full, shown_path

_MODE = 0o644  # what is written is public, and nobody else's to change
_LOOKED_AT = 1 << 20  # a key may stand behind the certificates of many authorities
_LENGTH = rb"(?:[\x00-\x80]|\x81.|\x82..|\x83...)"  # of DER, or of BER where the end says it
# PEM and what is like it, DER, and the key stores of Java. In DER RFC 5958, RFC 5915 and RFC 7292
# begin with an INTEGER; what RFC 5958 encrypts, with the OID of a method (PKCS#5, PKCS#12).
_PRIVATE_KEYS = (
    re.compile(rb"PRIVATE KEY(?: BLOCK)?-----|AGE-SECRET-KEY-|\APuTTY-User-Key-File-"),
    re.compile(rb"\A\x30" + _LENGTH + rb"\x02\x01[\x00\x01\x03]", re.DOTALL),
    re.compile(
        rb"\A\x30" + _LENGTH + rb"\x30" + _LENGTH + rb"\x06.\x2a\x86\x48\x86\xf7\x0d\x01[\x05\x0c]",
        re.DOTALL,
    ),
    re.compile(rb"\A(?:\xfe\xed\xfe\xed|\xce\xce\xce\xce)"),
)
_PRIVATE_MEMBER = re.compile(rb'"d"\s*:')  # of a JWK
# Of the environment, what names files of ours, of an SDK or of a PKCS#11 module.
_VARIABLES = ("D1_", "AWS_", "GOOGLE_", "VAULT_", "BAO_", "SOFTHSM2_")
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})  # of a file system
_FILE = "file:"
_PARTS = re.compile(r"[\s?&;#=]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFile:
    """Where a command's result goes instead of standard output.

    Attributes:
        path: As given.
        overwrite: Whether a file that is there is replaced.
    """

    path: Path
    overwrite: bool

    def require_free(self) -> None:
        """Refuse what must not be written; called before a key is asked for anything.

        Raises:
            ConfigurationError: Something is there; or it is a key, or a file of the settings or of
                an audit trail.
        """
        self._require_no_trail()
        if os.path.lexists(self.path):
            self._require_replaceable()
        self._require_folder()

    def write(self, content: bytes, what: str, output: Output) -> None:
        """Write the file as a whole or not at all, and say so.

        Args:
            content: Public content.
            what: What it is, for the note to who runs the command.
            output: Takes the note.

        Raises:
            ConfigurationError: It cannot be written there.
            D1SignerError: The disk is full.
        """
        self.require_free()
        try:
            _put(Path(os.path.realpath(self.path)), content, overwrite=self.overwrite)
        except OSError as error:
            raise self._cannot(error) from None
        output.note(f"Wrote {what} to {self.shown}.")

    @property
    def shown(self) -> str:
        """The path as it may be shown."""
        return shown_path(self.path.absolute())

    def _require_no_trail(self) -> None:
        from d1_signer.audit.folder import segments

        in_trail = False
        with contextlib.suppress(OSError):  # there is no such folder, or it is nobody's to read
            in_trail = bool(segments(Path(os.path.realpath(self.path)).parent))
        if in_trail:
            raise ConfigurationError(
                f"{self.shown} is in an audit trail, where nothing else is written.",
                hint="Name a file elsewhere.",
            )

    def _require_replaceable(self) -> None:
        try:
            self._require_harmless()
        except FileNotFoundError:
            pass  # a link that leads nowhere
        except OSError as error:
            raise self._cannot(error) from None
        if not self.overwrite:
            raise ConfigurationError(
                f"{self.shown} is there already, and nothing is overwritten.",
                hint="Name another file, or replace it with --force.",
            )

    def _require_folder(self) -> None:
        folder = Path(os.path.realpath(self.path)).parent
        try:
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise self._cannot(error) from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"{self.shown} cannot be written: this process may not write in its folder.",
                hint="Name a file elsewhere.",
            )

    def _require_harmless(self) -> None:
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(
                f"{self.shown} is no regular file.", hint="Name a file, or use standard output."
            )
        if any(os.path.samestat(status, other) for other in _files_of_settings()):
            raise ConfigurationError(
                f"{self.shown} is a file that the settings name: a key, a certificate or the "
                "source of a secret. It is never written to.",
                hint="Name another file.",
            )
        # One that cannot be read may be a key of somebody else: that error stays.
        with self.path.open("rb") as file:
            if _holds_private_key(file.read(_LOOKED_AT)):
                raise ConfigurationError(
                    f"{self.shown} holds a private key, which is never overwritten.",
                    hint="Name another file.",
                )

    def _cannot(self, error: OSError) -> D1SignerError:
        text = f"{self.shown} cannot be written: {error.strerror}."
        if is_full(error):
            folder = shown_path(self.path.absolute().parent)
            return D1SignerError(
                text, hint=f"Make room on the file system of {folder}.", retryable=True
            )
        return ConfigurationError(text)


def with_output_file(command: Command) -> Command:
    """Give a command ``-o`` and ``--force``, as its ``output_file``."""

    @click.option(
        "-o",
        "--output-file",
        "path",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Write it to a file instead. One that is there is not overwritten.",
    )
    @click.option(
        "--force",
        is_flag=True,
        help="Overwrite FILE; never a key, nor any other file that the settings name.",
    )
    @functools.wraps(command)
    def wrapper(*args: Any, path: Path | None, force: bool, **options: Any) -> Any:
        if force and path is None:
            raise click.UsageError("--force needs -o FILE.")
        file = None if path is None else OutputFile(path=path, overwrite=force)
        if file is not None:
            file.require_free()
        return command(*args, output_file=file, **options)

    return wrapper


def _holds_private_key(content: bytes) -> bool:
    if b'"kty"' in content and _PRIVATE_MEMBER.search(content):
        return True
    return any(pattern.search(content) for pattern in _PRIVATE_KEYS)


def _put(target: Path, content: bytes, *, overwrite: bool) -> None:
    import secrets  # not for the help, nor for a completion

    temporary = target.with_name(f".d1-signer-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, _MODE), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            _name_once(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _name_once(temporary: Path, target: Path) -> None:
    """Give it its name, unless somebody else has made that file meanwhile."""
    try:
        target.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS or os.path.lexists(target):
            raise
        temporary.replace(target)


def _files_of_settings() -> Iterator[os.stat_result]:
    """Every file that an option or a variable of d1-signer names, wherever it stands in there."""
    context = click.get_current_context()
    values = [*context.params.values(), *texts_in(context)]
    values += [value for name, value in os.environ.items() if name.startswith(_VARIABLES)]
    for text in _texts(values):
        parts = [text, *_PARTS.split(text)]
        # A part of a URI may be escaped, more than once where a URI stands in a URI.
        parts += [unquote(part) for part in parts]
        for part in parts:
            with contextlib.suppress(OSError, ValueError):
                path = part[len(_FILE) :].removeprefix("//") if _is_file(part) else part
                yield Path(path).stat()


def _is_file(part: str) -> bool:
    return part[: len(_FILE)].lower() == _FILE


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))

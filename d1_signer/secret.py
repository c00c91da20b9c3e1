# SPDX-License-Identifier: Apache-2.0
"""Where secrets come from, and the type that carries them without showing them.

A secret source is ``file:PATH``, ``env:NAME``, ``prompt``, or a callable that is passed in code.
A secret itself is never a setting: it would show in process lists, shell histories and logs.
"""

from __future__ import annotations

import errno
import getpass
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, final
from urllib.parse import unquote

from d1_signer.errors import SecretSourceError
from d1_signer.frames import of_signal_handler, without_locals

SecretSource = str | Callable[[], str | bytes]
"""``file:PATH``, ``env:NAME``, ``prompt``, or a callable that returns the secret."""

being_asked = threading.Event()
"""Set while a person is asked for a secret, on a terminal that is to show nothing else."""

_MAX_FILE_SIZE = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP
_LONGEST_PATH = 256
_FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)+", re.ASCII)
_LIKE_A_URI = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*:|[?;]|://|pin-value", re.ASCII)
# A private key in one of the forms in which it is handed about.
_KEY = re.compile(
    r"-----BEGIN"
    # A JWK or several, as JSON or as Python writes it.
    r"|\A\s*[\[(]?\s*\{"
    # DER (RFC 5958 section 2, RFC 5915 section 3) as it is, and the first line of it in base64.
    r"|\A0(?:[\x81\x82\udc81\udc82]|.\x02\x01[\0\x01])"
    r"|M(?:[A-H][A-Za-z0-9+/_-]|I[E-L])[A-Za-z0-9+/_-]{61}"
    # Any part of that with the version in it, 0 or 1, at any alignment.
    r"|M[A-Za-z0-9+/]{2,5}(?:AgE|CAQ|IBA)[A-Za-z0-9+/=_-]{40}"
    # The number or DER in hexadecimal, and nothing beside it: a path may have a digest in it.
    r"|\A\s*(?:0[xX])?(?:(?:00:?)?(?:[0-9A-Fa-f]{2}[:\s]*){32}|30[:\s]*(?:[0-9A-Fa-f]{2}[:\s]*){40,})\Z",
    re.DOTALL,
)
_SOURCES = "A secret source is file:PATH, env:NAME, prompt, or a callable passed in code."


@final
class Secret:
    """A secret text that no ``repr``, ``str``, format or pickle shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Wrap ``value``; only `reveal` gives it back."""
        self._value = value

    def reveal(self) -> str:
        """The secret itself, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "<Secret ****>"

    def __reduce__(self) -> NoReturn:
        msg = "a Secret cannot be pickled"
        raise TypeError(msg)


@without_locals
def read_secret(
    source: SecretSource, *, what: str, of: str = "", trusted_owner: int | None = None
) -> Secret:
    """Read a secret from its source.

    Args:
        source: ``file:PATH`` (one trailing line end is dropped), ``env:NAME``, ``prompt`` (asks on
            the terminal without echo), or a callable without arguments.
        what: What the secret is, for error texts and the prompt: ``"PIN"``, ``"passphrase"``.
        of: Which token or key it is for, for the prompt.
        trusted_owner: Of a file; see `read_private_file`.

    Returns:
        The secret, never empty.

    Raises:
        SecretSourceError: Unknown form, unreadable, world-readable, empty, or not UTF-8. The text
            repeats a file's path at most: anything else may be the secret, put there by mistake.
    """
    # No local variable and no error under way holds the value where an error is raised.
    secret = _wrapped(_value_from(source, what, of, trusted_owner))
    if secret is None:
        raise SecretSourceError(f"The {what} is empty, or not UTF-8 text.")
    return secret


def _value_from(source: SecretSource, what: str, of: str, trusted_owner: int | None) -> object:
    if callable(source):
        return _call(source, what)
    if source == "prompt":
        return _prompt(what, of)
    if isinstance(source, str) and source.startswith("env:"):
        return _from_environment(source.removeprefix("env:"), what)
    path = file_of(source)
    if path is not None:
        value = read_private_file(path, what=f"{what} file", trusted_owner=trusted_owner)
        return value.removesuffix(b"\n").removesuffix(b"\r")
    raise SecretSourceError(f"The source of the {what} is not understood.", hint=_SOURCES)


def file_of(source: SecretSource) -> str | None:
    """The file that a secret is read from; None for another source."""
    if not isinstance(source, str) or not source.startswith("file:"):
        return None
    return unquote(source.removeprefix("file:")).removeprefix("//")


def _wrapped(value: object) -> Secret | None:
    """The secret; None for what is no text, is empty, or has no UTF-8 form."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        return Secret(text) if isinstance(text, str) and text.encode() else None
    except UnicodeError:
        return None


def holds_key(text: str) -> bool:
    """Whether a text holds a key itself: in PEM, as a JWK, or as DER or a number in some form."""
    return _KEY.search(text) is not None


def shown_path(path: object) -> str:
    """A path as it may be shown; what does not look like one may be a secret and is not."""
    text = str(path)
    like_a_path = ("/" in text or _FILE_NAME.fullmatch(text)) and not _LIKE_A_URI.search(text)
    if not like_a_path or len(text) > _LONGEST_PATH or not text.isprintable() or holds_key(text):
        return "(not shown: it has not the form of a path)"
    return text


def read_private_file(path: str, *, what: str, trusted_owner: int | None = None) -> bytes:
    """Read a file that is for its owner alone, or for its owner and a group that may read it.

    That is how Kubernetes mounts a secret for a process that is not root (``fsGroup``), and how an
    agent beside this process leaves a token.

    Args:
        path: The file; symbolic links are followed, what counts is the file that they lead to.
        what: What the file is, for error texts.
        trusted_owner: A user (uid) who may own it, beside root and the user of this process.

    Returns:
        The content, at most 1 MiB.

    Raises:
        SecretSourceError: Unreadable, not a regular file, too large, open to others, writable by
            its group, or somebody else's.
    """
    try:
        return _content(
            path, lambda status: _check_owner_and_mode(status, path, what, trusted_owner)
        )
    except (OSError, ValueError) as error:
        raise SecretSourceError(
            f"The {what} cannot be read: {shown_path(path)}: {unreadable(error)}.",
            hint="Check the path, and that this process's user may read it.",
        ) from None


def read_public_file(path: str, check: Callable[[os.stat_result], None] = lambda _: None) -> bytes:
    """Read a file that holds no secret, such as a certificate.

    Args:
        path: Where it is.
        check: Raises where the file that was opened is not to be read.

    Returns:
        The content, at most 1 MiB.

    Raises:
        OSError: Unreadable, not a regular file, or too large.
        ValueError: Not a file name.
    """
    return _content(path, check)


def is_full(error: OSError) -> bool:
    """Whether a file system, or this user's share of it, has no room left."""
    return error.errno in _FULL


def unreadable(error: OSError | ValueError) -> str:
    """Why a file cannot be read, in a few words."""
    return (error.strerror or "no reason") if isinstance(error, OSError) else "not a file name"


def _content(path: str, check: Callable[[os.stat_result], None]) -> bytes:
    with open(path, "rb", opener=_open_without_blocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        check(status)
        content = file.read(_MAX_FILE_SIZE + 1)
    if len(content) > _MAX_FILE_SIZE:
        del content  # a frame that raises holds no secret
        raise OSError(errno.EFBIG, "larger than 1 MiB")
    return content


def _open_without_blocking(path: str, flags: int) -> int:
    # A FIFO without a writer would hold the caller for ever; it is refused after the open.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_owner_and_mode(
    status: os.stat_result, path: str, what: str, trusted_owner: int | None
) -> None:
    if status.st_mode & _FORBIDDEN:
        mode = stat.S_IMODE(status.st_mode)
        raise SecretSourceError(
            f"The {what} is open to other users (mode {mode:04o}): {shown_path(path)}.",
            hint="Run chmod 600 on it, or 640 where a group is to read it.",
        )
    if status.st_uid not in {0, os.geteuid(), trusted_owner}:
        raise SecretSourceError(
            f"The {what} belongs to another user (uid {status.st_uid}): {shown_path(path)}.",
            hint="Let root or this process's user own it; or name its uid as trusted_owner, where "
            "there is that option.",
        )


def _call(source: Callable[[], str | bytes], what: str) -> str | bytes:
    try:
        return source()
    except Exception as error:
        if of_signal_handler(error):
            raise
        kind = type(error).__name__
    # The callable's own error may quote the secret: only its type is told, and it is over here, so
    # that it does not become the context of ours.
    raise SecretSourceError(f"The callable that gives the {what} failed with {kind}.")


def _prompt(what: str, of: str) -> str:
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        raise SecretSourceError(
            f"The {what} cannot be asked for: standard input is not a terminal.", hint=_SOURCES
        )
    try:
        named = f"{what} for {of}" if of and of.isprintable() else what
        being_asked.set()
        return getpass.getpass(f"{named}: ", stream=sys.stderr)
    except EOFError:
        raise SecretSourceError(f"No {what} was given at the prompt.") from None
    finally:
        being_asked.clear()


def _from_environment(name: str, what: str) -> str:
    # Not os.environ[name]: its KeyError would carry the name, which may be a secret put there by
    # mistake, as the context of ours.
    value = os.environ.get(name) if name.isprintable() else None
    if value is None:
        raise SecretSourceError(
            f"The {what} is to come from an environment variable that is not set.",
            hint="Set the variable that env:NAME names.",
        )
    return value

# SPDX-License-Identifier: Apache-2.0
"""A throw-away token of SoftHSM 2, a PKCS#11 module in software, in a folder of its own.

It needs SoftHSM (`softhsm2-util` and its module), no other package, no root and no system-wide
configuration. It protects nothing: its keys are files of the user who runs it.
"""

from __future__ import annotations

import contextlib
import os
import pty
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.frames import without_locals
from d1_signer.secret import is_full, shown_path

LABEL = "d1-throw-away"
"""Label of a token where the caller names none."""

OBJECT = "d1-key"
"""Label of the key in `SoftHsmToken.variables` where the caller names none."""

_SECONDS_TO_INITIALISE = 30
_MODULE_FOLDERS = (
    "/usr/lib/softhsm",  # Debian, Ubuntu, Alpine, Arch
    "/usr/lib64/softhsm",  # openSUSE
    "/usr/lib64/pkcs11",  # Fedora, RHEL
    "/opt/homebrew/lib/softhsm",  # Homebrew on Apple silicon
    "/usr/local/lib/softhsm",  # Homebrew on Intel, a build from source
)
_CONFIGURATION = """\
directories.tokendir = {directory}
objectstore.backend = file
log.level = ERROR
slots.removable = false
library.reset_on_fork = false
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftHsmToken:
    """A fresh token without keys.

    Attributes:
        module_path: The PKCS#11 module, ``libsofthsm2.so``.
        label: The token's label.
        pin: The user PIN.
        so_pin: The security officer's PIN.
        pin_file: File of mode 0600 that holds the user PIN.
        configuration: What ``SOFTHSM2_CONF`` must name for the module to see this token.
        uri: Key URI of an object ``d1`` on the token, which `d1_signer.generate_key` makes
            and `d1_signer.open_signer` then opens.
    """

    module_path: str
    label: str
    pin: str = field(repr=False)
    so_pin: str = field(repr=False)
    pin_file: Path
    configuration: Path

    @property
    def uri(self) -> str:
        """Key URI of the object ``d1``; see the class."""
        return self.key_uri("d1")

    def key_uri(self, name: str) -> str:
        """Key URI of an object on the token.

        Args:
            name: The object's label (``CKA_LABEL``).
        """
        # A source is a URI of its own, within that of the key: a percent sign is escaped in both.
        pin_file = quote(str(self.pin_file).replace("%", "%25"))
        return (
            f"pkcs11:token={quote(self.label, safe='')};object={quote(name, safe='')}"
            f"?module-path={quote(self.module_path)}&pin-source=file:{pin_file}"
        )

    def variables(self, name: str = OBJECT) -> Mapping[str, str]:
        """What a command finds in its environment to use the token.

        Args:
            name: Label of the key in the key URI.
        """
        return {
            "SOFTHSM2_CONF": str(self.configuration),
            "SOFTHSM2_MODULE": self.module_path,
            "D1_SIGNER_KEY": self.key_uri(name),
        }


@contextlib.contextmanager
def throw_away_token(label: str = LABEL) -> Iterator[SoftHsmToken]:
    """A token that is removed in the end; see `make_token`."""
    with tempfile.TemporaryDirectory(
        prefix="d1-signer-softhsm-", ignore_cleanup_errors=True
    ) as folder:
        yield make_token(Path(folder), label)


@without_locals
def make_token(folder: Path, label: str = LABEL) -> SoftHsmToken:
    """Make a token.

    Args:
        folder: Where; new, or empty.
        label: The token's label, at most 32 bytes.

    Raises:
        ConfigurationError: SoftHSM is not installed or makes no token, or the folder cannot be
            used.
        D1SignerError: The disk is full; nothing is left in the folder.
    """
    utility, module = find_softhsm()
    folder = folder.absolute()
    _require_folder_that_softhsm_reads(folder)
    token = SoftHsmToken(
        module_path=str(module),
        label=label,
        pin=secrets.token_hex(16),
        so_pin=secrets.token_hex(16),
        pin_file=folder / "pin",
        configuration=folder / "softhsm2.conf",
    )
    try:
        made = not folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigurationError(
                f"{folder} is not empty.", hint="Name a new folder; a token is never overwritten."
            )
        with _all_or_nothing(folder, made=made):
            tokens = folder / "tokens"
            tokens.mkdir(mode=0o700)
            _write_private(token.configuration, _CONFIGURATION.format(directory=tokens))
            _write_private(token.pin_file, token.pin)
            _initialise(utility, token)
    except OSError as error:
        text = f"{folder} cannot hold a token: {error.strerror}."
        if is_full(error):
            hint = f"Make room on the file system of {folder.parent}."
            raise D1SignerError(text, hint=hint, retryable=True) from None
        raise ConfigurationError(text) from None
    return token


@contextlib.contextmanager
def _all_or_nothing(folder: Path, *, made: bool) -> Iterator[None]:
    """Leave the empty folder as it was, where what fills it fails."""
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        if made:
            folder.rmdir()
        raise


def find_softhsm() -> tuple[Path, Path]:
    """The paths of `softhsm2-util` and of the module: `SOFTHSM2_MODULE`, or a usual place.

    Raises:
        ConfigurationError: One of them is not there.
    """
    found = shutil.which("softhsm2-util")
    if found is None:
        raise ConfigurationError(
            "SoftHSM is not installed: softhsm2-util was not found.",
            hint="Install it with: apt-get install softhsm2 (Debian, Ubuntu), dnf install softhsm "
            "(Fedora, RHEL), apk add softhsm (Alpine), brew install softhsm (macOS).",
        )
    utility = Path(found).resolve()
    if named := os.environ.get("SOFTHSM2_MODULE"):
        candidates = [Path(named)]
    else:
        prefix = utility.parent.parent
        folders = [prefix / "lib/softhsm", *map(Path, _MODULE_FOLDERS)]
        candidates = [folder / "libsofthsm2.so" for folder in folders]
        candidates += sorted(prefix.glob("lib/*/softhsm/libsofthsm2.so"))
    for candidate in candidates:
        if candidate.is_file():
            return utility, candidate
    places = ", ".join(str(candidate.parent) for candidate in candidates)
    raise ConfigurationError(
        f"SoftHSM's module libsofthsm2.so was not found in {places}.",
        hint="Set SOFTHSM2_MODULE to its path.",
    )


def _require_folder_that_softhsm_reads(folder: Path) -> None:
    """Refuse a folder that SoftHSM would read as another one: its file knows no escapes."""
    named = os.fsencode(folder)
    try:
        named.decode("utf-8")
    except UnicodeDecodeError:
        fits = False
    else:
        fits = not any(mark in named for mark in (b"#", b"=", b"\n", b"\r"))
    if not fits:
        raise ConfigurationError(
            f"SoftHSM cannot use the folder {shown_path(folder)}: its file of settings takes no "
            "'#', no '=', no line end and nothing but UTF-8 in a path.",
            hint="Name another folder: --folder DIR, or TMPDIR for a token that is thrown away.",
        )


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _initialise(utility: Path, token: SoftHsmToken) -> None:
    """Initialise the token, and answer the prompts of softhsm2-util on a terminal of our own.

    Its options would put both PINs on the command line, where every user of the machine reads them.
    """
    # Each is asked for twice.
    answers = [token.so_pin, token.so_pin, token.pin, token.pin]
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(  # noqa: S603 (an argument list, no shell)
            [utility, "--init-token", "--free", "--label", token.label],
            env={**os.environ, "SOFTHSM2_CONF": str(token.configuration)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        ) as process:
            os.close(theirs)
            transcript = _converse(ours, answers)
            if transcript is None:
                process.kill()
    finally:
        os.close(ours)
    if transcript is None or answers or process.returncode != 0:
        told = " ".join((transcript or "").split())
        raise ConfigurationError(
            f"softhsm2-util failed (exit status {process.returncode}): {told or 'it hung'}",
            hint="A label has at most 32 bytes; the disk must have room for a token.",
        )


def _converse(terminal: int, answers: list[str]) -> str | None:
    """Answer each prompt, to the end of the output; return the output, or None after the limit."""
    transcript = ""
    answered = 0
    deadline = time.monotonic() + _SECONDS_TO_INITIALISE
    while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # Linux reports the end of a terminal's output as EIO
            chunk = b""
        if not chunk:
            return transcript
        transcript += chunk.decode(errors="replace")
        if answers and transcript.count("PIN: ") > answered:
            answered += 1
            os.write(terminal, answers.pop(0).encode() + b"\n")
    return None

# SPDX-License-Identifier: Apache-2.0
"""A SoftHSM token in a folder of its own, made for one test."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

# Where distributions and package managers put the module (Debian, Fedora, Alpine, Homebrew).
_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
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
        return (
            f"pkcs11:token={quote(self.label)};object={quote(name, safe='')}"
            f"?module-path={quote(self.module_path)}&pin-source=file:{quote(str(self.pin_file))}"
        )


def make_softhsm_token(directory: Path, *, label: str | None = None) -> SoftHsmToken:
    """Make a token below a directory; the caller sets ``SOFTHSM2_CONF`` to its configuration.

    Args:
        directory: Empty, and not shared with another token.
        label: The token's label, at most 32 bytes; None: one that no other token has.

    Raises:
        pytest.fail.Exception: SoftHSM is not installed, or made no token. Never skipped: a test
            that did not run must not look like one that passed.
    """
    tool = shutil.which("softhsm2-util")
    candidates = [os.environ.get("SOFTHSM2_MODULE", ""), *_MODULES]
    module = next((path for path in candidates if Path(path).is_file()), None)
    if tool is None or module is None:
        pytest.fail(
            "SoftHSM is not installed. Install it with: apt-get install softhsm2 (Debian, "
            "Ubuntu), dnf install softhsm (Fedora), apk add softhsm (Alpine), "
            "brew install softhsm (macOS).",
            pytrace=False,
        )
    store = directory / "tokens"
    store.mkdir(mode=0o700)
    configuration = directory / "softhsm2.conf"
    configuration.write_text(_CONFIGURATION.format(directory=store))
    token = SoftHsmToken(
        module_path=module,
        label=label or f"test-{secrets.token_hex(6)}",
        pin=secrets.token_hex(8),
        so_pin=secrets.token_hex(8),
        pin_file=directory / "pin",
        configuration=configuration,
    )
    token.pin_file.touch(mode=0o600)
    token.pin_file.write_text(token.pin)
    command = [tool, "--init-token", "--free", "--label", token.label]
    # Other users can read a command line: this PIN guards nothing for longer than a test.
    command += ["--pin", token.pin, "--so-pin", token.so_pin]
    made = subprocess.run(  # noqa: S603 (the tool just found, without a shell)
        command,
        env=os.environ | {"SOFTHSM2_CONF": str(configuration)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if made.returncode != 0:
        pytest.fail(f"softhsm2-util made no token: {made.stdout}{made.stderr}", pytrace=False)
    return token


@pytest.fixture
def softhsm_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsmToken:
    """A fresh `SoftHsmToken` for this test, with ``SOFTHSM2_CONF`` set to it.

    The module reads that variable when it is initialised, so a signer on another token of the same
    module must be closed before this one's is opened.
    """
    directory = tmp_path / "softhsm"
    directory.mkdir(mode=0o700)
    token = make_softhsm_token(directory)
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.configuration))
    return token

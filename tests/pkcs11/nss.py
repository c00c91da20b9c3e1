# SPDX-License-Identifier: Apache-2.0
"""NSS's software token, which shares no code with SoftHSM."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_MODULES = (
    "/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
    "/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
    "/usr/lib64/libsoftokn3.so",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NssDatabase:
    """A new database, which is a token.

    Attributes:
        module_path: The PKCS#11 module.
        pin_file: Holds its PIN.
        init_reserved: What the module is told of it at ``C_Initialize``.
    """

    module_path: str
    pin_file: Path
    init_reserved: str

    def key_uri(self, module_path: str) -> str:
        """Key URI of the object ``d1``, through this module or one that leads to it."""
        uri = "pkcs11:token=NSS%20Certificate%20DB;object=d1"
        return f"{uri}?module-path={module_path}&pin-source=file:{self.pin_file}"


def make_nss_database(directory: Path) -> NssDatabase:
    """Make a database below a directory."""
    tool = shutil.which("certutil")
    module = next((path for path in _MODULES if Path(path).exists()), None)
    if tool is None or module is None:
        pytest.fail("NSS was not found: apt-get install libnss3 libnss3-tools", pytrace=False)
    folder = directory / "nss"
    folder.mkdir()
    pin = directory / "nss-pin"
    pin.touch(0o600)
    pin.write_text("a-pin-for-nss")
    command = [tool, "-N", "-d", f"sql:{folder}", "-f", str(pin)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    settings = f"configdir='sql:{folder}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
    return NssDatabase(module_path=module, pin_file=pin, init_reserved=settings)

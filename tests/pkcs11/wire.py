# SPDX-License-Identifier: Apache-2.0
"""An HSM on a wire: `p11-kit server` in front of a token, and its client as the module."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d1_signer.testing import SoftHsmToken

_PLACES = (
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib64/pkcs11",
)
_SECONDS_TO_START = 10.0


def module(name: str) -> str:
    """Path of a module of p11-kit, opensc or the like."""
    for place in _PLACES:
        if (path := Path(place, name)).exists():
            return str(path)
    pytest.fail(f"{name} was not found: apt-get install p11-kit p11-kit-modules opensc-pkcs11")


def proxy(home: Path, modules: dict[str, str]) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """p11-kit's proxy over several modules, by the configuration of a user.

    Args:
        home: The user's home, where nothing is configured yet.
        modules: The lines of each module's file, by its name.

    Returns:
        The proxy's path, the variables that it needs, and what its process is started with: as
        root, p11-kit reads no user's configuration; in a user namespace it sees another user.
    """
    folder = home / ".config" / "pkcs11" / "modules"
    folder.mkdir(parents=True)
    (home / ".config" / "pkcs11" / "pkcs11.conf").write_text("user-config: only\n")
    for name, lines in modules.items():
        (folder / f"{name}.module").write_text(lines)
    env = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
    prefix = ("unshare", "--user") if os.getuid() == 0 else ()
    return module("../p11-kit-proxy.so"), env, prefix


class Wire:
    """A server that can be killed, frozen and started again, with all that it forks."""

    def __init__(
        self, token: SoftHsmToken, directory: Path, provider: str, env: dict[str, str]
    ) -> None:
        self.socket = directory / "p11"
        self.client = module("p11-kit-client.so")
        self.env = {"P11_KIT_SERVER_ADDRESS": f"unix:path={self.socket}"}
        self._command = [str(shutil.which("p11-kit")), "server", "-f", "-n", str(self.socket)]
        self._command += ["--provider", provider, f"pkcs11:token={token.label}"]
        self._env = {**os.environ, "SOFTHSM2_CONF": str(token.configuration), **env}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        # A session of its own, so that the p11-kit-remote of each connection is reached as well.
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + _SECONDS_TO_START
        while not self.socket.exists():
            assert self._process.poll() is None, "p11-kit server ended"
            assert time.monotonic() < until, "p11-kit server does not start"
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def wire(
    token: SoftHsmToken,
    directory: Path,
    *,
    provider: str | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Wire]:
    """A running server in front of the token; killed at the end."""
    server = Wire(token, directory, provider or token.module_path, env or {})
    server.start()
    try:
        yield server
    finally:
        server.kill()

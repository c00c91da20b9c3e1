# SPDX-License-Identifier: Apache-2.0
"""A TPM 2.0 of the tests' own: swtpm, and tpm2-abrmd in front of it on a bus of its own.

swtpm serves one connection at a time, and has no resource manager as the kernel has for a TPM.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SECONDS_TO_START = 60.0
_BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
_ASK = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
_ASK += ["org.freedesktop.DBus.NameHasOwner", "string:com.intel.tss2.Tabrmd"]


class Tpm:
    """A TPM that answers; its state is lost with the folder.

    Attributes:
        env: What the TPM2 tools and tpm2-pkcs11 need to reach it.
        tcti: Its TCTI, where an operator's would be ``device:/dev/tpmrm0``.
    """

    tcti = "tabrmd:bus_type=session"

    def __init__(self, directory: Path) -> None:
        bus = directory / "bus"
        self.env = {
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={bus}",
            "TPM2TOOLS_TCTI": self.tcti,
            "TPM2_PKCS11_TCTI": self.tcti,
            "TPM2_PKCS11_LOG_LEVEL": "0",
            "TSS2_LOG": "all+none",
        }
        self._socket = directory / "tpm"
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            self._start(directory, bus)
            self._start_broker()
        except BaseException:
            self.stop()
            raise

    def _start(self, directory: Path, bus: Path) -> None:
        state, configuration = directory / "state", directory / "bus.conf"
        state.mkdir()
        configuration.write_text(_BUS.format(socket=bus))
        socket, control = self._socket, Path(f"{self._socket}.ctrl")
        self._begin("dbus-daemon", f"--config-file={configuration}", "--nofork")
        self._begin(
            "swtpm",
            *("socket", "--tpm2", "--tpmstate", f"dir={state}"),
            *("--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={control}"),
            *("--flags", "not-need-init,startup-clear"),
        )
        self._until(lambda: bus.exists() and control.exists() and socket.exists())

    def _start_broker(self) -> None:
        # One that was killed amid a command has left objects in the TPM, which holds three.
        self._begin(
            *("tpm2-abrmd", "--session", "--allow-root", "--flush-all"),
            f"--tcti=swtpm:path={self._socket}",
        )
        self._until(self._owned)

    @contextmanager
    def without_broker(self) -> Iterator[None]:
        """tpm2-abrmd is killed, and another one started at the end; the TPM goes on."""
        _end(self._started.pop())
        try:
            yield
        finally:
            self._start_broker()

    def _begin(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if program is None:
            pytest.fail(f"{name} was not found: scripts/system-packages test", pytrace=False)
        started = subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._started.append(started)

    def _owned(self) -> bool:
        asked = subprocess.run(
            _ASK, env={**os.environ, **self.env}, capture_output=True, check=False, timeout=10
        )
        return b"boolean true" in asked.stdout

    def _until(self, true: Callable[[], bool]) -> None:
        until = time.monotonic() + _SECONDS_TO_START
        while not true():
            for started in self._started:
                assert started.poll() is None, f"{started.args!r} ended"
            assert time.monotonic() < until, "the TPM does not start"
            time.sleep(0.005)

    def tool(self, *command: str, **env: str) -> str:
        """What one of the TPM2 tools prints."""
        ran = subprocess.run(
            command,
            env={**os.environ, **self.env, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def property(self, name: str) -> int:
        """One of its variable properties, such as ``TPM2_PT_LOCKOUT_COUNTER``."""
        told = re.search(rf"{name}: 0x([0-9A-F]+)", self.tool("tpm2_getcap", "properties-variable"))
        assert told is not None
        return int(told[1], 16)

    def stop(self) -> None:
        while self._started:
            _end(self._started.pop())


def _end(started: subprocess.Popen[bytes]) -> None:
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()


@contextmanager
def running_tpm(directory: Path) -> Iterator[Tpm]:
    """A TPM that is stopped at the end."""
    tpm = Tpm(directory)
    try:
        yield tpm
    finally:
        tpm.stop()

# SPDX-License-Identifier: Apache-2.0
"""A module in front of SoftHSM that counts calls and sessions, and fails on request; see shim.c."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

_FUNCTIONS = 68
_CELLS = (
    "sessions",
    "most",
    "inside",
    "finalized_beside",
    "token_flags",
    "user_type",
    "os_locking",
    "heals",
    "limit",
    "only_slot",
    "arguments_changed",
)
_SIZE = (3 * _FUNCTIONS + len(_CELLS)) * 8

ABORT = 0x40000001
HANG = 0x40000002
ALWAYS = 2**62


class Call(IntEnum):
    """Places in CK_FUNCTION_LIST."""

    INITIALIZE = 0
    FINALIZE = 1
    GET_INFO = 2
    GET_SLOT_LIST = 4
    GET_SLOT_INFO = 5
    GET_TOKEN_INFO = 6
    OPEN_SESSION = 12
    CLOSE_SESSION = 13
    GET_SESSION_INFO = 15
    LOGIN = 18
    LOGOUT = 19
    DESTROY_OBJECT = 22
    GET_ATTRIBUTE_VALUE = 24
    FIND_OBJECTS_INIT = 26
    FIND_OBJECTS = 27
    FIND_OBJECTS_FINAL = 28
    SIGN_INIT = 42
    SIGN = 43
    GENERATE_KEY_PAIR = 59


def build(directory: Path, *options: str) -> Path:
    """Compile the shim; ``-DOWN_CONTEXT``: with an OpenSSL library context of its own."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("No C compiler: apt-get install gcc libc6-dev.", pytrace=False)
    target = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [
        compiler,
        *options,
        "-O1",
        "-shared",
        "-fPIC",
        "-o",
        str(target),
        str(source),
        "-ldl",
    ]
    subprocess.run(command, check=True, timeout=60)
    return target


class Shim:
    """What the shim is told and what it has seen, in every process that loaded it."""

    def __init__(self, path: Path, module_path: str, state: Path) -> None:
        self.path = str(path)
        self._sees = state.with_suffix(".environment")
        self.env = {"SHIM_MODULE": module_path, "SHIM_STATE": str(state), "SHIM_SCRIPT": ""}
        self.env["SHIM_SEES"] = ""
        state.write_bytes(bytes(_SIZE))
        with state.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    def close(self) -> None:
        self._map.close()

    def fail(self, call: Call, code: int, times: int = ALWAYS) -> None:
        """Answer a call with a return value, or ABORT or HANG, for some times."""
        self._set(_FUNCTIONS + call, times)
        self._set(call, code)

    def script(self, directives: str) -> None:
        """Change single answers, in this process and the children it starts; see shim.c."""
        os.environ["SHIM_SCRIPT"] = directives

    def heal(self) -> None:
        for place in range(_FUNCTIONS):
            self._set(place, 0)

    def calls(self, call: Call) -> int:
        return self._get(2 * _FUNCTIONS + call)

    def look_at_environment(self) -> None:
        """See the variables of each process that loads the module from now on."""
        os.environ["SHIM_SEES"] = str(self._sees)

    def variables(self) -> dict[str, str]:
        """Those of the last process that loaded the module; they stand nowhere afterwards."""
        pairs = self._sees.read_bytes().decode().split("\0")
        self._sees.unlink()
        return dict(pair.split("=", 1) for pair in pairs if pair)

    @property
    def sessions(self) -> int:
        """Open now."""
        return self._get(3 * _FUNCTIONS)

    @property
    def most_sessions(self) -> int:
        return self._get(3 * _FUNCTIONS + 1)

    @property
    def inside(self) -> int:
        """Calls under way."""
        return self._get(3 * _FUNCTIONS + 2)

    @property
    def finalized_beside_a_call(self) -> int:
        return self._get(3 * _FUNCTIONS + 3)

    def add_token_flags(self, flags: int) -> None:
        self._set(3 * _FUNCTIONS + 4, flags)

    @property
    def user_type(self) -> int:
        """Of the last C_Login."""
        return self._get(3 * _FUNCTIONS + 5)

    @property
    def initialized_with_os_locking(self) -> int:
        return self._get(3 * _FUNCTIONS + 6)

    def heal_when_finalized(self) -> None:
        """C_Finalize ends all faults."""
        self._set(3 * _FUNCTIONS + 7, 1)

    def limit_sessions(self, limit: int) -> None:
        """More are answered CKR_SESSION_COUNT."""
        self._set(3 * _FUNCTIONS + 8, limit)

    def only_slot(self, slot: int) -> None:
        """Faults of C_GetSlotInfo and C_GetTokenInfo are about this slot alone."""
        self._set(3 * _FUNCTIONS + 9, slot)

    @property
    def arguments_changed(self) -> int:
        """How often a signature saw other arguments than C_Initialize got."""
        return self._get(3 * _FUNCTIONS + 10)

    def _get(self, place: int) -> int:
        value: int = struct.unpack_from("L", self._map, 8 * place)[0]
        return value

    def _set(self, place: int, value: int) -> None:
        struct.pack_into("L", self._map, 8 * place, value)

# SPDX-License-Identifier: Apache-2.0
"""Libraries that are no PKCS#11 module, or hang while they are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.signing.opening import generate_key, open_signer
from tests.pkcs11.conftest import ROOT, Run

URI = "pkcs11:token=none;object=d1"

_HANGS = """
#include <unistd.h>
__attribute__((constructor)) static void begin(void) { char c; if (read(0, &c, 1)) {} }
unsigned long C_GetFunctionList(void **list) { return 5; }
"""
_OPENS = """
import os, sys
from d1_signer import SignerTimeout, open_signer
try:
    open_signer("pkcs11:token=none;object=d1", module_path=sys.argv[1], timeout=0.3)
except SignerTimeout as error:
    print(error.details["step"], flush=True)
os._exit(0)  # the end of a process waits for libraries that are being loaded
"""


def _library(directory: Path, code: str) -> str:
    path = directory / "module.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(path), "-"],
        input=code,
        text=True,
        check=True,
        timeout=60,
    )
    return str(path)


def _refused(path: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as raised:
        open_signer(URI, module_path=path)
    assert raised.value.details["step"] == "module"
    assert not raised.value.retryable
    return raised.value


def test_library_that_hangs_while_it_is_loaded_is_given_up(tmp_path: Path) -> None:
    path = _library(tmp_path, _HANGS)
    theirs, ours = os.pipe()  # nothing is ever written to it
    try:
        done = subprocess.run(
            [sys.executable, "-c", _OPENS, path],
            cwd=ROOT,
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.stdout == "module\n", done.stderr


def test_path_of_something_else_than_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link.so"
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, Path("/dev/null")):
        assert "no regular file" in str(_refused(str(path)))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("unsigned long C_GetFunctionList(void **list) { *list = 0; return 0; }", "gives no list"),
        ("unsigned long C_GetFunctionList(void **list) { return 0; }", "gives no list"),
        ("unsigned long C_GetFunctionList(void **list) { return 5; }", "CKR_GENERAL_ERROR"),
        ("int nothing;", "no C_GetFunctionList"),
    ],
)
def test_library_that_gives_no_list(tmp_path: Path, run_python: Run, code: str, words: str) -> None:
    done = run_python(
        "import sys\nfrom d1_signer import ConfigurationError, open_signer\n"
        f"try:\n    open_signer({URI!r}, module_path=sys.argv[1])\n"
        "except ConfigurationError as error:\n    print(error.details['step'], error)",
        _library(tmp_path, code),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("module ")
    assert words in done.stdout


def test_files_that_are_no_library(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    assert f"{text}: " in str(_refused(str(text)))  # the loader's own words follow
    assert "No such file" in str(_refused(str(tmp_path / "none.so")))


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_nul_in_the_path(isolation: str) -> None:
    in_uri = f"{URI}?module-path=/usr/lib/a%00b.so"
    for work in (open_signer, generate_key):
        with pytest.raises(KeyUriError) as raised:
            work(in_uri, isolation=isolation)
        assert raised.value.details["step"] == "module"
        with pytest.raises(ConfigurationError) as given:
            work(URI, module_path="/usr/lib/a\0b.so", isolation=isolation)
        assert given.value.details["step"] == "module"

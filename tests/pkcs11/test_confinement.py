# SPDX-License-Identifier: Apache-2.0
"""What the child of ``isolation="process"`` is given, what its crash leaves, how long it lives."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from d1_signer import Signer, generate_key, open_signer
from d1_signer.backends.pkcs11.isolation.confinement import environment
from d1_signer.errors import SignerUnavailable
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import ABORT, HANG, Call, Shim
from tests.token.test_fetcher import until


@contextmanager
def opened(token: SoftHsmToken, shim: Shim, **options: Any) -> Iterator[tuple[Signer, int]]:
    """A signer, and the process ID of its child."""
    before = children()
    with open_signer(token.uri, module_path=shim.path, isolation="process", **options) as signer:
        (host,) = children() - before
        yield signer, host


def children(of: int | None = None) -> set[int]:
    """The processes that host a module, of this process or of another one."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        if b"isolation.host" in command and parent == (of or os.getpid()):
            found.add(int(folder.name))
    return found


def test_child_gets_no_credentials_that_are_not_the_modules(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ["AWS_SECRET_ACCESS_KEY", "VAULT_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"]
    others += ["D1_CLIENT_KEY", "BAO_TOKEN", "REDIS_URL", "PGPASSWORD", "AZURE_CLIENT_SECRET"]
    theirs = ["ChrystokiConfigurationPath", "NFAST_HOME", "YUBIHSM_PKCS11_CONF", "HSM_TOKEN"]
    for name in others + theirs:
        monkeypatch.setenv(name, f"the value of {name}")
    shim.look_at_environment()
    with opened(token, shim) as (signer, _):
        given = shim.variables()
        signer.public_key.verify(signer.sign(b"message"), b"message")
    assert not given.keys() & set(others)
    assert set(theirs) <= given.keys()
    assert given["SOFTHSM2_CONF"] == str(token.configuration)
    with opened(token, shim, keep_environment="AWS_*, VAULT_TOKEN"):
        assert shim.variables().keys() & set(others) == {"AWS_SECRET_ACCESS_KEY", "VAULT_TOKEN"}


def test_pin_in_a_variable_of_such_a_name(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D1_PIN", token.pin)
    monkeypatch.setenv("D1_OTHER", "of no use to the module")
    uri = token.uri.partition("&pin-source")[0]
    shim.look_at_environment()
    with opened(token, shim, pin_source="env:D1_PIN") as (signer, _):
        signer.sign(b"message")
        assert shim.variables().keys() & {"D1_PIN", "D1_OTHER"} == {"D1_PIN"}
    made = generate_key(
        uri.replace("object=d1", "object=d2"),
        module_path=shim.path,
        isolation="process",
        pin_source="env:D1_PIN",
    )
    assert "object=d2" in made.uri
    assert shim.variables().keys() & {"D1_PIN", "D1_OTHER"} == {"D1_PIN"}


def test_names_are_of_their_own_case() -> None:
    ours = {"vault_token": "1", "VAULT_TOKEN": "2", "MY_VAULT_TOKEN": "3"}
    assert environment(ours, ()) == {"vault_token": "1", "MY_VAULT_TOKEN": "3"}
    assert environment(ours, ("VAULT_*",)) == ours


@pytest.mark.parametrize(
    "name", ["HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "Http_Proxy", "FTP_PROXY"]
)
@pytest.mark.parametrize(
    "value",
    [
        *("http://bank:secret@proxy:3128", "bank:secret@proxy:3128", "http://bank@proxy:3128/"),
        *("socks5h://b%40nk:s%2Fcret@proxy", "http://bank:p/ss?w#rd@proxy:3128"),
    ],
)
def test_proxy_with_credentials_is_left_out(name: str, value: str) -> None:
    assert environment({name: value}, ()) == {}
    assert environment({name: value}, (name,)) == {name: value}


def test_proxy_without_credentials_stays() -> None:
    plain = {
        "HTTP_PROXY": "http://proxy:3128",
        "https_proxy": "proxy:3128",
        "NO_PROXY": "localhost,.bank.example",
        "HSM_USER": "operator@partition",
    }
    assert environment(plain, ()) == plain


def test_child_gets_no_proxys_password(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://bank:secret@proxy:3128")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    shim.look_at_environment()
    with opened(token, shim):
        given = shim.variables()
    assert not [value for value in given.values() if "bank:secret" in value]
    assert given["HTTP_PROXY"] == "http://proxy:3128"


@pytest.mark.parametrize("core_dumps", [False, True])
def test_core_of_a_crash(
    token: SoftHsmToken,
    shim: Shim,
    *,
    core_dumps: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The limit of the child, and whether others than root may read its memory."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    monkeypatch.chdir(tmp_path)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    try:
        with opened(token, shim, core_dumps=core_dumps) as (signer, host):
            told = re.search(r"Max core file size +(\S+)", Path(f"/proc/{host}/limits").read_text())
            assert told is not None
            assert (told[1] == "0") == (not core_dumps or limits[1] == 0)
            shim.fail(Call.SIGN, ABORT, times=1)
            with pytest.raises(SignerUnavailable):
                signer.sign(b"message")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
    if not core_dumps:
        assert not list(tmp_path.glob("core*"))


def test_memory_of_the_child_is_for_root_alone(token: SoftHsmToken, shim: Shim) -> None:
    """As PR_GET_DUMPABLE tells: what is not dumpable belongs to root in /proc."""
    if os.geteuid() == 0:
        ask = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
        code = (
            f"from d1_signer.backends.pkcs11.isolation.confinement import *; write_no_core(); {ask}"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert ran.stdout == "0\n"
        return
    with opened(token, shim) as (_, host):
        assert Path(f"/proc/{host}/environ").stat().st_uid == 0


_OPENS = """
import os, sys, threading
from d1_signer import open_signer

if "forks" in sys.argv:  # a copy of all descriptors, of which nobody was told
    import ctypes
    fork = ctypes.PyDLL(None).fork
signer_of = lambda: open_signer(sys.argv[1], isolation="process", timeout=30)
if "opens" in sys.argv:
    signer_of()
signer = signer_of()
if "forks" in sys.argv and fork() == 0:
    import time
    while True:
        time.sleep(60)
print("open", flush=True)
sys.stdin.readline()
signer.sign(b"message")
"""


@pytest.mark.stress
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (Call.LOGIN, ["opens"]),
        (Call.INITIALIZE, ["opens"]),
        (Call.OPEN_SESSION, ["opens"]),
        (Call.SIGN, []),
        (None, ["forks"]),
    ],
)
def test_parent_that_is_killed(
    token: SoftHsmToken, shim: Shim, call: Call | None, arguments: list[str]
) -> None:
    uri = f"{token.uri.partition('?')[0]}?module-path={shim.path}&pin-source=file:{token.pin_file}"
    if call is not None and "opens" in arguments:
        shim.fail(call, HANG)
    with subprocess.Popen(
        [sys.executable, "-c", _OPENS, uri, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        try:
            assert parent.stdin is not None
            assert parent.stdout is not None
            if "opens" not in arguments:
                assert parent.stdout.readline() == b"open\n"
            if call is Call.SIGN:
                shim.fail(call, HANG)
                parent.stdin.write(b"\n")
                parent.stdin.flush()
            if call is not None:
                until(lambda: shim.inside == 1, seconds=30)
            (host,) = children(parent.pid)
            parent.kill()
            # Within the second for its sessions, and one for a look at who its parent is.
            until(lambda: not alive(host), seconds=20)
        finally:
            shim.heal()
            os.killpg(parent.pid, signal.SIGKILL)
    assert shim.calls(Call.LOGIN) <= 1


def alive(process: int) -> bool:
    try:
        return "Z (zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False

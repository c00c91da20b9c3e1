# SPDX-License-Identifier: Apache-2.0
"""Servers that fork without telling Python, and those that replace parts of its library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from d1_signer.sandbox import Fault, Sandbox
from tests.servers.process import accepts, free_port, running
from tests.token.fleet.member import ROOT
from tests.token.fleet.test_examples import BIN, EXAMPLES, calls, served

PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])}


# -- forks that Python is not told of -------------------------------------------------------------

LOADS = """
import sys
from fleet_fetcher import new_fetcher

fetcher = new_fetcher()
session = fetcher.session()
url = fetcher.environment.banking_url + "/ping"
loaded = set(sys.modules)
fetcher.token()
statuses = [session.get(url).status_code, session.post(url, json={}).status_code]
fetcher.invalidate(fetcher.token())
statuses += [session.get(url).status_code]
fetcher.close()
print(statuses, sorted(set(sys.modules) - loaded))
"""


@pytest.mark.parametrize("store", ["redis", "none"])
def test_nothing_is_loaded_after_the_fetcher_is_made(
    member_settings: dict[str, str], sandbox: Sandbox, store: str
) -> None:
    """A module that is being loaded in another thread at a fork is locked in the child for ever."""
    if store == "none":
        del member_settings["REDIS_URL"]
    sandbox.misbehave(Fault.STATUS_503, times=1, retry_after=0)
    ran = subprocess.run(
        [sys.executable, "-c", LOADS],
        env=os.environ | member_settings | PATH,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout.strip() == "[200, 200, 200] []", ran.stdout + ran.stderr


FORKED = """
import contextlib, ctypes, os, pathlib, threading, time
from d1_signer import LazySigner
from fleet_fetcher import new_fetcher

def fork():
    # As uWSGI forks: in C, with nothing of Python's around it. A thread that waits for the
    # interpreter's lock at that moment makes the child hang whatever is called there.
    before = None
    while before != (now := others()) or "State:\tR" in now:
        before = now
        time.sleep(0.05)
    return ctypes.PyDLL(None).fork()

def others():
    # A thread that wants the interpreter's lock wakes up every five milliseconds, and is counted.
    own, found = str(threading.get_native_id()), ""
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += (task / "status").read_text() if task.name != own else ""
    return found

def held(lock):
    # By a thread that the child does not have.
    taken = threading.Event()
    def hold():
        with lock:
            taken.set()
            threading.Event().wait(60)
    threading.Thread(target=hold, daemon=True).start()
    taken.wait()

def lazily(signer):
    return LazySigner(lambda: signer, kid=signer.kid, public_key=signer.public_key)

fetcher = new_fetcher()
signers = fetcher._renewal._renewal._signers if store else fetcher._renewal._signers
{before}
child = fork()
if child == 0:
    started = time.monotonic()
    try:
        {asked}
        fetcher.close()
    except BaseException as error:
        print("child", repr(error), flush=True)
        os._exit(1)
    os._exit(0 if time.monotonic() - started < 15 else 2)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ("held(fetcher._lock)", "fetcher.token()"),
        ("held(fetcher._lock)", "fetcher.prefetch(); fetcher.token()"),
        ("fetcher.invalidate(fetcher.token()); held(fetcher._lock)", "fetcher.token()"),
        ("held(fetcher._tls._handing_out)", "fetcher.ssl_context"),
        ("held(fetcher._tls._lock)", "fetcher.reload(); fetcher.token()"),
        ("held(signers._lock)", "signers.health(); fetcher.token()"),
        ("held(signers._members[0]._lock)", "fetcher.token()"),
        ("lazy = lazily(signers._members[0].source); held(lazy._lock)", "lazy.signer(timeout=9)"),
        ("held(fetcher._endpoint._adapter._connections.lock)", "fetcher.token()"),
        ("fetcher.token(); held(fetcher._endpoint._adapter._connections.lock)", "fetcher.close()"),
        (
            "from d1_signer.transport.processes import fork_gate; held(fork_gate._changed)",
            "fetcher.token()",
        ),
        (
            "held(fetcher._renewal._store._under_way._lock)",
            "fetcher.token()",
        ),
        (
            "held(fetcher._renewal._store._store._clients._lock)",
            "fetcher.token()",
        ),
    ],
)
def test_no_lock_of_a_parent_stops_a_child(
    member_settings: dict[str, str], before: str, asked: str
) -> None:
    code = FORKED.replace("{before}", before).replace("{asked}", asked)
    code = code.replace("if store else", "if fetcher._renewal._store else")
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | member_settings | PATH,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert ran.stdout.split() == ["0"], ran.stdout + ran.stderr


@contextmanager
def uwsgi(settings: dict[str, str], log: Path, sandbox: Sandbox, *options: str) -> Iterator[str]:
    port, go = free_port(), log.with_name("go")
    command = [str(BIN / "uwsgi"), "--http-socket", f"127.0.0.1:{port}", "--master", "--need-app"]
    command += ["--workers", "2", "--venv", sys.prefix, "--die-on-term", *options]
    command += ["--module", "tests.token.fleet.uwsgi_app"]

    def ready() -> bool:
        # The first request of the renewal is on its way when uWSGI forks.
        if sandbox.counters.token_requests:
            go.touch()
        return accepts(port) and b"spawned uWSGI worker 2" in log.read_bytes()

    environment = os.environ | settings | PATH | {"D1_TEST_GO": str(go)}
    with running(command, env=environment, log=log, ready=ready) as process:
        yield f"http://127.0.0.1:{port}/"
        process.terminate()
        process.wait(timeout=20)
        assert "Traceback" not in log.read_text()


def test_uwsgi_without_a_word_to_python(
    member_settings: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    del member_settings["REDIS_URL"]
    sandbox.misbehave(Fault.DELAY, seconds=60.0, times=1)
    with uwsgi(member_settings, tmp_path / "log", sandbox) as url:
        # Nobody waits for the parent's renewal, which has 30 seconds.
        assert requests.get(url, timeout=20).status_code == 200
        assert set(calls(url, 40, threads=4)) == {200}
    assert sandbox.counters.token_requests <= 3


def test_uwsgi_with_threads_and_its_hooks(
    member_settings: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    options = ["--threads", "4", "--py-call-uwsgi-fork-hooks"]
    with uwsgi(member_settings, tmp_path / "log", sandbox, *options) as url:
        assert set(calls(url, 80, threads=8)) == {200}
        sandbox.revoke_tokens()
        assert set(calls(url, 80, threads=8)) == {200}
    assert sandbox.counters.token_requests <= 4


# -- gevent ---------------------------------------------------------------------------------------


def test_fifty_greenlets_of_a_program_that_patches_first(
    member_settings: dict[str, str], sandbox: Sandbox
) -> None:
    sandbox.set_token_lifetime(6.0)
    sandbox.misbehave(Fault.DELAY, seconds=3.0, times=1)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.token.fleet.greenlets"],
        env=os.environ | member_settings | PATH,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=True,
    )
    answer = json.loads(ran.stdout)
    assert (answer["cold"], answer["tokens"]) == (1, 2)
    assert answer["statuses"] == [200] * 20
    # While D1 took its time, the others went on.
    assert answer["stall"] < 2.0
    assert sandbox.counters.token_requests == 2


@contextmanager
def gevent_workers(settings: dict[str, str], log: Path, *options: str) -> Iterator[str]:
    port = free_port()
    command = [str(BIN / "gunicorn"), "-k", "gevent", "--workers", "2", *options]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "gunicorn_app:application"]
    with served(command, settings, log, lambda: accepts(port)):
        yield f"http://127.0.0.1:{port}/"


@pytest.mark.parametrize("preload", [True, False])
def test_gunicorn_with_gevent(
    member_settings: dict[str, str], sandbox: Sandbox, tmp_path: Path, *, preload: bool
) -> None:
    options = []
    if preload:
        config = tmp_path / "first.py"
        config.write_text("from gevent import monkey\n\nmonkey.patch_all()\n")
        options = ["--config", str(config), "--preload"]
    with gevent_workers(member_settings, tmp_path / "log", *options) as url:
        assert set(calls(url, 160, threads=16)) == {200}
        assert sandbox.counters.token_requests == 1
        sandbox.revoke_tokens()
        assert set(calls(url, 160, threads=16)) == {200}
        assert sandbox.counters.token_requests <= 4


def test_gunicorn_that_would_patch_too_late_says_so_at_its_start(
    member_settings: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="did not start"),
        gevent_workers(member_settings, log, "--preload"),
    ):
        pass
    assert "Patched too late: gunicorn's gevent workers replace the ssl module" in log.read_text()
    assert "monkey.patch_all()" in log.read_text()


PATCHED_LATE = """
from d1_signer import ConfigurationError
from fleet_fetcher import new_fetcher

fetcher = new_fetcher()
{before}
from gevent import monkey
monkey.patch_all()
try:
    {asked}
except ConfigurationError as error:
    print(error)
"""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ("", "fetcher.token()"),
        ("", "fetcher.prefetch()"),
        ("", "fetcher.ssl_context"),
        ("", "new_fetcher()"),
        ("fetcher.token(); session = fetcher.session()", 'session.get("https://127.0.0.1:1/")'),
    ],
)
def test_a_program_that_patches_too_late_is_told(
    member_settings: dict[str, str], before: str, asked: str
) -> None:
    code = PATCHED_LATE.replace("{before}", before).replace("{asked}", asked)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | member_settings | PATH,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert "Patched too late: gevent" in ran.stdout, ran.stdout + ran.stderr
    assert "monkey.patch_all()" in ran.stdout

# SPDX-License-Identifier: Apache-2.0
"""`d1-signer sandbox -- COMMAND`, `softhsm -- COMMAND`, and the script `softhsm/with-token`."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from d1_signer import generate_key
from tests.cli.conftest import COMMAND, Result, Run, run_process

ROOT = Path(__file__).parents[2]
SANDBOX = (*COMMAND, "sandbox", "--")
SOFTHSM = (*COMMAND, "softhsm", "--")
WITH_TOKEN = (str(ROOT / "softhsm" / "with-token"),)
ALL = pytest.mark.parametrize(
    "before", [SANDBOX, SOFTHSM, WITH_TOKEN], ids=["sandbox", "softhsm", "with-token"]
)
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
# Tells that it is there, then each signal that it gets; ends with status 3 at the last one.
LISTEN = """
import os, signal, sys, time
def tell(number, frame):
    os.write(1, (signal.Signals(number).name + "\\n").encode())
    if number == signal.SIGTERM:
        os._exit(3)
for number in (1, 2, 3, 10, 12, 15):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, tell)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""
# Becomes the rest of its arguments, ignoring no signal: the tests may run in the background, where
# interrupts are ignored.
ATTENTIVE = """
import os, signal, sys
for number in (1, 2, 3, 10, 12, 15):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Makes standard input the terminal of its session first.
AT_TERMINAL = f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{ATTENTIVE}"


def ran(*command: str, **variables: str) -> Result:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, **variables},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def environment_of(*arguments: str, **variables: str) -> dict[str, Any]:
    shown = ran(*COMMAND, *arguments, "--", sys.executable, "-c", SHOW, **variables)
    assert shown.status == 0, shown.err
    return dict(json.loads(shown.out))


@contextmanager
def listening(
    *before: str, session: bool = False, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", ATTENTIVE, *before, sys.executable, "-c", LISTEN],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        start_new_session=session,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


@ALL
def test_status_and_output_are_the_commands_and_nothing_remains(
    before: tuple[str, ...], tmp_path: Path
) -> None:
    script = "cat; echo out; echo err >&2; exit 7"
    done = subprocess.run(
        [*before, "sh", "-c", script],
        input="in\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\nout\n", "err\n")
    assert list(tmp_path.iterdir()) == []


@ALL
@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        (["/none/such"], 127, "/none/such cannot be run: No such file"),
        (["/"], 126, "/ cannot be run: Permission denied"),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL, ""),
    ],
)
def test_how_it_ends_as_shells_have_it(
    before: tuple[str, ...], tmp_path: Path, command: list[str], status: int, told: str
) -> None:
    result = ran(*before, *command, TMPDIR=str(tmp_path))
    assert result.status == status
    assert told in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@ALL
def test_without_standard_error_the_status_tells(before: tuple[str, ...]) -> None:
    script = 'unset PYTHONUNBUFFERED; exec 2>&-; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *before, "/none/such"], check=False, timeout=50
    )
    assert done.returncode == 127


@ALL
def test_signals_are_passed_on_once_and_the_end_is_awaited(
    before: tuple[str, ...], tmp_path: Path
) -> None:
    with listening(*before, session=True, TMPDIR=str(tmp_path)) as process:
        for number in (1, 2, 3, 10, 12):
            process.send_signal(number)
            assert next_line(process) == signal.Signals(number).name
        assert list(tmp_path.iterdir())
        process.terminate()
        assert next_line(process) == "SIGTERM"
        assert process.wait(timeout=30) == 3
        assert next_line(process) == ""
    assert list(tmp_path.iterdir()) == []


@ALL
def test_a_signal_that_is_ignored_stays_so(before: tuple[str, ...], tmp_path: Path) -> None:
    with listening("nohup", *before, session=True, TMPDIR=str(tmp_path)) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert next_line(process) == "SIGUSR1"
        process.terminate()
        assert process.wait(timeout=30) == 3


@ALL
def test_the_terminals_interrupt_arrives_once(before: tuple[str, ...], tmp_path: Path) -> None:
    """The terminal sends it to all in its foreground: passing it on would make it two."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL, *before, sys.executable, "-c", LISTEN],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        shown = b""

        def read_until(text: bytes) -> None:
            nonlocal shown
            while text not in shown:
                assert select.select([ours], [], [], 30)[0]
                shown += os.read(ours, 4096)

        read_until(b"ready")
        os.write(ours, b"\x03")
        read_until(b"SIGINT")
        process.send_signal(signal.SIGUSR1)  # passed on after whatever the interrupt was
        read_until(b"SIGUSR1")
        process.terminate()
        read_until(b"SIGTERM")
        assert process.wait(timeout=30) == 3
    os.close(ours)
    assert shown.count(b"SIGINT") == 1
    assert list(tmp_path.iterdir()) == []


@ALL
def test_a_signal_before_the_command_starts_leaves_nothing(
    before: tuple[str, ...], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ATTENTIVE, *before, "sleep", "60"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            pass
        process.terminate()  # while it is made, or the command has just started
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_the_sandbox_gives_a_command_all_that_a_token_needs(tmp_path: Path) -> None:
    token = ran(*SANDBOX, *COMMAND, "token", "--json", TMPDIR=str(tmp_path))
    assert token.status == 0, token.err
    assert json.loads(token.out)["token_type"] == "Bearer"
    check = ran(*SANDBOX, *COMMAND, "check")
    assert check.out.endswith("All steps passed.\n")


def test_the_commands_environment_has_the_sandboxs_settings_alone() -> None:
    stale = {"D1_CLIENT_CERT": "/none/a", "D1_CLIENT_KEY": "/none/b", "D1_CA_FILE": "/none/c"}
    options = {"D1_SIGNER_OPTIONS": "locking=lock", "D1_ENVIRONMENT": "production"}
    given = environment_of("sandbox", **stale, **options)
    assert given["D1_ENVIRONMENT"].startswith("https://127.0.0.1:")
    assert given["D1_SIGNER_KEY"].startswith("file:///")
    assert "D1_SIGNER_OPTIONS" not in given
    assert not {given[name] for name in stale} & {*stale.values()}
    plain = environment_of("sandbox", "--http", **stale)
    assert plain["D1_ENVIRONMENT"].startswith("http://127.0.0.1:")
    assert not stale.keys() & plain.keys()


def test_keys_that_are_given_are_the_commands_too(other_uri: str, tmp_path: Path) -> None:
    passphrase = tmp_path / "a b"
    passphrase.touch(mode=0o600)
    passphrase.write_text("for a key in a test")
    option = f"passphrase_source=file:{passphrase}"
    uri = generate_key((tmp_path / "k").as_uri(), passphrase_source=f"file:{passphrase}").uri
    flags = ("--key", uri, "--kid", "other", "--option", option)
    named = environment_of("sandbox", *flags, D1_SIGNER_KEY=other_uri)
    assert (named["D1_SIGNER_KEY"], named["D1_SIGNER_KID"]) == (uri, "other")
    assert shlex.split(named["D1_SIGNER_OPTIONS"]) == [option]


def test_no_key_is_made_where_one_is_registered(key_uri: str, tmp_path: Path) -> None:
    pem = tmp_path / "public.pem"
    run_process("public-key", "--key", key_uri, "-o", str(pem))
    registered = environment_of("sandbox", "--register", f"k={pem}", D1_SIGNER_KID="k")
    assert "D1_SIGNER_KEY" not in registered
    assert registered["D1_SIGNER_KID"] == "k"


def test_one_key_in_softhsm_for_a_command_in_the_sandbox() -> None:
    program = shlex.join(COMMAND)
    script = f"{program} generate-key >&2 && {program} sandbox -- {program} token --json"
    result = ran(*SOFTHSM, "sh", "-c", script)
    assert result.status == 0, result.err
    assert json.loads(result.out)["token_type"] == "Bearer"


def test_a_token_that_stays(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    told = run_process("softhsm", "--folder", str(folder), "--label", "a b", "--object", "k 1")
    assert told.status == 0, told.err
    words = [shlex.split(line) for line in told.out.splitlines()]
    variables = dict(word[1].split("=", 1) for word in words)
    assert variables["D1_SIGNER_KEY"].startswith("pkcs11:token=a%20b;object=k%201?")
    assert run_process("generate-key", **variables).status == 0
    assert run_process("custody", **variables).status == 0
    again = run_process("softhsm", "--folder", str(folder), "--json", "--", "true")
    assert (again.status, again.document["code"]) == (2, "configuration")
    assert "is not empty" in again.document["message"]


@pytest.mark.parametrize("name", ["sandbox", "softhsm"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--"], "No COMMAND is given"),
        (["true"], "Write -- before COMMAND"),
        (["-x", "--", "a"], "-x"),
    ],
)
def test_wrong_usage(run: Run, name: str, arguments: list[str], told: str) -> None:
    result = run(name, *arguments)
    assert (result.status, result.out) == (2, "")
    assert told in result.err
    assert "[OPTIONS] [-- COMMAND...]" in result.err


def test_softhsm_alone_is_wrong_usage(run: Run) -> None:
    assert "--folder DIR" in run("softhsm").err


@pytest.mark.parametrize(
    ("variables", "told"),
    [({"PATH": "/none"}, "apt-get install softhsm2"), ({"SOFTHSM2_MODULE": "/none/x.so"}, "/none")],
)
def test_where_softhsm_is_not_installed(run: Run, variables: dict[str, str], told: str) -> None:
    result = run("softhsm", "--json", "--", "true", **variables)
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert told in result.document["message"] + result.document["hint"]


def test_a_label_that_softhsm_refuses(run: Run, tmp_path: Path) -> None:
    result = run("softhsm", "--json", "--label", "x" * 33, "--folder", str(tmp_path / "token"))
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert "softhsm2-util failed" in result.document["message"]


@pytest.mark.parametrize("name", ["50%41 of it", "a,b+c;d&e?f", 'ключ "x"'])
def test_a_token_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    program = f"{sys.executable} -m d1_signer.cli"
    script = f"{program} generate-key --json && {program} public-key"
    result = ran(*SOFTHSM, "sh", "-c", script, TMPDIR=str(folder))
    assert result.status == 0, result.err
    made = json.loads(result.out.splitlines()[0])["uri"].partition("#")[0]
    pin_source = made.rpartition("pin-source=file:")[2]
    assert unquote(unquote(pin_source)).startswith(f"{folder}/")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", [b"a#b", b"a=b", b"a\nb", b"\xff"])
def test_a_folder_that_softhsm_would_read_as_another_one(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / os.fsdecode(name)
    result = run_process("softhsm", "--json", "--folder", str(folder))
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert "takes no '#'" in result.document["message"]
    assert not folder.exists()

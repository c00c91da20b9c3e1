# SPDX-License-Identifier: Apache-2.0
"""How the process behaves: entry point, exit statuses, prompts, pipes, and what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import d1_signer
import d1_signer.cli._looking
from d1_signer import generate_key
from d1_signer.sandbox import Sandbox
from tests.cli.conftest import COMMAND, Run, run_onto
from tests.leaks.known import known

PASSPHRASE = known("never to be seen")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )


def test_console_script() -> None:
    script = Path(sys.executable).with_name("d1-signer")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("d1-signer ")


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d1_signer", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"d1-signer {d1_signer.__version__}\n"


def test_without_click_the_extra_is_named() -> None:
    done = python(
        "import sys; sys.modules['click'] = None\n"
        "from d1_signer.cli import main\n"
        "sys.exit(main(['token']))"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "Error: The package click is not installed. "
        'Install it with: pip install "d1-signer[cli]".\n'
    )


def test_without_the_sandbox_extra_the_others_work(key_uri: str) -> None:
    done = python(
        "import sys; sys.modules['aiohttp'] = None\n"
        "from d1_signer.cli import main\n"
        f"print(main(['custody', '--key', {key_uri!r}]))\n"
        "print(main(['sandbox']))"
    )
    assert "\n0\n" in done.stdout
    assert done.stdout.endswith("\n2\n")
    assert 'pip install "d1-signer[sandbox]"' in done.stderr


def test_no_sdk_is_loaded_for_a_pem_key(key_uri: str) -> None:
    done = python(
        "import sys\n"
        "from d1_signer.cli import main\n"
        f"main(['custody', '--key', {key_uri!r}])\n"
        "sdks = {'aiohttp', 'boto3', 'google', 'hvac', 'joserfc', 'pkcs11'}\n"
        "print(sorted(sdks & {*sys.modules}))"
    )
    assert done.stdout.endswith("[]\n")


def test_usage_errors(run: Run) -> None:
    nothing = run()
    assert nothing.status == 2
    assert "Usage: d1-signer" in nothing.err
    assert "\n\nStart with: d1-signer demo\n" in nothing.err
    assert "Missing command" in nothing.err
    unknown = run("unknown")
    assert unknown.status == 2
    assert "No such command" in unknown.err
    machine = run("token", "--unknown", "--json")
    assert machine.status == 2
    assert machine.err == ""
    assert machine.document["code"] == "usage"


def test_output_options_before_the_command(run: Run, key_uri: str) -> None:
    result = run("--json", "-v", "custody", "--key", key_uri)
    assert result.status == 0
    assert result.document["keys"][0]["kid"] == "bank-2026"


def test_a_defect_is_one_line_and_shows_no_values(
    run: Run, key_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_report: object) -> str:
        secret = PASSPHRASE
        raise LookupError(secret)

    monkeypatch.setattr(d1_signer.cli._looking, "key_text", broken)
    result = run("custody", "--key", key_uri)
    assert result.status == 1
    assert result.err.startswith("Error: Unexpected LookupError; this is a defect of d1-signer.\n")
    assert "-vv" in result.err
    detailed = run("custody", "--key", key_uri, "-vv")
    assert "in broken" in detailed.err
    assert PASSPHRASE not in result.err + detailed.err


@pytest.mark.parametrize("command", ["custody", "help", "version", "completion"])
def test_a_reader_that_goes_away(key_uri: str, command: str) -> None:
    arguments, variables = {
        "custody": (["custody", "--key", key_uri], {}),
        "help": (["check", "--help"], {}),
        "version": (["--version"], {}),
        "completion": ([], {"_D1_SIGNER_COMPLETE": "bash_source"}),
    }[command]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = run_onto(pipe, *arguments, **variables)
    assert (done.status, done.err) == (1, "")


class AtTerminal:
    """A command whose standard input and error are a terminal that we type on."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env={**os.environ, **variables},
            start_new_session=True,  # or getpass would ask on the terminal of who runs the tests
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in self.shown:
            assert select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]
            self.shown += os.read(self._ours, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        # Python acts on a signal that comes just before the read only when the line has been read:
        # whoever sits there presses Ctrl-C again.
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        with self.process:
            try:
                out, _ = self.process.communicate(timeout=20)
            finally:
                self.process.kill()
        while True:
            try:
                chunk = os.read(self._ours, 4096)
            except OSError:  # the end of a terminal's output on Linux
                chunk = b""
            if not chunk:
                break
            self.shown += chunk.decode()
        os.close(self._ours)
        return self.process.returncode, out


@pytest.fixture
def encrypted_uri(tmp_path: Path) -> str:
    uri = (tmp_path / "key.pem").as_uri()
    generate_key(uri, passphrase_source=lambda: PASSPHRASE)
    return uri + "?passphrase-source=prompt"


def test_prompt_without_echo(encrypted_uri: str) -> None:
    terminal = AtTerminal("public-key", "--key", encrypted_uri)
    path = encrypted_uri.removeprefix("file://").partition("?")[0]
    terminal.wait_for(f"passphrase for {path}: ")
    terminal.type(PASSPHRASE + "\n")
    status, out = terminal.end()
    assert status == 0, terminal.shown
    assert out.startswith("-----BEGIN PUBLIC KEY-----")
    assert PASSPHRASE not in out + terminal.shown


def test_the_client_keys_passphrase_is_asked_for_once(
    sandbox: Sandbox, settings: dict[str, str], other_uri: str
) -> None:
    certificate, key = sandbox.issue_client_certificate(passphrase=PASSPHRASE.encode())
    settings |= {"D1_CLIENT_CERT": str(certificate), "D1_CLIENT_KEY": str(key)}
    settings["D1_SIGNER_KEY"] += f" {other_uri}"
    flag = ("--client-key-passphrase-source", "prompt")
    terminal = AtTerminal("check", "--json", *flag, **settings)
    terminal.wait_for(f"client key's passphrase for {key}: ")
    terminal.type(PASSPHRASE + "\n")
    _, out = terminal.end()
    assert terminal.shown.count("passphrase") == 1
    tokens = [step for step in json.loads(out)["steps"] if step["step"] == "access-token"]
    assert [step["status"] for step in tokens] == ["ok", "failed"]  # D1 knows the first key only
    assert sandbox.counters.token_requests == 3


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("token", "D1_ISSUER_ID"),
        ("token", "D1_ENVIRONMENT"),
        ("token", "D1_CLIENT_KEY"),
        ("assertion", "D1_ISSUER_ID"),
        ("assertion", "D1_ENVIRONMENT"),
    ],
)
def test_nobody_is_asked_where_a_setting_is_missing(
    settings: dict[str, str], encrypted_uri: str, command: str, missing: str
) -> None:
    settings["D1_SIGNER_KEY"] = encrypted_uri
    del settings[missing]
    terminal = AtTerminal(command, "--json", **settings)
    status, out = terminal.end()
    assert (status, terminal.shown) == (2, "")
    assert missing in json.loads(out)["hint"]


def test_interrupt_at_the_prompt(encrypted_uri: str) -> None:
    # A shell starts what it puts into the background, this suite perhaps, with the signal ignored,
    # and that is inherited; what has a handler here is a default there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        terminal = AtTerminal("public-key", "--key", encrypted_uri)
    finally:
        signal.signal(signal.SIGINT, before)
    terminal.wait_for(".pem: ")
    terminal.interrupt()
    status, out = terminal.end()
    assert status == 130
    assert out == ""
    assert "Traceback" not in terminal.shown


def test_prompt_needs_a_terminal(run: Run, encrypted_uri: str) -> None:
    result = run("custody", "--json", "--key", encrypted_uri)
    assert result.status == 2
    assert result.document["code"] == "secret_source"


def test_passphrase_by_environment_and_file(run: Run, encrypted_uri: str, tmp_path: Path) -> None:
    base = encrypted_uri.removesuffix("prompt")
    file = tmp_path / "passphrase"
    file.touch(mode=0o600)
    file.write_text(PASSPHRASE + "\n")
    for source in ("env:KEY_PASSPHRASE", f"file:{file}"):
        result = run("check", "-vv", "--key", base + source, KEY_PASSPHRASE=PASSPHRASE)
        assert result.status == 0
        assert PASSPHRASE not in result.out + result.err
    file.chmod(0o644)
    assert run("custody", "--key", base + f"file:{file}", "--json").status == 2

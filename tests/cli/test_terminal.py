# SPDX-License-Identifier: Apache-2.0
"""What commands look like on a terminal, of 60, 80 and 120 columns, with colours and without."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from d1_signer.cli._terminal import laid_out
from d1_signer.testing import make_softhsm_token
from tests.cli.conftest import COMMAND, Result

WIDTHS = pytest.mark.parametrize("columns", [60, 80, 120])
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
COLOURS = {"NO_COLOR": "", "TERM": "xterm-256color"}
COLOURLESS = pytest.mark.parametrize(
    "setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"]
)


def at_terminal(columns: int, *arguments: str, **variables: str) -> Result:
    """Run a command with a terminal as its output; `out` is all that it shows."""
    return run_at_terminal(columns, [*COMMAND, *arguments], **variables)


def run_at_terminal(columns: int, command: list[str], **variables: str) -> Result:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, **COLOURS, **variables},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the end of a terminal's output on Linux
                break
            if not chunk:
                break
            shown += chunk
        status = process.wait(timeout=30)
    os.close(ours)
    assert b"Traceback" not in shown
    return Result(status, shown.decode().replace("\r\n", "\n"), "")


def require_fit(shown: str, columns: int) -> None:
    """No line is longer than the terminal is wide, unless it is one word at the left edge."""
    long = [line for line in ESCAPE.sub("", shown).splitlines() if len(line) > columns]
    assert [line for line in long if re.search(r"\s", line)] == []


def require_words(shown: str, told: str) -> None:
    """All words are there, in their order, and none is broken."""
    assert ESCAPE.sub("", shown).split() == told.split()


def piped(*arguments: str, **variables: str) -> Result:
    """Run a command whose output is no terminal; its time limit is for a loaded machine."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, **variables},
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a token with a key in it."""
    token = make_softhsm_token(tmp_path_factory.mktemp("hsm"))
    variables = {"SOFTHSM2_CONF": str(token.configuration), "D1_SIGNER_KEY": token.uri}
    assert piped("generate-key", **variables).status == 0
    return {**variables, "D1_SIGNER_KEY": f"{token.uri}#bank-2026"}


@pytest.fixture(scope="module")
def piped_check(hsm: dict[str, str]) -> Result:
    return piped(*CHECK, **hsm)


@pytest.fixture(scope="module")
def piped_custody(hsm: dict[str, str]) -> Result:
    return piped("custody", **hsm)


# A failed step, a skipped one and those that are ok; nothing of it depends on the time.
CHECK = ("check", "--environment", "https://127.0.0.1:1/authz", "--issuer-id", "bank")


@WIDTHS
def test_check(hsm: dict[str, str], piped_check: Result, columns: int) -> None:
    shown = at_terminal(columns, *CHECK, **hsm)
    assert shown.status == piped_check.status == 1
    require_fit(shown.out, columns)
    without_ids = re.compile(r"check-[0-9a-f]{16}")
    require_words(without_ids.sub("ID", shown.out), without_ids.sub("ID", piped_check.out))
    words = {"32": "ok", "1;31": "failed", "2": "skipped"}
    for code, word in words.items():
        assert re.search(rf"^  \x1b\[{code}m{word}\x1b\[0m  ", shown.out, re.MULTILINE)
    # Groups have a blank line between them, in a terminal only.
    assert "\n\n\x1b[1mD1 https://127.0.0.1:1/authz\x1b[0m\n" in shown.out
    assert "\nD1 https://127.0.0.1:1/authz\n" in piped_check.out
    assert "\n\nD1 https" not in piped_check.out
    if columns == 60:  # what does not fit goes on below its column
        assert f"\n{' ' * 31}" in shown.out


@COLOURLESS
def test_without_colours_the_words_tell(hsm: dict[str, str], setting: dict[str, str]) -> None:
    shown = at_terminal(80, *CHECK, **hsm, **setting)
    assert "\x1b" not in shown.out
    assert re.search(r"^  ok       login ", shown.out, re.MULTILINE)
    assert re.search(r"^  skipped  client-certificate ", shown.out, re.MULTILINE)
    assert re.search(r"^  failed   endpoint ", shown.out, re.MULTILINE)
    require_fit(shown.out, 80)


@WIDTHS
def test_custody(hsm: dict[str, str], piped_custody: Result, columns: int) -> None:
    shown = at_terminal(columns, "custody", **hsm)
    require_fit(shown.out, columns)
    without_time = re.compile(r"Collected .*")
    told = without_time.sub("", piped_custody.out)
    require_words(without_time.sub("", shown.out), told)
    assert max(map(len, told.splitlines())) > 150  # the flags of the token
    # A key URI is copied from the terminal as one word, however narrow that is.
    assert re.search(
        r"^ *(Location +)?pkcs11:token=\S+;object=d1;id=\S{24}$", shown.out, re.MULTILINE
    )


@WIDTHS
def test_a_log_fits_and_stands_back(hsm: dict[str, str], columns: int) -> None:
    shown = at_terminal(columns, "check", "-vv", **hsm)
    require_fit(shown.out, columns)
    logged = re.findall(r"^\x1b\[2m[0-9-]{10} [0-9:,]{12} (\w+)", shown.out, re.MULTILINE)
    assert set(logged) == {"DEBUG", "INFO"}
    words = set(ESCAPE.sub("", shown.out).split())
    assert {"step.ended", "pkcs11.initialized", "d1_signer.backends.pkcs11.module.life"} <= words
    piped_log = piped("check", "-vv", **hsm).err.splitlines()
    assert len(piped_log) == len(logged)  # a line for each, as long as it is
    assert "\x1b" not in "".join(piped_log)


@WIDTHS
def test_wrong_usage(columns: int) -> None:
    shown = at_terminal(columns, "check", "--request-format", "neither-of-them-but-a-long-word")
    require_fit(shown.out, columns)
    assert shown.status == 2
    told = piped("check", "--request-format", "neither-of-them-but-a-long-word").err
    require_words(shown.out, told)
    assert told.startswith(
        "Usage: d1-signer check [OPTIONS]\nTry 'd1-signer check --help' for help.\n"
    )
    assert "\n\nError: Invalid value for '--request-format'" in told
    assert "\n\n\x1b[1;31mError:\x1b[0m Invalid value for" in shown.out


@WIDTHS
@pytest.mark.parametrize("setting", [{}, {"NO_COLOR": "1"}], ids=["colours", "none"])
def test_records_fill_the_lines(
    tmp_path: Path, key_uri: str, columns: int, setting: dict[str, str]
) -> None:
    trail = tmp_path / "trail"
    variables = {"D1_AUDIT_TRAIL": str(trail), "D1_AUDIT_ORIGIN": "bank.example/d1"}
    assert piped("public-key", "--key", key_uri, **variables).status == 0
    shown = at_terminal(columns, "audit", "show", str(trail), **setting)
    require_fit(shown.out, columns)
    told = piped("audit", "show", str(trail))
    require_words(shown.out, told.out + told.err)
    fewest = sum(len(line) for line in told.out.splitlines()) / columns
    assert len(shown.out.splitlines()) < 2 * fewest + len(told.out.splitlines())


@WIDTHS
@pytest.mark.parametrize("setting", [{}, {"NO_COLOR": "1"}], ids=["colours", "none"])
@pytest.mark.parametrize("command", ["demo", "token"])
def test_other_commands(command: str, columns: int, setting: dict[str, str]) -> None:
    shown = at_terminal(columns, command, **setting)
    require_fit(shown.out, columns)
    assert ("\x1b[" in shown.out) == (not setting)
    if command == "token":
        told = ESCAPE.sub("", shown.out).splitlines()
        assert (shown.status, told[0]) == (2, "Error: No key is given.")


def test_what_is_to_be_copied_stays_as_it_is(tmp_path: str, key_uri: str) -> None:
    folder = f"{tmp_path}/{'long' * 20}"
    told = at_terminal(60, "softhsm", "--folder", folder).out
    assert re.search(r"^export D1_SIGNER_KEY='pkcs11:\S{100,}'$", told, re.MULTILINE)
    assert "\x1b" not in told
    key = at_terminal(60, "public-key", "--key", key_uri).out
    assert key == piped("public-key", "--key", key_uri).out
    assertion = ("assertion", "--show-assertion", "--no-audience", "--issuer-id", "bank")
    shown = at_terminal(60, *assertion, "--key", key_uri).out.splitlines()
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", shown[-1])


@pytest.mark.parametrize(
    "setting",
    [{"COLUMNS": "60", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}, {"COLUMNS": "200"}],
    ids=["narrow", "wide"],
)
def test_a_pipe_gets_the_same_whatever_is_set(
    hsm: dict[str, str], piped_check: Result, setting: dict[str, str]
) -> None:
    def without_ids(told: Result) -> str:
        return re.sub(r"check-[0-9a-f]{16}", "", told.out + told.err)

    told = without_ids(piped(*CHECK, **hsm, **setting))
    assert "\x1b" not in told
    assert told == without_ids(piped_check)


@WIDTHS
@pytest.mark.parametrize("command", ["", "audit", "check", "sandbox", "audit verify"])
def test_help_fits(command: str, columns: int) -> None:
    arguments = (*command.split(), "--help")
    shown = at_terminal(columns, *arguments)
    require_fit(shown.out, columns)
    assert "\x1b" not in shown.out
    # What is told has more than half of a line, and the name of a variable is not torn off.
    told = re.findall(r"^ {3,}\S", shown.out, re.MULTILINE)
    assert max(map(len, told), default=0) <= columns / 2
    assert not re.search(r"env( var:)?$", shown.out, re.MULTILINE)
    # A name of a fault or of a step is broken at none of its hyphens, and nothing is lost.
    assert not re.search(r"\w-$", shown.out, re.MULTILINE)
    assert "".join(shown.out.split()) == "".join(piped(*arguments).out.split())


@pytest.mark.parametrize("columns", [60, 100])
def test_what_a_command_does_is_told_whole(columns: int) -> None:
    commands = at_terminal(columns, "audit", "--help").out.partition("Commands:")[2]
    assert "..." not in commands
    assert "without showing another one." in " ".join(commands.split())


def test_columns_are_told_by_the_variable_too(key_uri: str) -> None:
    require_fit(at_terminal(200, "custody", "--key", key_uri, COLUMNS="60").out, 60)
    require_fit(at_terminal(0, "custody", "--key", key_uri).out, 80)


@pytest.mark.parametrize(
    ("line", "columns", "expected"),
    [
        ("", 10, [""]),
        ("fits in it", 10, ["fits in it"]),
        ("one two three", 10, ["one two", "  three"]),
        ("  in  deep words here", 16, ["  in  deep words", "      here"]),
        ("name  a value that wraps", 16, ["name  a value", "      that wraps"]),
        ("name  fifteen_letters", 20, ["name", "    fifteen_letters"]),
        ("Error: what went wrong", 16, ["Error: what went", "       wrong"]),
        ("uri:a=1;b=22222222?c=3&d=4", 16, ["uri:a=1;b=22222222?c=3&d=4"]),
        ("x  0123456789abcdef", 14, ["x", "0123456789abcdef"]),
        ("x  it 0123456789ab too", 14, ["x", "    it", "  0123456789ab", "    too"]),
        ("Error: it is /a/long/path: no", 14, ["Error: it is", " /a/long/path:", "       no"]),
        ("  x  日本語 日本語", 14, ["  x  日本語", "     日本語"]),
        # A detail keeps its name where both fit.
        ("  (code: b, of: 123456, c: d)", 20, ["  (code: b,", "    of: 123456,", "    c: d)"]),
        ("  (code: b, of: 12345678901234)", 18, ["  (code: b, of:", "   12345678901234)"]),
        ("1. What is told here", 14, ["1. What is", "   told here"]),
        # What does not fit of a table stands below it in columns again,
        ("NAME   KIDS  CERT  TOLD", 16, ["NAME   KIDS", "    CERT  TOLD"]),
        ("a:4    b     none  now", 16, ["a:4    b", "    none  now"]),
        # of a step below its name,
        (
            "  ok      key   the /word/that/is/long fits",
            26,
            ["  ok      key", "          the", "        /word/that/is/long", "          fits"],
        ),
        # and of a record where there is room.
        ("time  a#1  b=2  c=3  d=4  e=5", 16, ["time  a#1  b=2", "    c=3  d=4", "    e=5"]),
        ("日本語  日本語  日本語", 16, ["日本語  日本語", "    日本語"]),
        ("longer than a line  x", 12, ["longer than", "    a line", "    x"]),
    ],
)
def test_layout_of_a_line(line: str, columns: int, expected: list[str]) -> None:
    assert laid_out(line, columns) == expected


_LINES = """
from d1_signer.cli._output import Output
output = Output()
for line in (
    "Verdict           holds",
    "Verdict           DOES NOT HOLD",
    "All steps passed.",
    "All of it is foreign text, which has no colour",
    "  NOT SHOWN TO BE: hardware",
    "  FINDING  Record 3: [red]text[/red] of others",
    "ANSWER  BY WHOM",
):
    output.line(line)
"""


def test_what_is_coloured() -> None:
    shown = run_at_terminal(80, [sys.executable, "-c", _LINES]).out
    assert shown.splitlines() == [
        "\x1b[32mVerdict           holds\x1b[0m",
        "\x1b[1;31mVerdict           DOES NOT HOLD\x1b[0m",
        "\x1b[32mAll steps passed.\x1b[0m",
        "All of it is foreign text, which has no colour",
        "\x1b[1;31m  NOT SHOWN TO BE: hardware\x1b[0m",
        "  \x1b[1;31mFINDING\x1b[0m  Record 3: [red]text[/red] of others",
        "",
        "\x1b[1mANSWER  BY WHOM\x1b[0m",
    ]


_LONG_WORK = """
import sys, time
from d1_signer.cli._output import Output
end = time.monotonic() + float(sys.argv[1])
with Output().progress("Verifying", 1 << 40) as advance:
    while time.monotonic() < end:
        advance(1 << 20)
print("done")
"""


@pytest.mark.parametrize(("seconds", "shown"), [("1.5", True), ("0", False)])
def test_progress_is_shown_where_it_takes_long(seconds: str, *, shown: bool) -> None:
    told = run_at_terminal(80, [sys.executable, "-c", _LONG_WORK, seconds]).out
    assert ("Verifying" in told) == shown
    assert told.endswith("done\n")
    if shown:  # the line of the bar is empty again
        assert "%" in told
        assert told.removesuffix("done\n").endswith("\x1b[2K")


def test_a_pipe_gets_no_progress() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LONG_WORK, "1"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_rich_is_not_loaded_for_a_pipe(key_uri: str) -> None:
    code = (
        "import sys; from d1_signer.cli import main; "
        f"main(['custody', '--key', {key_uri!r}]); print('rich' in sys.modules)"
    )
    done = subprocess.run([COMMAND[0], "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")

# SPDX-License-Identifier: Apache-2.0
"""What a command line costs before it does anything: nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer.cli._app import _COMMANDS, cli
from tests.cli.conftest import Run

_HEAVY = {
    *("asn1crypto", "asyncio", "cryptography", "email", "http", "random", "requests", "rich"),
    *("secrets", "socket", "ssl", "tempfile", "urllib3"),
}
_RUN = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write("\\n" + json.dumps(sorted(sys.modules))))
from d1_signer.cli import main
sys.exit(main())
"""


def imported(*arguments: str, **variables: str) -> tuple[str, set[str]]:
    """What a command line prints, and the top-level modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    modules = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in _COMMANDS)]
)
def test_nothing_heavy_is_imported_for(arguments: list[str]) -> None:
    out, modules = imported(*arguments)
    assert out
    heavy = _HEAVY & modules
    if arguments[0] == "softhsm":  # its defaults are those of the module that makes tokens
        heavy -= {"random", "secrets", "tempfile"}
    assert not heavy


@pytest.mark.parametrize(
    ("words", "completed"),
    [("d1-signer to", "token"), ("d1-signer --js", "--json"), ("d1-signer check --req", "require")],
)
def test_nor_for_a_completion(words: str, completed: str) -> None:
    out, modules = imported(
        _D1_SIGNER_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert completed in out
    assert not _HEAVY & modules


def test_the_list_says_what_each_command_says() -> None:
    with cli.make_context("d1-signer", ["token"]) as context:
        for name, (_, _, does) in _COMMANDS.items():
            command = cli.get_command(context, name)
            assert command is not None
            assert (command.help or "").startswith(f"{does}\n")


def test_the_command_alone_lists_the_commands(run: Run) -> None:
    result = run()
    assert (result.status, result.out) == (2, "")
    told = " ".join(result.err.split())  # lines are wrapped
    for name, (_, _, does) in _COMMANDS.items():
        assert f"{name} {does}" in told
    assert run("--json").document["code"] == "usage"


# How often Python's own start, which takes 12 ms of CPU where the bar is 120 ms; and how often both
# are tried in turn, at least and at most.
_BAR, _RUNS, _MOST = 10, 12, 60


@pytest.mark.stress
@pytest.mark.alone
@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--version"], {}),
        (["--help"], {}),
        (["check", "--help"], {}),
        (["sandbox", "--help"], {}),
        (
            [],
            {
                "_D1_SIGNER_COMPLETE": "bash_complete",
                "COMP_WORDS": "d1-signer check --client-cert /et",
                "COMP_CWORD": "3",
            },
        ),
    ],
    ids=["version", "help", "help-of-check", "help-of-sandbox", "completion"],
)
def test_it_costs_little(arguments: list[str], variables: dict[str, str]) -> None:
    """The least of several runs: whatever else the machine does only adds to it."""
    command = [str(Path(sys.executable).with_name("d1-signer")), *arguments]
    costs, bare = [], []
    for run in range(_MOST):
        costs.append(_cpu(command, variables))
        bare.append(_cpu([sys.executable, "-c", "pass"], {}))
        if run >= _RUNS and min(costs) <= _BAR * min(bare):
            break
    assert min(costs) <= _BAR * min(bare), (costs, bare)


def _cpu(command: list[str], variables: dict[str, str]) -> float:
    """Seconds of CPU, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, **variables}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=60, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

# SPDX-License-Identifier: Apache-2.0
"""No crash, and nothing lost: handshakes of a signer's key that signals, threads and ends meet."""

from __future__ import annotations

import ast

import pytest

from tests.pkcs11.conftest import Run, run_python

__all__ = ["run_python"]

pytestmark = pytest.mark.stress


def disturbed(run: Run, name: str, number: int) -> dict[str, int]:
    ran = run(
        "import runpy, sys; sys.argv[0] = ''; "
        "runpy.run_module('tests.transport.in_memory', run_name='__main__')",
        name,
        str(number),
        timeout=240,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    told: dict[str, int] = ast.literal_eval(ran.stdout)
    return told


@pytest.mark.timeout(250)
@pytest.mark.parametrize("number", [800, pytest.param(30_000, marks=[pytest.mark.soak])])
def test_what_a_signals_handler_raises_anywhere(run_python: Run, number: int) -> None:
    ends = disturbed(run_python, "signals", number)
    assert set(ends) <= {"done", "disturbed"}
    assert ends["disturbed"] > number / 20


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=[pytest.mark.soak])])
@pytest.mark.timeout(120)
def test_contexts_that_come_and_go_while_others_are_renewed(run_python: Run, seconds: int) -> None:
    ends = disturbed(run_python, "threads", seconds)
    assert set(ends) == {"shared", "own", "circle", "renewed"}


def test_the_end_of_the_interpreter(run_python: Run) -> None:
    for _ in range(5):
        assert disturbed(run_python, "the_end", 0) == {}

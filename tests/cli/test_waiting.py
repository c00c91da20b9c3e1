# SPDX-License-Identifier: Apache-2.0
"""What a person is told while a command works: each step with ``-vv``, and what takes long."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from d1_signer import secret, signing
from d1_signer.cli import _waiting
from d1_signer.sandbox import Fault, Sandbox
from d1_signer.signing.steps import Step
from d1_signer.testing import SoftHsmToken
from tests.cli.conftest import Run, run_process
from tests.cli.test_process import AtTerminal
from tests.token.test_log_lines import pairs_of


def steps(log: str) -> dict[str, dict[str, str]]:
    """What each line of a step tells, by what was waited for."""
    lines = map(pairs_of, re.findall(r"step\.ended (.*)", log))
    return {line["what"]: line for line in lines}


def test_each_step_of_a_token_in_detail(
    run: Run, settings: dict[str, str], sandbox: Sandbox
) -> None:
    host = sandbox.base_url.split("/")[2]
    found = steps(run("token", "-vv", **settings).err)
    key = settings["D1_SIGNER_KEY"].partition("#")[0]
    opened = found[f"the key {key}"]
    assert opened["outcome"] == "done"
    assert (opened["kid"], opened["backend"], opened["plug_in"]) == ("bank-2026", "pem", "None")
    assert found["a signature of kid bank-2026"]["outcome"] == "done"
    connected = found[f"a connection to {host}"]
    assert re.fullmatch(r"\('127\.0\.0\.1', \d+\)", connected["peer"])
    assert connected["tls"] in {"TLSv1.2", "TLSv1.3"}
    assert float(connected["seconds"]) >= 0
    assert connected["cipher"]
    answered = found[f"the answer of {host}"]
    assert answered["status"] == "200"
    assert answered["correlation_id"]


def test_token_and_slot_of_an_hsm_in_detail(softhsm_token: SoftHsmToken) -> None:
    made = run_process("generate-key", "-vv", D1_SIGNER_KEY=softhsm_token.uri)
    assert made.status == 0
    shown = run_process("public-key", "-vv", D1_SIGNER_KEY=softhsm_token.uri).err
    (line, *_) = re.findall(r"pkcs11\.token_found (.*)", shown)
    assert pairs_of(line).keys() == {"token", "serial", "slot", "model"}
    assert pairs_of(line)["token"] == softhsm_token.label
    found = steps(shown)
    assert any(what.startswith("the PKCS#11 module /") for what in found)
    assert any(re.fullmatch(r"the login at token '[^']+', slot \d+", what) for what in found)
    assert softhsm_token.pin not in made.err + shown


def test_no_step_is_told_without_detail(run: Run, settings: dict[str, str]) -> None:
    assert "step.ended" not in run("token", "-v", **settings).err
    assert run("token", **settings).err == ""


def test_a_step_that_fails_tells_the_code(run: Run, settings: dict[str, str]) -> None:
    settings["D1_CA_FILE"] = settings["D1_CLIENT_CERT"]
    found = steps(run("token", "-vv", **settings).err)
    assert any(told["outcome"] != "done" for told in found.values())


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where connections are taken, and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_wait_is_told_on_a_terminal(
    settings: dict[str, str], silent: int, flags: tuple[str, ...]
) -> None:
    settings["D1_ENVIRONMENT"] = f"https://127.0.0.1:{silent}/authz/v1"
    terminal = AtTerminal("token", *flags, **settings)
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Waiting for .*$", page, re.MULTILINE)
    terminal.wait_for(re.sub(r" to \S+:\d+", f" to 127.0.0.1:{silent}", line))
    terminal.wait_for("4 s so far.")
    terminal.interrupt()
    assert terminal.end()[0] == 130


def test_a_wait_for_an_answer_and_for_the_next_attempt(
    settings: dict[str, str], sandbox: Sandbox
) -> None:
    host = sandbox.base_url.split("/")[2]
    sandbox.misbehave(Fault.STATUS_503, retry_after=8)
    terminal = AtTerminal("token", **settings)
    terminal.wait_for("Waiting for the end of a pause after token_unavailable: 2 s so far.")
    sandbox.misbehave(Fault.DELAY, seconds=9.0)
    terminal.wait_for(f"Waiting for the answer of {host}: 2 s so far.")
    terminal.interrupt()
    assert terminal.end()[0] == 130


def test_a_wait_is_not_told_where_nobody_asked(
    run: Run, settings: dict[str, str], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_waiting, "_PATIENCE", 0.1)
    monkeypatch.setattr(_waiting, "_LOOK", 0.02)
    sandbox.misbehave(Fault.DELAY, seconds=0.8)
    assert run("token", **settings).err == ""
    assert "Waiting for the answer of" in run("token", "-v", **settings).err


def test_a_person_who_is_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "_PATIENCE", 0.05)
    monkeypatch.setattr(_waiting, "_LOOK", 0.01)
    # Without steps of threads that other tests left.
    monkeypatch.setattr(signing.steps, "_under_way", {})
    told: list[str] = []
    heard = threading.Event()

    def tell(what: str, _: float) -> None:
        told.append(what)
        heard.set()

    with _waiting.telling_of_waits(tell), Step("a key"):
        secret.being_asked.set()
        assert not heard.wait(0.3)
        secret.being_asked.clear()
        assert heard.wait(20)
    assert set(told) == {"a key"}
    assert Step.innermost() is None


def test_attempts_are_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "_PATIENCE", 0.2)
    monkeypatch.setattr(_waiting, "_LOOK", 0.01)
    told: list[tuple[str, float]] = []
    heard = threading.Semaphore(0)

    def tell(what: str, seconds: float) -> None:
        told.append((what, seconds))
        heard.release()

    with _waiting.telling_of_waits(tell):
        while len(told) < 4:  # it is begun anew until it was told four times
            with Step("a connection"):
                assert heard.acquire(timeout=20)
            with Step("what takes no time"):
                pass
        with Step("an answer"):
            assert heard.acquire(timeout=20)
    assert [what for what, _ in told] == [*["a connection"] * 4, "an answer"]
    seconds = [seconds for _, seconds in told]
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(seconds[:4]))
    assert seconds[4] < seconds[3]


def test_what_began_last_is_what_is_waited_for() -> None:
    with Step("outer") as outer:
        with Step("inner") as inner:
            assert Step.innermost() is inner
            assert inner.began <= time.monotonic()
        assert Step.innermost() is outer


def test_the_child_of_a_fork_waits_for_nothing_that_its_parent_began() -> None:
    with Step("of the parent"):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if Step.innermost() is None else 1)
            finally:  # of what was raised; pytest must not go on here
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_how_many_attempts_were_made_is_told_where_there_were_several(
    run: Run, settings: dict[str, str], sandbox: Sandbox
) -> None:
    # Trouble, then a refusal: the error is that of the second attempt.
    settings["D1_ISSUER_ID"] = "somebody-else"
    assert "attempts were made" not in run("token", **settings).err
    sandbox.misbehave(Fault.STATUS_503, times=1)
    error = run("token", **settings).err
    assert "\n  2 attempts were made; this is what the last one met.\n" in error

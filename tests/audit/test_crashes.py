# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed while they sign: the device never signed more than was recorded."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from d1_signer.audit import folder
from d1_signer.testing import SoftHsmToken
from tests.audit.trails import records, verified
from tests.pkcs11.shim import Call, Shim


def kill_once(place: Path, token: SoftHsmToken, shim: Shim, chance: random.Random) -> None:
    command = [sys.executable, "-m", "tests.audit.signing_process"]
    with subprocess.Popen(
        [*command, str(place), token.uri, shim.path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        enough = shim.calls(Call.SIGN) + chance.randint(1, 120)
        until = time.monotonic() + 60
        while shim.calls(Call.SIGN) < enough and process.poll() is None:
            assert time.monotonic() < until
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def run(place: Path, token: SoftHsmToken, shim: Shim, kills: int) -> None:
    chance = random.Random(kills)
    for number in range(kills):
        kill_once(place, token, shim, chance)
        told = records(place) if number % 20 == 19 or number == kills - 1 else None
        if told is not None:
            begun = Counter(r["action"] for r in told if r["event"] == "begin")
            # Opening a key tries a signature.
            assert shim.calls(Call.SIGN) <= begun["sign"] + begun["open"]
            done = sum(r["event"] == "end" and r["outcome"] == "done" for r in told)
            assert done <= shim.calls(Call.SIGN) + begun["open"]
    reports = verified(place)
    assert [report.findings for report in reports] == [[]] * len(reports)
    assert len(folder.instances(place)) == 1, "an idle instance is used again"
    assert reports[0].unfinished <= 10 * kills
    assert reports[0].records > 20 * kills


@pytest.mark.stress
def test_processes_that_are_killed(tmp_path: Path, token: SoftHsmToken, shim: Shim) -> None:
    run(tmp_path / "trail", token, shim, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_of_them(tmp_path: Path, token: SoftHsmToken, shim: Shim) -> None:
    run(tmp_path / "trail", token, shim, 200)

# SPDX-License-Identifier: Apache-2.0
"""`d1-signer demo`, which `make demo` runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Result

ROOT = Path(__file__).parents[2]


def demo(tmp_path: Path, *options: str, **variables: str) -> Result:
    done = subprocess.run(
        [*COMMAND, "demo", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "TMPDIR": str(tmp_path), **variables},
    )
    assert list(tmp_path.iterdir()) == []
    return Result(done.returncode, done.stdout, done.stderr)


def test_in_softhsm(tmp_path: Path) -> None:
    # What is set for a real HSM is not for the demo.
    shown = demo(tmp_path, D1_CUSTODY_POLICY="hardware", D1_SIGNER_KEY="pkcs11:token=real")
    assert shown.status == 0, shown.out + shown.err
    assert shown.err == ""
    for fact in ("CKA_LOCAL +yes", "CKA_SENSITIVE +yes", "CKA_EXTRACTABLE +no"):
        assert re.search(fact, shown.out)
    for text in ('"alg": "ES256"', '"kid": "demo-2026"', "claim iss", "claim exp", "claim jti"):
        assert text in shown.out
    assert "d1-api:account:full d1-api:consumer:read" in shown.out
    assert re.search(r"expires in +(89\d|900) s", shown.out)
    assert re.search(r"GET +https://127\.0\.0\.1:\d+/banking/ping", shown.out)
    assert shown.out.count("   ok: ") == 8
    # A JWT or the sandbox's opaque token; the thumbprint is 43 characters of base64url.
    assert not re.search(r"eyJ[\w-]{10,}", shown.out)
    assert len(re.findall(r"[\w-]{40,}", shown.out)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("place", ["SoftHSM", "file"])
def test_a_signal_amid_it_leaves_nothing(
    tmp_path: Path, number: signal.Signals, place: str
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    if place == "file":
        environment["PATH"] = "/nowhere"
    with subprocess.Popen(
        [*COMMAND, "demo"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not any(path.is_dir() for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (128 + number, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["SoftHSM", "python-pkcs11"])
def test_in_a_file_where_softhsm_cannot_be_used(tmp_path: Path, missing: str) -> None:
    if missing == "SoftHSM":
        shown = demo(tmp_path, PATH="/nowhere")
    else:
        code = "import sys; sys.modules['pkcs11'] = None; from d1_signer.cli import main; main()"
        done = subprocess.run(
            [COMMAND[0], "-c", code, "demo"],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        shown = Result(done.returncode, done.stdout, done.stderr)
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.startswith("1. A P-256 key, made in a file\n   not in SoftHSM  ")
    assert missing in shown.out.splitlines()[1]
    assert "exportable             yes" in shown.out
    assert shown.out.count("   ok: ") == 5
    assert list(tmp_path.iterdir()) == []


def test_as_one_object(tmp_path: Path) -> None:
    told = json.loads(demo(tmp_path, "--json").out)
    assert told["signature"] == {"algorithm": "ES256", "bytes": 64}
    assert told["custody"]["cka_extractable"] is False
    assert told["assertion"]["header"] == {"alg": "ES256", "kid": "demo-2026", "typ": "JWT"}
    assert told["call"]["status"] == 200


def test_make_demo_runs_it() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]
    assert recipe.splitlines()[1] == "\t$(BIN)/d1-signer demo"

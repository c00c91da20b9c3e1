# SPDX-License-Identifier: Apache-2.0
"""`make demo`, as its target runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo() -> None:
    done = subprocess.run(
        ["softhsm/with-token", sys.executable, "docs/examples/demo.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for fact in ("CKA_LOCAL +True", "CKA_SENSITIVE +True", "CKA_EXTRACTABLE +False"):
        assert re.search(fact, done.stdout)
    for shown in ("'alg': 'ES256'", "'kid': 'demo-2026'", "claim iss", "claim exp", "claim jti"):
        assert shown in done.stdout
    assert "d1-api:account:full d1-api:consumer:read" in done.stdout
    assert re.search(r"expires in +(89\d|900) s", done.stdout)
    assert re.search(r"GET +https://127\.0\.0\.1:\d+/banking/ping", done.stdout)
    assert done.stdout.count("   ok: ") == 7
    # A JWT or the sandbox's opaque token; the thumbprint is 43 characters of base64url.
    assert not re.search(r"eyJ[\w-]{10,}", done.stdout)
    assert len(re.findall(r"[\w-]{40,}", done.stdout)) == 1

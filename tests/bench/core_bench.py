# SPDX-License-Identifier: Apache-2.0
"""What every user pays: the import, and an assertion by hand beside PyJWT's.

``python -m tests.bench.core_bench``
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt as pyjwt
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from d1_signer import generate_key, open_signer
from d1_signer.token.assertion import sign_assertion
from d1_signer.token.d1 import AssertionProfile

IMPORT_BAR = 1.15
_ROUNDS = 25
_ALONE = "import asn1crypto.algos, requests, cryptography.hazmat.primitives.asymmetric.ec"
_DEPENDENCIES = (
    f"{_ALONE}; import cryptography.hazmat.primitives.serialization, "
    "cryptography.hazmat.primitives.ciphers.aead"
)
_OURS = "import d1_signer; d1_signer.TokenFetcher, d1_signer.open_signer, d1_signer.D1Auth"


def import_seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return float(printed.stdout)


def imports() -> bool:
    """Package alone, and all of its main names, beside the core dependencies alone."""
    statements = {"package": "import d1_signer", "names": _OURS, "alone": _DEPENDENCIES}
    times: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(_ROUNDS):
        for name, statement in statements.items():
            times[name].append(import_seconds(statement))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = {name: median[name] / median["alone"] for name in statements}
    met = ratio["package"] <= IMPORT_BAR
    bar = f"bar {IMPORT_BAR:.2f}: {'met' if met else 'NOT MET'}"
    for name, label, note in (
        ("alone", "import of the core dependencies", ""),
        ("package", "import d1_signer", bar),
        ("names", "the same, and its main names used", ""),
    ):
        print(f"{label:<33} {median[name] * 1e3:8.1f} ms   x {ratio[name]:.2f}   {note}".rstrip())
    return met


def assertions() -> None:
    """A local key: no bar, for orientation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "key.pem")
        generate_key(path.as_uri())
        key: Any = load_pem_private_key(path.read_bytes(), None)
        profile = AssertionProfile(issuer_id="issuer", audience="https://d1.example/oauth2/token")
        with (
            open_signer(path.as_uri(), kid="k") as signer,
            open_signer(path.as_uri(), kid="k", verify=False) as quick,
        ):
            claims: dict[str, Any] = profile.claims(now=time.time(), jti="x" * 22)
            subjects: dict[str, Callable[[], object]] = {
                "PyJWT encode": lambda: pyjwt.encode(claims, key, "ES256", {"kid": "k"}),
                "assertion, not verified": lambda: sign_assertion(quick, profile),
                "assertion, verified": lambda: sign_assertion(signer, profile),
            }
            times: dict[str, list[float]] = {name: [] for name in subjects}
            for _ in range(2000):
                for name, work in subjects.items():
                    started = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - started)
    base = statistics.median(times["PyJWT encode"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<33} {median * 1e6:8.1f} µs   x {median / base:.2f}")


if __name__ == "__main__":
    met = imports()
    assertions()
    sys.exit(0 if met else 1)

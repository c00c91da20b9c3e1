# SPDX-License-Identifier: Apache-2.0
"""All figures, each suite in a process of its own.

``python -m tests.bench [core|token|pkcs11|cloud|tls|audit ...]``
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

SUITES = ("core", "token", "pkcs11", "cloud", "tls", "audit")


def main(names: list[str]) -> int:
    unknown = set(names) - set(SUITES)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(SUITES)}")
        return 2
    failed = []
    for name in names or SUITES:
        module = f"tests.bench.{name}_bench"
        if importlib.util.find_spec(module) is None:
            failed.append(name)
            continue
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", module], check=False).returncode:
            failed.append(name)
    print(f"\nbars not met: {', '.join(failed)}" if failed else "\nall bars met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""What the child of a fork forgets, where Python was not told of it."""

from __future__ import annotations

import subprocess
import sys

FORKED_IN_C = """
import ctypes, os, random
from d1_signer.signing import forks

random.seed(1)
of_the_parent = random.Random(1).random()
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    try:
        forks.notice()
        os._exit(0 if random.random() != of_the_parent else 1)
    finally:
        os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), random.random() == of_the_parent)
"""


def test_children_draw_other_numbers_than_their_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED_IN_C], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "0 True\n", done.stdout + done.stderr

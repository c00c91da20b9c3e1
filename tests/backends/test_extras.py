# SPDX-License-Identifier: Apache-2.0
"""What a user without an extra is told; in a process of its own, whose imports are cut off."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
from d1_signer.errors import MissingExtraError
from d1_signer.signing.opening import open_signer
try:
    open_signer(sys.argv[1])
except MissingExtraError as error:
    print(error.hint)
"""


@pytest.mark.parametrize(
    ("uri", "extra", "missing"),
    [
        ("awskms:///alias/d1", "aws", ["boto3"]),
        ("awskms:///alias/d1", "aws", ["botocore"]),
        ("gcpkms://projects/p", "gcp", ["google.cloud"]),
        ("gcpkms://projects/p", "gcp", ["google_crc32c"]),
    ],
)
def test_missing_extra_is_named(uri: str, extra: str, missing: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, uri, *missing],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert f'pip install "d1-signer[{extra}]"' in ran.stdout, ran.stderr


def test_vault_needs_nothing_but_the_core() -> None:
    program = (
        "import sys, d1_signer.backends.vault\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'requests', 'hvac', 'boto3', 'google'}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50
    )
    assert ran.stdout == "[]\n", ran.stderr

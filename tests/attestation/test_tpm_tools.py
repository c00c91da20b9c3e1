# SPDX-License-Identifier: Apache-2.0
"""A TPM's statement, made as the page says, by a TPM of the tests' own."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from d1_signer.attestation import AttestationError, Statement, read_anchors, verify
from d1_signer.es256 import PublicKey
from tests.pkcs11.tpm import running_tpm

PAGE = Path(__file__).parents[2] / "docs" / "custody" / "attestation.md"
NONCE = b"nonce of the auditor"


def test_a_statement_as_the_page_says(tmp_path: Path) -> None:
    (commands,) = re.findall(
        r"test_tpm_tools\.py -->\n```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    state, folder = tmp_path / "tpm", tmp_path / "folder"
    state.mkdir()
    folder.mkdir()
    with running_tpm(state) as tpm:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env={**os.environ, **tpm.env, "NONCE_IN_HEXADECIMAL": NONCE.hex()},
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    anchor = ran.stdout.split()[-2]
    ak = PublicKey.from_pem((folder / "ak.pem").read_bytes())
    assert hashlib.sha256(ak.der()).hexdigest() == anchor
    names = {"attest": "key.attest", "signature": "key.sig", "public": "key.pub"}
    names |= {"ak_public": "ak.pub", "creation_data": "creation.data"}
    parts = {part: (folder / name).read_bytes() for part, name in names.items()}
    statement = Statement(format="tpm2", content=b"", parts=parts)
    anchors = read_anchors(f"{anchor} formats=tpm2 hardware=no a software TPM")
    verified = verify(statement, anchors=anchors, nonce=NONCE)
    answers = (verified.exportable, verified.never_exportable, verified.generated_in_place)
    assert answers == (False, True, True)
    assert verified.hardware is False
    with pytest.raises(AttestationError, match="nonce"):
        verify(statement, anchors=anchors, nonce=NONCE + b"?")
    with pytest.raises(AttestationError, match="neither trusted nor certified"):
        verify(statement, nonce=NONCE)

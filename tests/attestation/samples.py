# SPDX-License-Identifier: Apache-2.0
"""Real statements, which are not ours to carry: in the folder that D1_SIGNER_SAMPLES names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from d1_signer.attestation import PUBLISHED, Statement
from tests.attestation.makers import Made

FOLDER = os.environ.get("D1_SIGNER_SAMPLES", "")
NeedSamples = pytest.mark.skipif(
    not FOLDER, reason="D1_SIGNER_SAMPLES names no folder of real statements"
)
AK = "0761270917d5842a1840ccb625ef308e94d11f5f141aeb300794d4b3a01831f3"
AT = 1_795_000_000.0  # 2026-11-18, a year after Marvell's first root certificate expired


def read(name: str) -> bytes:
    return (Path(FOLDER) / name).read_bytes()


def statement(name: str) -> tuple[Statement, dict[str, Any]]:
    """A sample, and what it is verified with."""
    kind, _, which = name.partition(" ")
    if kind == "marvell":
        folder = f"gcp-cloudhsm/{which}"
        content, certificates = read(f"{folder}.dat"), (read(f"{folder}.certs"),)
        return Statement(format=kind, content=content, certificates=certificates), {}
    if kind == "luna-pkc":
        return Statement(format=kind, content=read(f"thales-luna/{which}-pkc.p7b")), {}
    if kind == "yubihsm":
        above = ("device", "yubihsm2-attestation-intermediates", "yubico-attestation-intermediates")
        content = read("yubihsm2/key-attestation.pem")
        files = tuple(read(f"yubihsm2/{each}.pem") for each in above)
        return Statement(format=kind, content=content, certificates=files), {}
    if kind == "yubikey-piv":
        content = read(f"yubikey-piv/{which}.key.pem")
        device = read(f"yubikey-piv/{which}.device.pem")
        return Statement(format=kind, content=content, certificates=(device,)), {}
    if kind == "securosys":
        return Statement(format=kind, content=read("securosys/request.json")), {}
    parts = {
        "attest": read(f"tpm-swtpm/{which}.attest"),
        "signature": read(f"tpm-swtpm/{which}.sig"),
        "public": read(f"tpm-swtpm/{'soft' if which == 'soft' else 'key'}.pub"),
        "ak_public": read("tpm-swtpm/ak.pub"),
    }
    asked: dict[str, Any] = {"anchors": {AK}}
    if which == "certcreation":
        parts["creation_data"] = read("tpm-swtpm/creation.data")
        asked["nonce"] = bytes.fromhex(read("tpm-swtpm/nonce.hex").decode())
    return Statement(format="tpm2", content=b"", parts=parts), asked


def sample(name: str) -> Made:
    made, asked = statement(name)
    return Made(made, (), {"at": AT, "anchors": PUBLISHED, **asked})

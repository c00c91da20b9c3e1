# SPDX-License-Identifier: Apache-2.0
"""What the tests of the trail share: signers over keys in memory, and their records as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer import Signer
from d1_signer.audit import folder, verifying
from d1_signer.audit.note import VerifierKey
from d1_signer.audit.verifying import InstanceReport
from d1_signer.events import Trail
from tests.signing.backends import KeyBackend

ORIGIN = "bank.example/d1-audit"
SEALING = ec.derive_private_key(0x5EA1, ec.SECP256R1())
SIGNING = ec.derive_private_key(0xD1, ec.SECP256R1())


def sealing_signer() -> Signer:
    return Signer(KeyBackend(SEALING))


def watched_signer(trail: Trail | None, *, key: ec.EllipticCurvePrivateKey = SIGNING) -> Signer:
    return Signer(KeyBackend(key), kid="bank-2026", trail=trail)


def verifier_key() -> VerifierKey:
    return VerifierKey(ORIGIN, sealing_signer().public_key)


def records_file(trail: Path) -> Path:
    """The largest file of the only instance of a trail."""
    (instance,) = folder.instances(trail)
    return max(instance.iterdir(), key=lambda file: (file.stat().st_size, file.name))


def records(trail: Path) -> list[dict[str, Any]]:
    """All records of a trail, instance by instance."""
    return [
        json.loads(line)
        for instance in folder.instances(trail)
        for _, file in folder.segments(instance)
        for line in file.read_bytes().splitlines()
    ]


def verified(trail: Path, *since: bytes) -> list[InstanceReport]:
    return verifying.verify(folder.instances(trail), [verifier_key()], since)


def findings(trail: Path, *since: bytes) -> list[str]:
    """What verification finds, each with its record's number."""
    return [
        f"{finding.record}: {finding.text}"
        for report in verified(trail, *since)
        for finding in report.findings
    ]

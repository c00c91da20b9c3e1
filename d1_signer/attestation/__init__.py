# SPDX-License-Identifier: Apache-2.0
"""Statements that a device signed about a key, verified offline.

Use::

    import time
    from pathlib import Path

    from d1_signer.attestation import Statement, verify

    statement = Statement(format="luna-pkc", content=Path("d1.p7b").read_bytes())
    verified = verify(statement, public_key=signer.public_key, at=time.time())
    print(verified.device, verified.exportable, verified.limits)

No network, no clock, no file: everything that is judged is an argument. What is trusted are keys
(`PUBLISHED`), never certificates; see docs/custody/attestation.md for each vendor.
"""

from d1_signer.attestation.anchors import Anchor, read_anchors
from d1_signer.attestation.published import PUBLISHED
from d1_signer.attestation.statement import Statement, Verified
from d1_signer.attestation.verifier import FORMATS, verify
from d1_signer.errors import AttestationError

__all__ = [
    "FORMATS",
    "PUBLISHED",
    "Anchor",
    "AttestationError",
    "Statement",
    "Verified",
    "read_anchors",
    "verify",
]

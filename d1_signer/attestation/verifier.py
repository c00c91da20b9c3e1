# SPDX-License-Identifier: Apache-2.0
"""The one face: bounds, the table of formats, and the guard around all of it."""

from __future__ import annotations

from collections.abc import Iterable

from d1_signer.attestation.anchors import Anchor
from d1_signer.attestation.published import PUBLISHED
from d1_signer.attestation.statement import Statement, Verified
from d1_signer.es256 import PublicKey

FORMATS = frozenset({"marvell", "luna-pkc", "yubihsm", "yubikey-piv", "securosys", "tpm2"})


def verify(
    statement: Statement,
    *,
    anchors: Iterable[Anchor | str] = PUBLISHED,
    public_key: PublicKey | bytes | None = None,
    nonce: bytes | None = None,
    at: float | None = None,
) -> Verified:
    raise NotImplementedError

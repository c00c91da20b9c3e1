# SPDX-License-Identifier: Apache-2.0
"""What a backend is opened with."""

from __future__ import annotations

from dataclasses import dataclass

from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.es256 import PublicKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a backend is opened with; see `d1_signer.backends.pkcs11.open_backend`."""

    uri: Pkcs11Uri
    module_path: str
    max_sessions: int = 4
    session_timeout: float = 10.0
    timeout: float | None = None
    user_type: int
    locking: str = "auto"
    pin_pad: bool = False
    public_key: PublicKey | None = None
    init_reserved: str | None = None

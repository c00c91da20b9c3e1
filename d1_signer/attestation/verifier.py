# SPDX-License-Identifier: Apache-2.0
"""The one face: bounds, the table of formats, and the guard around all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from d1_signer.attestation import keys
from d1_signer.attestation.anchors import Anchor, anchors_for
from d1_signer.attestation.luna import verify_luna
from d1_signer.attestation.marvell import verify_marvell
from d1_signer.attestation.published import PUBLISHED
from d1_signer.attestation.refusals import plain, refused
from d1_signer.attestation.securosys import verify_securosys
from d1_signer.attestation.statement import Asked, Statement, Verified
from d1_signer.attestation.tpm import verify_tpm
from d1_signer.attestation.yubico import verify_piv, verify_yubihsm
from d1_signer.errors import AttestationError
from d1_signer.es256 import PublicKey

_VERIFIERS: dict[str, Callable[[Statement, Asked], Verified]] = {
    "marvell": verify_marvell,
    "luna-pkc": verify_luna,
    "yubihsm": verify_yubihsm,
    "yubikey-piv": verify_piv,
    "securosys": verify_securosys,
    "tpm2": verify_tpm,
}
_WITH_NONCE = frozenset({"tpm2", "yubihsm"})
_LONGEST = 262_144

FORMATS = frozenset(_VERIFIERS)
"""The formats of statements."""


def verify(
    statement: Statement,
    *,
    anchors: Iterable[Anchor | str | bytes] = PUBLISHED,
    public_key: PublicKey | bytes | None = None,
    nonce: bytes | None = None,
    at: float | None = None,
) -> Verified:
    """Verify what a device signed about a key.

    Args:
        statement: The statement, of 256 KiB at most with all its parts.
        anchors: Trusted keys: `Anchor`, or their SPKI's SHA-256, 32 bytes or hexadecimal. Where
            this is given, the vendors' keys count only if they stand in it (``PUBLISHED | {...}``).
        public_key: The key that it must be about, SubjectPublicKeyInfo in DER where it is bytes.
        nonce: What it must carry: ``tpm2`` has it signed, ``yubihsm`` as the key's label. A format
            that carries none is refused then.
        at: The moment, seconds since the epoch, at which all certificates must be valid; None:
            validity in time is not judged. A trusted key does not expire.

    Returns:
        What is proven, and in `Verified.limits` what is not.

    Raises:
        AttestationError: It is not proven, whatever the reason; nothing else is raised.
    """
    try:
        return _verify(statement, anchors, public_key, nonce, at)
    except AttestationError as error:
        if isinstance(statement, Statement) and isinstance(statement.format, str):
            error.details["format"] = plain(statement.format)
        raise
    except Exception as error:  # noqa: BLE001 (parsers of others raise many things, and late)
        reason = refused("it, or what it is held against, cannot be read")
        reason.details["cause"] = type(error).__name__
        raise reason from None


def _verify(
    statement: Statement,
    anchors: Iterable[Anchor | str | bytes],
    public_key: PublicKey | bytes | None,
    nonce: bytes | None,
    at: float | None,
) -> Verified:
    _check_statement(statement)
    if at is not None and (isinstance(at, bool) or not math.isfinite(at)):
        raise refused("the moment to judge it at is not a number of seconds")
    nonces = tuple(each for each in (nonce, statement.nonce) if each is not None)
    if any(not isinstance(each, bytes) or not each for each in nonces):
        raise refused("a nonce is empty, or not bytes")
    if nonces and statement.format not in _WITH_NONCE:
        raise refused(
            f"a nonce is asked for, and a {statement.format} statement carries none",
            "Have the key itself sign the challenge.",
        )
    trusted = anchors_for(statement.format, anchors, PUBLISHED)
    verified = _VERIFIERS[statement.format](statement, Asked(trusted, at, nonces))
    if public_key is not None and _spki(public_key) != verified.spki:
        raise refused(
            "it is about another key",
            "Fetch the statement of the very key, and version of it, that signs.",
        )
    return verified


def _check_statement(statement: Statement) -> None:
    """Types and sizes, before anything is read."""
    if not isinstance(statement, Statement):
        raise refused("it is not a Statement")
    if not isinstance(statement.format, str) or statement.format not in _VERIFIERS:
        raise refused(
            f"its format {plain(str(statement.format))} is not known",
            f"Known are {', '.join(sorted(_VERIFIERS))}.",
        )
    parts = statement.parts
    if parts is not None and not isinstance(parts, Mapping):
        raise refused("its parts are not a mapping")
    pieces = [statement.content, *statement.certificates, *(parts or {}).values()]
    if not all(isinstance(each, bytes) for each in pieces):
        raise refused("its content, certificates and parts are not all bytes")
    if sum(map(len, pieces)) > _LONGEST:
        raise refused(f"it is longer than {_LONGEST} bytes")


def _spki(public_key: PublicKey | bytes) -> bytes:
    if isinstance(public_key, PublicKey):
        return public_key.der()
    return keys.encoded(keys.load(public_key))

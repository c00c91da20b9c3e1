# SPDX-License-Identifier: Apache-2.0
"""A file that an auditor checks without us: reports, statements, and the keys' own signatures.

What stands in it, byte by byte, is told in docs/custody/format.md. It holds what backends claim and
the statements as their devices gave them: what is attested, whoever reads it works out anew.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from d1_signer.attestation import Statement
from d1_signer.custody.report import CustodyReport, Maker, utc
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.es256 import PublicKey, der_from_raw
from d1_signer.events import Use

VERSION = 1
PURPOSE = "custody-bundle"
# What a key signs begins with it, so that it is nothing else that a key of ours ever signs.
DOMAIN = b"d1_signer custody bundle 1\n"
LONGEST_CHALLENGE = 1024
USES = frozenset({"assertion", "client", "audit"})
_SIGNATURES = "signatures"


class Signs(Protocol):
    """What a bundle needs of a signer."""

    @property
    def public_key(self) -> PublicKey:
        """The key."""
        ...

    @property
    def kid(self) -> str:
        """Its identifier."""
        ...

    def sign(self, message: bytes, *, use: Use | None = None) -> bytes:
        """Sign with ES256: 64 bytes, r||s; an audit trail records what for."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyReport:
    """What is told of one key: a report, or why there is none.

    Attributes:
        use: What the key is for: ``assertion``, ``client`` (TLS) or ``audit``.
        location: Where it is, without secrets.
        report: The report; None where the key could not be asked.
        error: Why there is no report.
    """

    use: str
    location: str
    report: CustodyReport | None = None
    error: D1SignerError | None = None


def make_bundle(
    keys: Sequence[tuple[KeyReport, Signs | None]],
    *,
    challenge: str | None,
    made_by: Maker,
    made_at: int,
) -> bytes:
    """Make a bundle; each key signs all of it.

    Args:
        keys: What is told of each key, and its signer; None where it could not be opened.
        challenge: What the auditor chose.
        made_by: Who makes it.
        made_at: Seconds since the epoch.

    Raises:
        ConfigurationError: The challenge is empty, too long or not printable.
        SignerError: A key does not sign.
    """
    if challenge is not None and not is_challenge(challenge):
        raise ConfigurationError(
            f"The challenge is empty, longer than {LONGEST_CHALLENGE} characters, or not printable."
        )
    document: dict[str, object] = {
        "d1_signer_custody_bundle": VERSION,
        "challenge": challenge,
        "time": utc(made_at),
        "made_by": asdict(made_by),
        "keys": [_key(told, signer) for told, signer in keys],
        _SIGNATURES: [],
    }
    message = signed_part(encoded(document))
    use = Use(purpose=PURPOSE, references=(("challenge", challenge),) if challenge else ())
    document[_SIGNATURES] = [
        None if signer is None else b64encode(der_from_raw(signer.sign(message, use=use))).decode()
        for _, signer in keys
    ]
    return encoded(document)


def is_challenge(text: str) -> bool:
    """Whether a text can be what an auditor chose."""
    return 0 < len(text) <= LONGEST_CHALLENGE and text.isprintable()


def encoded(document: dict[str, object]) -> bytes:
    """The one form of a bundle in bytes."""
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def signed_part(bundle: bytes) -> bytes:
    """What the keys sign: the domain, and all lines before the signatures."""
    before, _, _ = bundle.partition(f'\n "{_SIGNATURES}": ['.encode())
    return DOMAIN + before + b"\n"


def _key(told: KeyReport, signer: Signs | None) -> dict[str, object]:
    if told.report is None or signer is None:
        error = told.error and told.error.to_dict()
        return {"use": told.use, "location": told.location, "error": error}
    evidence = told.report.evidence
    claims = replace(told.report, evidence=evidence.claimed or evidence)
    return {
        "use": told.use,
        "public_key": b64encode(signer.public_key.der()).decode(),
        "report": claims.to_dict(),
        "statements": [_statement(one.statement) for one in evidence.attestations or ()],
    }


def _statement(statement: Statement) -> dict[str, object]:
    parts, nonce = statement.parts, statement.nonce
    return {
        "format": statement.format,
        "content": b64encode(statement.content).decode(),
        "certificates": [b64encode(one).decode() for one in statement.certificates],
        "nonce": None if nonce is None else b64encode(nonce).decode(),
        "parts": None
        if parts is None
        else {name: b64encode(part).decode() for name, part in parts.items()},
    }

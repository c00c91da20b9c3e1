# SPDX-License-Identifier: Apache-2.0
"""Statements of devices: where they are read from, and how they become what is known of a key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from asn1crypto import x509

from d1_signer.attestation import (
    FORMATS,
    PUBLISHED,
    Anchor,
    AttestationError,
    Statement,
    read_anchors,
    verify,
)
from d1_signer.attestation.certificates import armoured
from d1_signer.custody.evidence import Attestation, Evidence, Fact
from d1_signer.errors import ConfigurationError
from d1_signer.es256 import PublicKey
from d1_signer.secret import read_public_file, shown_path, unreadable

# The first paths of a TPM's statement, in this order; certificates follow. The last one is left
# empty where TPM2_Certify made the statement.
TPM_PARTS = ("attest", "signature", "public", "ak_public", "creation_data")
_TPM = "tpm2"
_INSTEAD = "instead"
_BEGIN = "-----BEGIN "
_LINE = re.compile(r"^[ \t]*(?:[0-9A-Fa-f]{2}:?){32}(?![^\s#])", re.MULTILINE)


Anchors = frozenset[Anchor]


def read_anchor_file(path: str | None) -> Anchors:
    """What is trusted: the published anchors, and with them those of a file.

    The file has a line for each, as `read_anchors` has it, or is PEM of the vendors' certificates.
    Where its first line is ``instead``, only what follows is trusted. It is lines or PEM, not both.

    Raises:
        ConfigurationError: It cannot be read, or names no anchor.
    """
    if path is None:
        return PUBLISHED
    content = _read(path)
    try:
        first, _, rest = content.decode().lstrip().partition("\n")
        if first.strip() == _INSTEAD:
            return _anchors(rest)
        return PUBLISHED | _anchors(content.decode())
    except (ValueError, TypeError, AttestationError) as error:
        reason = error.message if isinstance(error, AttestationError) else "neither lines nor PEM"
    raise ConfigurationError(
        f"The file of anchors cannot be read: {shown_path(path)}: {reason}",
        hint="Each line is the SHA-256 of a key in hexadecimal and a name; or give certificates in "
        "PEM.",
    )


def _anchors(text: str) -> Anchors:
    if _BEGIN not in text:
        return read_anchors(text)
    if _LINE.search(text):
        raise ValueError
    return frozenset(map(_anchor, armoured(text.encode(), "CERTIFICATE")))


def _anchor(der: bytes) -> Anchor:
    certificate = x509.Certificate.load(der)
    spki = certificate.public_key.dump()
    subject = certificate.subject.human_friendly
    return Anchor(hashlib.sha256(spki).hexdigest(), name=subject, spki=spki)


def read_statement(given: Statement | str) -> Statement:
    """A statement as it is, or read from ``FORMAT:PATH[,PATH…]``.

    The first path is the statement, the others certificates; those of ``tpm2`` are `TPM_PARTS`, and
    certificates after them. Nothing is guessed from what the files hold.

    Raises:
        ConfigurationError: An unknown format, or a file that cannot be read.
    """
    if isinstance(given, Statement):
        return given
    form, colon, rest = given.partition(":") if isinstance(given, str) else ("", "", "")
    paths = rest.split(",")
    if form not in FORMATS or not colon or not paths[0]:
        raise ConfigurationError(
            "The attestation is not written as FORMAT:PATH[,PATH…].",
            hint=f"FORMAT is one of {', '.join(FORMATS)}; PATH is a file, certificates follow.",
        )
    if form != _TPM:
        content, *certificates = map(_read, paths)
        return Statement(format=form, content=content, certificates=tuple(certificates))
    named = dict(zip(TPM_PARTS, paths, strict=False))
    missing = [name for name in TPM_PARTS[:4] if not named.get(name)]
    if missing:
        raise ConfigurationError(
            f"The attestation of a TPM is not complete: {missing[0]} is missing.",
            hint=f"Write {_TPM}: and the paths of {', '.join(TPM_PARTS)} and certificates, in this "
            "order; creation_data is empty for a statement of TPM2_Certify.",
        )
    parts = {name: _read(path) for name, path in named.items() if path}
    certificates = list(map(_read, paths[len(TPM_PARTS) :]))
    return Statement(format=form, certificates=tuple(certificates), parts=parts)


def _read(path: str) -> bytes:
    try:
        return read_public_file(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"A file of the attestation cannot be read: {shown_path(path)}: {unreadable(error)}.",
            hint="Name a regular file of at most 1 MiB that this process's user may read.",
        ) from None


def attested(
    statement: Statement,
    public_key: PublicKey,
    anchors: Anchors,
    *,
    nonce: bytes | None = None,
    at: float | None = None,
) -> Attestation:
    """Verify a statement about a key.

    Args:
        statement: The statement.
        public_key: The key that it must be about.
        anchors: What is trusted.
        nonce: What it must have been asked with.
        at: Moment for the validity of certificates; None: not judged.

    Raises:
        AttestationError: It does not prove anything about this key.
    """
    verified = verify(statement, anchors=anchors, public_key=public_key, nonce=nonce, at=at)
    return Attestation(statement=statement, verified=verified)


def with_attested(
    claimed: Evidence, public_key: PublicKey, given: Sequence[Attestation], anchors: Anchors
) -> Evidence:
    """What a backend claims, together with the statements about its key that can be verified.

    Args:
        claimed: What the backend says; nothing in it is attested.
        public_key: The key.
        given: What was verified before.
        anchors: What is trusted, for the statements that the backend fetched.
    """
    evidence, found = claimed.claims(), list(given)
    for statement in claimed.statements or ():
        try:
            found.append(attested(statement, public_key, anchors))
        except AttestationError as error:
            told = Fact(
                name=f"{statement.format} statement",
                value=f"not verified: {error.message}",
                source="d1_signer",
            )
            evidence = replace(evidence, facts=(*evidence.facts, told))
    return evidence.with_attestations(tuple(found))

# SPDX-License-Identifier: Apache-2.0
"""The proof that one record is in the trail, which shows no other record."""

from __future__ import annotations

from pathlib import Path

from d1_signer.audit import merkle, stored
from d1_signer.audit.hashes import StoredHashes
from d1_signer.audit.note import Proof
from d1_signer.errors import AuditError


def prove(instance: Path, number: int) -> tuple[Proof, bytes]:
    """Prove that a record is in the tree of the newest checkpoint.

    Args:
        instance: The instance folder.
        number: The record's number.

    Returns:
        The proof, whose extra data is the record, and the record.

    Raises:
        AuditError: It is not there, not sealed yet, or altered.
        OSError: The folder cannot be read.
    """
    line = stored.entry(instance, number)
    newest = stored.last_checkpoint(instance)
    if newest is None or newest.told.size <= number:
        raise AuditError(
            f"The record {number} is not sealed yet: no checkpoint is over it.",
            hint="It is sealed within a minute, or with d1-signer audit seal where its process is "
            "gone.",
        )
    size, root = newest.told.size, newest.told.root
    try:
        with StoredHashes(instance) as hashes:
            path = merkle.inclusion_proof(number, size, hashes.subtree)
    except FileNotFoundError:
        path = []
    try:
        fits = merkle.root_from_inclusion(merkle.leaf_hash(line), number, size, path) == root
    except AuditError:
        fits = False
    if not fits:
        raise AuditError(
            f"The record {number} or the stored hashes are not those of the newest checkpoint.",
            hint="d1-signer audit verify tells what was altered.",
        )
    return Proof(number, tuple(path), newest.note, extra=line), line

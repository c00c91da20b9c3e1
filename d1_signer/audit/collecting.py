# SPDX-License-Identifier: Apache-2.0
"""One tree over the newest checkpoints of many processes and hosts.

A collection is a file of signed notes: first the collector's own checkpoint, whose extension line
is ``collection TIME``, then its leaves, each a checkpoint of an instance in the instances' order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from d1_signer.audit import merkle, moments
from d1_signer.audit.note import Checkpoint, SignedNote, VerifierKey
from d1_signer.audit.sealing import CheckpointSigner
from d1_signer.audit.verifying import believed
from d1_signer.errors import AuditError

_LINE = "collection "
_INSTANCE = "instance "
_PATIENCE = 30.0  # seconds for the signature


def newest(notes: Iterable[bytes], keys: Sequence[VerifierKey]) -> list[bytes]:
    """The newest checkpoint of each instance, in the instances' order.

    Raises:
        AuditError: One is not of these keys, names no instance, or contradicts another one.
    """
    roots: dict[tuple[str, int], bytes] = {}
    found: dict[str, tuple[Checkpoint, bytes]] = {}
    for note in notes:
        told = believed(note, keys)
        if len(told.extensions) != 1 or not told.extensions[0].startswith(_INSTANCE):
            raise AuditError("A checkpoint names no instance, so that it cannot be collected.")
        name = told.extensions[0].removeprefix(_INSTANCE)
        if roots.setdefault((name, told.size), told.root) != told.root:
            raise AuditError(f"Two checkpoints of {name} over {told.size} records contradict.")
        newest, _ = found.setdefault(name, (told, note))
        if newest.origin != told.origin:
            raise AuditError(f"{name} has checkpoints of {newest.origin} and of {told.origin}.")
        if told.size > newest.size:
            found[name] = (told, note)
    return [note for _, (_, note) in sorted(found.items())]


def collection(leaves: Sequence[bytes], signer: CheckpointSigner, key: VerifierKey) -> bytes:
    """Make a collection.

    Args:
        leaves: Signed checkpoints, see `newest`.
        signer: The collector's.
        key: Its verifier key.

    Raises:
        D1SignerError: It cannot be signed.
    """
    root = merkle.hash_of([merkle.leaf_hash(leaf) for leaf in leaves])
    line = f"{_LINE}{moments.text(time.time_ns() // 1000)}"
    text = Checkpoint(key.name, len(leaves), root, (line,)).text()
    raw = signer.sign(text.encode(), timeout=_PATIENCE)
    key.public_key.verify(raw, text.encode())
    return SignedNote(text, (key.signature(raw),)).encode() + b"".join(leaves)


def checkpoints_of(notes: Sequence[bytes], keys: Sequence[VerifierKey]) -> list[bytes]:
    """The checkpoints of instances in a file: all of it, or those of a collection that holds.

    Raises:
        AuditError: The collection is not of these keys, or its leaves are not those it tells.
    """
    try:
        told = Checkpoint.parse(SignedNote.parse(notes[0]).text)
    except AuditError:
        return [*notes]  # whoever reads it says why it is none
    if not any(line.startswith(_LINE) for line in told.extensions):
        return [*notes]
    believed(notes[0], keys)
    leaves = [*notes[1:]]
    if told.size != len(leaves) or told.root != merkle.hash_of(
        [merkle.leaf_hash(leaf) for leaf in leaves]
    ):
        raise AuditError("The collection does not hold the checkpoints that it was made over.")
    return leaves

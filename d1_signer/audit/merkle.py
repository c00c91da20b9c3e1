# SPDX-License-Identifier: Apache-2.0
"""The Merkle tree of RFC 6962 section 2.1 with SHA-256. Pure code, no I/O.

A tree that grows is kept as its *range*: the roots of the complete subtrees that it consists of,
the largest first, one for each bit that is set in its size. Whoever has the range can add leaves
and tell the root, and needs none of the leaves before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

from d1_signer.errors import AuditError

HASH_LENGTH = 32
EMPTY_ROOT = sha256().digest()

Range = tuple[bytes, ...]
Subtree = Callable[[int, int], bytes]
"""Gives the hash of the leaves from one number up to, and without, another."""


def leaf_hash(entry: bytes) -> bytes:
    """The hash of a leaf, which is an entry's own bytes."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of a node with two children."""
    return sha256(b"\x01" + left + right).digest()


def appended(nodes: Range, size: int, leaf: bytes) -> Range:
    """The range of a tree with one leaf more.

    Args:
        nodes: The range of the tree so far.
        size: Its number of leaves.
        leaf: The hash of the new leaf.
    """
    kept = len(nodes)
    while size & 1:
        kept -= 1
        leaf = sha256(b"\x01" + nodes[kept] + leaf).digest()
        size >>= 1
    return (*nodes[:kept], leaf)


def root(nodes: Range) -> bytes:
    """The root hash of a tree, of its range."""
    if not nodes:
        return EMPTY_ROOT
    *larger, found = nodes
    for node in reversed(larger):
        found = node_hash(node, found)
    return found


def range_of(size: int, subtree: Subtree) -> Range:
    """The range of the first ``size`` leaves, of complete subtrees that somebody knows."""
    nodes: list[bytes] = []
    start = 0
    for height in range(size.bit_length() - 1, -1, -1):
        if size >> height & 1:
            nodes.append(subtree(start, start + (1 << height)))
            start += 1 << height
    return tuple(nodes)


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """The audit path of a leaf (RFC 6962 section 2.1.1), from its sibling up to the root.

    Args:
        index: Number of the leaf, from 0.
        size: Number of leaves of the tree; larger than ``index``.
        subtree: Asked for ranges that `hash_of` can compute.
    """
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _largest_power_below(end - start)
        if index < middle:
            path.append(subtree(middle, end))
            end = middle
        else:
            path.append(subtree(start, middle))
            start = middle
    path.reverse()
    return path


def consistency_proof(old: int, size: int, subtree: Subtree) -> list[bytes]:
    """The proof that a tree holds an older one (RFC 6962 section 2.1.2).

    Args:
        old: Leaves of the older tree, from 1.
        size: Leaves of the newer one, ``old`` at least.
        subtree: As for `inclusion_proof`.
    """
    path: list[bytes] = []
    start, end, whole = 0, size, True
    while old != end:
        middle = start + _largest_power_below(end - start)
        if old <= middle:
            path.append(subtree(middle, end))
            end = middle
        else:
            path.append(subtree(start, middle))
            start, whole = middle, False
    if not whole:
        path.append(subtree(start, end))
    path.reverse()
    return path


def hash_of(leaves: Sequence[bytes]) -> bytes:
    """The tree hash of leaves that are hashed already."""
    nodes: Range = ()
    for size, leaf in enumerate(leaves):
        nodes = appended(nodes, size, leaf)
    return root(nodes)


def root_from_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that an audit path leads to (RFC 9162 section 2.1.3.2).

    Raises:
        AuditError: The path is not one of that leaf in a tree of that size.
    """
    if not 0 <= index < size:
        raise AuditError("The leaf is not in a tree of that size.")
    number, last, found = index, size - 1, leaf
    for node in path:
        if not last:
            raise AuditError("The proof of inclusion is too long.")
        if number & 1 or number == last:
            found = node_hash(node, found)
            while not number & 1 and number:
                number >>= 1
                last >>= 1
        else:
            found = node_hash(found, node)
        number >>= 1
        last >>= 1
    if last:
        raise AuditError("The proof of inclusion is too short.")
    return found


def require_consistent(
    old: tuple[int, bytes], new: tuple[int, bytes], path: Sequence[bytes]
) -> None:
    """Verify that a tree holds an older one (RFC 9162 section 2.1.4.2).

    Args:
        old: Size and root hash of the older tree.
        new: Size and root hash of the newer one.
        path: The proof.

    Raises:
        AuditError: It does not, or the proof is none.
    """
    if not 0 < old[0] <= new[0]:
        raise AuditError("The older tree is empty, or larger than the newer one.")
    nodes = list(path)
    try:
        found = _both_roots(old[0], new[0], old[1], nodes)
    except IndexError:
        raise AuditError("The proof of consistency is too short.") from None
    if nodes:
        raise AuditError("The proof of consistency is too long.")
    if found != (old[1], new[1]):
        raise AuditError("The newer tree does not hold the older one.")


def _both_roots(
    old: int, size: int, known: bytes | None, nodes: list[bytes]
) -> tuple[bytes, bytes]:
    """The roots of an older and of a newer tree, of a proof whose hashes are taken off.

    Args:
        old: Leaves of the older tree.
        size: Leaves of the newer one.
        known: The older tree's root, where its leaves are all that is looked at.
        nodes: The proof.
    """
    if old == size:
        node = nodes.pop(0) if known is None else known
        return node, node
    middle = _largest_power_below(size)
    if old <= middle:
        first, second = _both_roots(old, middle, known, nodes)
        return first, node_hash(second, nodes.pop(0))
    first, second = _both_roots(old - middle, size - middle, None, nodes)
    left = nodes.pop(0)
    return node_hash(left, first), node_hash(left, second)


def _largest_power_below(size: int) -> int:
    """The largest power of two that is smaller than ``size``, which is 2 at least."""
    return 1 << (size - 1).bit_length() - 1

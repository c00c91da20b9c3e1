# SPDX-License-Identifier: Apache-2.0
"""The tree against a second implementation that was written from RFC 6962 alone."""

from __future__ import annotations

import pytest

from d1_signer.audit import merkle
from d1_signer.errors import AuditError
from tests.audit import second

MOST = 40
ENTRIES = [bytes([number]) * number for number in range(MOST)]
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]


def subtree(start: int, end: int) -> bytes:
    return second.mth(ENTRIES[start:end])


def test_known_answers_of_certificate_transparency() -> None:
    # From the reference test data of RFC 6962's implementation (merkle_tree_test.cc).
    entries = [b"", b"\x00", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43"]
    leaves = [merkle.leaf_hash(entry) for entry in entries]
    assert merkle.EMPTY_ROOT.hex().startswith("e3b0c44298fc1c14")
    assert leaves[0].hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert (
        merkle.hash_of(leaves[:2]).hex()
        == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    )


@pytest.mark.parametrize("size", range(MOST))
def test_every_size_grows_as_the_definition_says(size: int) -> None:
    nodes: merkle.Range = ()
    for number in range(size):
        nodes = merkle.appended(nodes, number, LEAVES[number])
    assert merkle.root(nodes) == second.mth(ENTRIES[:size])
    assert len(nodes) == size.bit_count()
    assert merkle.range_of(size, subtree) == nodes


def test_every_proof_of_inclusion_is_the_definitions_and_leads_to_the_root() -> None:
    for size in range(1, MOST):
        root = second.mth(ENTRIES[:size])
        for index in range(size):
            path = merkle.inclusion_proof(index, size, subtree)
            assert path == second.path(index, ENTRIES[:size])
            assert merkle.root_from_inclusion(LEAVES[index], index, size, path) == root
            assert second.climb(ENTRIES[index], index, size, path) == root
            for broken in (path[:-1] if path else [root], [*path, root]):
                with pytest.raises(AuditError):
                    assert (
                        merkle.root_from_inclusion(LEAVES[index], index, size, broken) == root
                    ) or pytest.fail("a path of a wrong length leads somewhere")


def test_every_proof_of_consistency_is_the_definitions_and_holds() -> None:
    for size in range(1, MOST):
        new = (size, second.mth(ENTRIES[:size]))
        for old_size in range(1, size + 1):
            path = merkle.consistency_proof(old_size, size, subtree)
            assert path == second.proof(old_size, ENTRIES[:size])
            old = (old_size, second.mth(ENTRIES[:old_size]))
            merkle.require_consistent(old, new, path)
            other = (old_size, second.mth([*ENTRIES[: old_size - 1], b"other"]))
            with pytest.raises(AuditError):
                merkle.require_consistent(other, new, path)
            with pytest.raises(AuditError):
                merkle.require_consistent(old, new, [*path, new[1]])
            if path:
                with pytest.raises(AuditError):
                    merkle.require_consistent(old, new, path[:-1])


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_a_leaf_outside_of_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(AuditError):
        merkle.root_from_inclusion(LEAVES[0], index, size, [])


@pytest.mark.parametrize("sizes", [(0, 3), (4, 3)])
def test_an_older_tree_that_is_empty_or_larger_is_refused(sizes: tuple[int, int]) -> None:
    old, new = ((size, subtree(0, size)) for size in sizes)
    with pytest.raises(AuditError):
        merkle.require_consistent(old, new, [])

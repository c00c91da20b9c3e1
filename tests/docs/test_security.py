# SPDX-License-Identifier: Apache-2.0
"""Each claim of the threat model is held by a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
_TABLE = _PAGE.partition("## Threat model")[2].partition("\n## ")[0]
_ROWS = [line.strip("|").split("|") for line in _TABLE.splitlines() if line.startswith("| ")][1:]


def named(text: str) -> list[tuple[str, str]]:
    """File and function; a function alone is of the file before."""
    found, file = [], ""
    for path, function in re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", text):
        file = path or file
        found.append((file, function))
    return found


@pytest.mark.parametrize("row", _ROWS, ids=[row[0].strip() for row in _ROWS])
def test_what_stops_them_is_tested(row: list[str]) -> None:
    who, can, stops, left = (cell.strip() for cell in row)
    assert who
    assert can
    assert left
    tests = named(stops)
    assert tests
    for file, function in tests:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }, f"{file}::{function}"


def test_everybody_is_thought_of() -> None:
    some = "user network D1 Vault Redis environment plug-in dependency release operator"
    for word in some.split():
        assert any(word in who for who, *_ in _ROWS), word

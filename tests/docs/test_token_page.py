# SPDX-License-Identifier: Apache-2.0
"""docs/token.md has every setting, call and error of the fetcher, and nothing that is not there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from d1_signer import Limits, TokenFetcher, errors

PAGE = (Path(__file__).parents[2] / "docs/token.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    _, found, rest = PAGE.partition(f"\n| {heading}")
    assert found
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)", cell)


def test_settings() -> None:
    told = [name for row in rows("`TokenFetcher(") for name in names(row[0])]
    assert told == list(inspect.signature(TokenFetcher).parameters)


@pytest.mark.parametrize("function", [TokenFetcher, Limits])
def test_defaults(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    checked = 0
    for setting, told, _ in rows(f"`{function.__name__}("):
        literal = re.match(r"`?([0-9]+|True|False|\"[a-z]+\")", told)
        if literal is None:
            continue
        for name in names(setting):
            assert ast.literal_eval(literal[1]) == parameters[name].default
            checked += 1
    assert checked >= 4


def test_limits() -> None:
    told = [name for row in rows("`Limits(") for name in names(row[0])]
    assert told == list(inspect.signature(Limits).parameters)


def test_calls() -> None:
    told = {name for row in rows("call") for name in names(row[0])} - {"timeout"}
    public = {name for name in dir(TokenFetcher) if not name.startswith("_")}
    assert told == public


def test_errors() -> None:
    codes = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.D1SignerError)
    }
    for row in rows("code"):
        for code in re.findall(r"`([a-z_]+)`", row[0]):
            assert codes[code].default_retryable == row[2].startswith("yes"), code

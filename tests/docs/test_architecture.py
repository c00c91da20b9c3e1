# SPDX-License-Identifier: Apache-2.0
"""The page for who carries on names what is there, and names every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "d1_signer"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TEXT = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)


def named() -> list[str]:
    return re.findall(r"`([A-Za-z0-9_./]+(?:\.py|/))`", TEXT)


def test_every_file_and_folder_that_it_names_is_there() -> None:
    folders = [PACKAGE, ROOT, *(f for f in [*PACKAGE.rglob("*/"), *(ROOT / "tests").rglob("*/")])]
    missing = [name for name in named() if not any((folder / name).exists() for folder in folders)]
    assert len(named()) > 60
    assert missing == []


def test_every_room_is_on_the_map() -> None:
    (drawing,) = re.findall(r"```\n(d1_signer/.*?)```", PAGE, re.DOTALL)
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"  {room}/ " not in drawing} == set()
    facts = {path.name for path in PACKAGE.glob("*.py")} - {"__main__.py"}
    assert {fact for fact in facts if fact not in drawing} == set()


def test_every_symbol_that_it_names_is_defined() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    names = set(re.findall(r"`([A-Za-z_]{4,})`", TEXT)) - {"finally", "except"}
    assert len(names) > 5
    assert {n for n in names if not re.search(rf"\b{n}\b", source)} == set()

# SPDX-License-Identifier: Apache-2.0
"""The page tells the keys that the code trusts."""

from __future__ import annotations

import re
from pathlib import Path

from d1_signer.attestation import FORMATS, PUBLISHED

PAGE = (Path(__file__).parents[2] / "docs/custody/attestation.md").read_text(encoding="utf-8")


def test_every_key_stands_with_its_formats() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| `([0-9a-f]{64})` \| .+ \|$", PAGE, re.MULTILINE)
    told = {digest: (set(re.findall(r"`(.*?)`", formats)), name) for formats, name, digest in rows}
    assert told.keys() == {anchor.spki_sha256 for anchor in PUBLISHED}
    for anchor in PUBLISHED:
        formats, name = told[anchor.spki_sha256]
        assert formats == set(anchor.formats or ())
        assert name.split(" (")[0] in anchor.name


def test_every_format_has_its_section() -> None:
    assert set(re.findall(r"^## .*: `(.*)`$", PAGE, re.MULTILINE)) == FORMATS

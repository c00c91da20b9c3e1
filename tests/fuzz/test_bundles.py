# SPDX-License-Identifier: Apache-2.0
"""Custody bundles with bits, letters and pieces changed: none of them holds."""

from __future__ import annotations

import random

from tests.custody.test_bundle import bundle, signer, wrong


def test_each_random_edit_is_found() -> None:
    dice = random.Random(20261127)
    content = bundle(signer("a"), signer("b"))
    edits = 0
    while edits < 1000:
        edited = bytearray(content)
        place = dice.randrange(len(content))
        match dice.randrange(4):
            case 0:
                edited[place] ^= 1 << dice.randrange(8)
            case 1:
                edited[place] = dice.choice(b'0123456789abcdefABCDEF+/=", \n{}[]\\')
            case 2:
                del edited[place : place + dice.randrange(1, 40)]
            case _:
                end = min(len(content), place + dice.randrange(1, 40))
                edited[place:place] = content[place:end]
        if edited != content:
            edits += 1
            assert wrong(bytes(edited)), (place, bytes(edited[place - 20 : place + 20]))

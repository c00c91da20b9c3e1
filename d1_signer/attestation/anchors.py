# SPDX-License-Identifier: Apache-2.0
"""What is trusted: keys, named by the SHA-256 of their SubjectPublicKeyInfo.

Not certificates: Marvell's root certificate expired on 2025-11-16 and came back with the same key
(docs/adr/0029).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from d1_signer.attestation.refusals import plain, refused

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 256


@dataclass(frozen=True, slots=True)
class Anchor:
    """A trusted key.

    Attributes:
        spki_sha256: SHA-256 of its SubjectPublicKeyInfo in DER, hexadecimal.
        name: For people.
        formats: Formats whose statements it vouches for; None: all.
        hardware: Whether what it vouches for is hardware; None where that is not known.
        owner: ``marvell``: whether it is the key of who owns a partition (Google) or of the
            manufacturer; None: it may be either.
        spki: The key, where no certificate with it comes with the statements.
    """

    spki_sha256: str
    name: str = ""
    formats: frozenset[str] | None = None
    hardware: bool | None = None
    owner: bool | None = None
    spki: bytes | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be an anchor."""
        if not isinstance(self.spki_sha256, str) or not _SHA256.fullmatch(self.spki_sha256):
            raise refused("an anchor is no SHA-256 in hexadecimal, lower case")
        if self.spki is not None and hashlib.sha256(self.spki).hexdigest() != self.spki_sha256:
            raise refused(f"the key of the anchor {plain(self.name)} is not the one it names")


def read_anchors(text: str) -> frozenset[Anchor]:
    """Read a file of anchors.

    Args:
        text: One anchor a line: the SHA-256 of the SubjectPublicKeyInfo in hexadecimal (colons are
            left out), then ``formats=a,b``, ``hardware=yes`` or ``no``, ``owner=yes`` or ``no``,
            and the name; all but the first may be missing. Empty lines, and what follows ``#``,
            say nothing.

    Raises:
        AttestationError: A line cannot be read, or there is no anchor.
    """
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    found = frozenset(_read_line(words) for words in lines if words)
    if not found:
        raise refused("the file of anchors names none")
    return found


def _read_line(words: list[str]) -> Anchor:
    written = [word.partition("=") for word in words[1:] if "=" in word]
    settings = {name: value for name, _, value in written}
    unknown = settings.keys() - {"formats", "hardware", "owner"} or len(settings) != len(written)
    answers = {"yes": True, "no": False, None: None}
    hardware, owner = settings.get("hardware"), settings.get("owner")
    if unknown or hardware not in answers or owner not in answers:
        raise refused(
            f"an anchor's line cannot be read: {plain(' '.join(words))}",
            "Write: SHA256 [formats=a,b] [hardware=yes|no] [owner=yes|no] [name].",
        )
    formats = settings.get("formats")
    return Anchor(
        _normal(words[0]),
        name=" ".join(word for word in words[1:] if "=" not in word),
        formats=None if formats is None else frozenset(formats.split(",")),
        hardware=answers[hardware],
        owner=answers[owner],
    )


def _normal(text: str) -> str:
    return text.replace(":", "").strip().lower()


def anchors_for(
    statement_format: str, given: Iterable[Anchor | str | bytes], published: frozenset[Anchor]
) -> tuple[Anchor, ...]:
    """The anchors that vouch for a format.

    Args:
        statement_format: The format.
        given: Anchors, or their SHA-256 alone, in hexadecimal or as it is: then it means what it
            means in `published`, or if it does not stand there, a key that vouches for any format.
        published: The vendors' keys.

    Raises:
        AttestationError: Something else is given, more than 256, or two that contradict each other.
    """
    if isinstance(given, str | bytes):
        raise refused("anchors are a set of keys, not one text")
    known = {anchor.spki_sha256: anchor for anchor in published}
    anchors: dict[str, Anchor] = {}
    for count, entry in enumerate(given):
        if count == _MOST:
            raise refused(f"there are more than {_MOST} anchors")
        if isinstance(entry, str | bytes):
            name = entry.hex() if isinstance(entry, bytes) else _normal(entry)
            anchor = known.get(name) or Anchor(name)
        elif isinstance(entry, Anchor):
            anchor = entry
        else:
            raise refused(f"an anchor is an Anchor or a SHA-256, not {type(entry).__name__}")
        if anchor.formats is None or statement_format in anchor.formats:
            before = anchors.get(anchor.spki_sha256, anchor)
            anchors[anchor.spki_sha256] = _together(before, anchor)
    return tuple(anchors.values())


def _together(one: Anchor, other: Anchor) -> Anchor:
    """What two entries say of one key, in whatever order a set gives them."""
    told: dict[str, Any] = {}
    for name in ("hardware", "owner"):
        known = {getattr(one, name), getattr(other, name)} - {None}
        if len(known) > 1:
            raise refused(f"two anchors of the key {one.spki_sha256} contradict each other")
        told[name] = next(iter(known), None)
    spki = one.spki if other.spki is None else other.spki
    return replace(max(one, other, key=lambda each: each.name), spki=spki, **told)

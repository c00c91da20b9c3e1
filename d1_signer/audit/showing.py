# SPDX-License-Identifier: Apache-2.0
"""Reading records for people: those that fit a filter, one after the other, unverified."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from d1_signer.audit import folder, reading, record, stored
from d1_signer.errors import AuditError


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which records are wanted: those that fit everything that is given.

    Attributes:
        kid: The key identifier.
        jti: A reference named ``jti``.
        purpose: What a signature is for.
        earliest: First moment, in the form that records have.
        latest: Moment from which on they are not wanted.
    """

    kid: str | None = None
    jti: str | None = None
    purpose: str | None = None
    earliest: str = ""
    latest: str | None = None

    def fits(self, members: Mapping[str, Any]) -> bool:
        """Whether a record is wanted."""
        time = members.get("time")
        return (
            isinstance(time, str)
            and self.earliest <= time
            and (self.latest is None or time < self.latest)
            and self.kid in {None, _text(members, "kid")}
            and self.purpose in {None, _text(members, "purpose")}
            and (self.jti is None or ["jti", self.jti] in references(members))
        )

    def texts(self) -> list[bytes]:
        """What stands in the line of each record that fits."""
        given = [text for text in (self.kid, self.jti, self.purpose) if text is not None]
        return [record.text(text) for text in given]


class Shown(NamedTuple):
    """One line of the records.

    Attributes:
        instance: Name of its instance.
        members: What it tells; None where the line is no record.
    """

    instance: str
    members: dict[str, Any] | None


def records(instances: Sequence[Path], wanted: Filter) -> Iterator[Shown]:
    """The records that are wanted, instance by instance, and each line that is no record.

    The end of something is wanted where its beginning is.

    Raises:
        OSError: A folder cannot be read.
    """
    places = {path.name: path for path in instances}
    texts = wanted.texts()
    for path in instances:
        begun: set[int] = set()
        for _, file in folder.segments(path):
            for line, whole in stored.lines(file):
                if not whole:
                    continue  # of a record that is being written, or was not to its end
                usual = reading.read_usual(line)
                if (
                    usual is not None
                    and usual.begin not in begun
                    and (usual.time < wanted.earliest or any(text not in line for text in texts))
                ):
                    continue
                try:
                    members = record.decode(line) if usual is None else json.loads(line)
                except AuditError:
                    yield Shown(path.name, None)
                    continue
                if wanted.fits(members) or _ends(members, path, begun, places, wanted):
                    number = members.get("number")
                    if members.get("event") == "begin" and isinstance(number, int):
                        begun.add(number)
                    yield Shown(path.name, members)


def references(members: Mapping[str, Any]) -> list[list[str]]:
    """The pairs of name and value that a signature's use has."""
    found = members.get("references")
    pairs = found if isinstance(found, list) else []
    return [
        pair
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)  # noqa: PLR2004
    ]


def _ends(
    members: Mapping[str, Any],
    path: Path,
    begun: set[int],
    places: Mapping[str, Path],
    wanted: Filter,
) -> bool:
    """Whether it is the end of something whose beginning is wanted."""
    begin, name = members.get("begin"), members.get("instance", path.name)
    if members.get("event") != "end" or not isinstance(begin, int):
        return False
    if name == path.name:
        return begin in begun
    if not isinstance(name, str) or name not in places:
        return False
    try:
        return wanted.fits(record.decode(stored.entry(places[name], begin)))
    except AuditError:
        return False


def _text(members: Mapping[str, Any], name: str) -> str | None:
    found = members.get(name)
    return found if isinstance(found, str) else None

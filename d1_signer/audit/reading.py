# SPDX-License-Identifier: Apache-2.0
"""What a verifier takes from each record: quickly from those of signatures, which most are."""

from __future__ import annotations

import re
from typing import NamedTuple

from d1_signer.audit import record
from d1_signer.errors import AuditError

# Canonical records of the two usual forms, with texts in ASCII that need no escape: whatever else
# is a record is read by `record.decode`, which takes five times as long.
_TEXT = rb'"[ !#-\[\]-~]*"'
_NUMBER = rb"(?:0|[1-9][0-9]{0,14})"
_PAIR = rb"\[" + _TEXT + rb"," + _TEXT + rb"\]"
_BEGIN = re.compile(
    rb'\{"action":"sign","backend":T,(?:"clock":T,)?"digest":"[0-9a-f]{64}","event":"begin",'
    rb'"host":T,"kid":T,"number":(N),"process":N(?:,"purpose":T)?'
    rb'(?:,"references":\[(?:P(?:,P)*)?\])?(?:,"sealed":(N))?,"thumbprint":T,"time":(T),'
    rb'"version":T\}'.replace(b"T", _TEXT)
    .replace(b"N", _NUMBER)
    .replace(b"P", _PAIR)
)
_END = re.compile(
    rb'\{"begin":(N),"event":"end","number":(N),"outcome":"[a-z_]+"(?:,"sealed":(N))?'
    rb',"time":(T)\}'.replace(b"T", _TEXT).replace(b"N", _NUMBER)
)


class Told(NamedTuple):
    """What one record tells.

    Attributes:
        number: Its number.
        event: What it is of.
        time: As it stands there.
        sealed: Size of the checkpoint that was made before it; 0 where it tells none.
        begin: The record that it ends; None for another record, or where that is elsewhere.
        rest: All members; empty for the two usual forms.
    """

    number: int
    event: str
    time: str
    sealed: int
    begin: int | None
    rest: dict[str, object]


def read(line: bytes) -> Told:
    """Read one record.

    Raises:
        AuditError: It is none, or lacks what each record has.
    """
    if (usual := read_usual(line)) is not None:
        return usual
    members = record.decode(line)
    event, time = members.get("event"), members.get("time")
    if not isinstance(event, str) or not isinstance(time, str):
        raise AuditError("It does not say what happened, or when.")
    ends = event == "end" and "instance" not in members
    begin = _count(members, "begin") if ends else None
    sealed = _count(members, "sealed") if "sealed" in members else 0
    return Told(_count(members, "number"), event, time, sealed, begin, members)


def read_usual(line: bytes) -> Told | None:
    """Read a record of the two usual forms; None for what is another one, or none."""
    if found := _BEGIN.fullmatch(line):
        number, sealed, time = found.groups()
        return Told(int(number), "begin", time[1:-1].decode(), int(sealed or 0), None, {})
    if found := _END.fullmatch(line):
        begin, number, sealed, time = found.groups()
        told = time[1:-1].decode()
        return Told(int(number), "end", told, int(sealed or 0), int(begin), {})
    return None


def _count(members: dict[str, object], name: str) -> int:
    value = members.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise AuditError(f"Its {name} is no number of a record.")
    return value

# SPDX-License-Identifier: Apache-2.0
"""The trail against the log that the device itself keeps: what it signed and nobody recorded.

A device's log is read as a stream of `DeviceUse`. Where it tells what was signed (OpenBao, Vault:
an HMAC of the digest, which the server can be asked for), records and signatures are matched one
by one; where it tells the key alone (AWS CloudTrail), by key and time, as many as there are.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from d1_signer.audit.showing import Filter, records
from d1_signer.errors import AuditError

_LONGEST_LINE = 1 << 26  # bytes of a line of an audit device: Vault takes requests of 32 MiB
_LARGEST_FILE = 1 << 29  # bytes of a CloudTrail file, unpacked

_NOT_AS_WRITTEN = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError),  # a time without its place in UTC; lists without an end
)


class DeviceUse(NamedTuple):
    """A signature that the device's log tells of.

    Attributes:
        place: Where it stands: the file and the line, or the service's own identity of the event.
        time: When it was.
        key: The key's name there.
        mark: What was signed, as the log has it; None where it does not tell.
    """

    place: str
    time: datetime
    key: str
    mark: str | None


class RecordedUse(NamedTuple):
    """A record of a signature that was begun: its instance and number, time, digest, outcome."""

    place: str
    time: datetime
    digest: bytes
    outcome: str | None


class Reconciled(NamedTuple):
    """What came of it.

    Attributes:
        matched: How many signatures are in both.
        unrecorded: What the device signed and the trail does not have.
        unsigned: Records with the outcome ``done`` that the device's log does not have.
    """

    matched: int
    unrecorded: list[DeviceUse]
    unsigned: list[RecordedUse]


_Use = TypeVar("_Use", DeviceUse, RecordedUse)


class Period(NamedTuple):
    """The time that is looked at: from a moment on, and before another one."""

    start: datetime
    end: datetime

    @classmethod
    def of(cls, earliest: str | None, latest: str | None) -> Self:
        """That of two moments in RFC 3339; None: without an end."""
        start = datetime.min.replace(tzinfo=UTC) if earliest is None else _moment(earliest)
        end = datetime.max.replace(tzinfo=UTC) if latest is None else _moment(latest)
        return cls(start, end)

    def within(self, uses: Iterable[_Use]) -> list[_Use]:
        """What was in it."""
        return [use for use in uses if self.start <= use.time < self.end]

    def near(self, uses: Iterable[_Use], tolerance: float) -> list[_Use]:
        """What was in it by a clock that may differ by so many seconds."""
        most = timedelta(seconds=tolerance)
        return [
            use for use in uses if self.start - use.time <= most and use.time - self.end <= most
        ]


def recorded(instances: Sequence[Path], kid: str | None = None) -> list[RecordedUse]:
    """The signatures that a trail has.

    Raises:
        AuditError: A line is no record, so that nothing can be said.
        OSError: A folder cannot be read.
    """
    begun: dict[tuple[str, object], RecordedUse] = {}
    for instance, members in records(instances, Filter(kid=kid)):
        if members is None:
            raise AuditError(
                f"A line of {instance} is no record.", hint="Run d1-signer audit verify first."
            )
        if members.get("event") == "begin" and members.get("action") == "sign":
            place = f"{instance}#{members.get('number')}"
            try:
                digest = bytes.fromhex(members["digest"])
                use = RecordedUse(place, _moment(members["time"]), digest, None)
            except _NOT_AS_WRITTEN:
                raise AuditError(f"The record {place} has no digest or no time.") from None
            begun[instance, members.get("number")] = use
        elif members.get("event") == "end":
            of = (members.get("instance", instance), members.get("begin"))
            if of in begun:
                begun[of] = begun[of]._replace(outcome=str(members.get("outcome")))
    return list(begun.values())


def by_mark(
    uses: Sequence[RecordedUse], device: Iterable[DeviceUse], mark: Callable[[bytes], str]
) -> Reconciled:
    """Match one by one.

    Args:
        uses: What the trail has.
        device: What the device's log has.
        mark: Tells the mark of a digest; asked once for each.
    """
    left: defaultdict[str, list[RecordedUse]] = defaultdict(list)
    marks = {digest: mark(digest) for digest in {use.digest for use in uses}}
    # Those without a known success are taken last.
    for use in sorted(uses, key=lambda use: use.outcome == "done"):
        left[marks[use.digest]].append(use)
    matched, unrecorded = 0, []
    for one in device:
        if one.mark is not None and left.get(one.mark):
            left[one.mark].pop()
            matched += 1
        else:
            unrecorded.append(one)
    return Reconciled(matched, unrecorded, _done(use for uses in left.values() for use in uses))


def by_time(
    uses: Sequence[RecordedUse], device: Iterable[DeviceUse], tolerance: float
) -> Reconciled:
    """Match by time alone, in order: each signature with the earliest record that is near it.

    Args:
        uses: What the trail has of one key.
        device: What the device's log has of it.
        tolerance: Seconds by which the clocks may differ, and a call may take.
    """
    left = deque(sorted(uses, key=lambda use: use.time))
    within = timedelta(seconds=tolerance)
    matched, unrecorded, unsigned = 0, list[DeviceUse](), list[RecordedUse]()
    for one in sorted(device, key=lambda use: use.time):
        while left and one.time - left[0].time > within:
            unsigned.append(left.popleft())
        if left and left[0].time - one.time <= within:
            left.popleft()
            matched += 1
        else:
            unrecorded.append(one)
    return Reconciled(matched, unrecorded, _done([*unsigned, *left]))


def vault_uses(file: Path, key: str, mount: str) -> Iterator[DeviceUse]:
    """What an audit file of OpenBao or Vault tells of a key's signatures.

    A batch has a mark for each of its inputs. A request that was refused signed nothing.

    Raises:
        AuditError: A line is not one of an audit device's.
        OSError: The file cannot be read.
    """
    path = re.compile(rf"{re.escape(mount)}/sign/{re.escape(key)}(?:/[a-z0-9-]+)?")
    with file.open("rb") as lines:
        read = iter(lambda: lines.readline(_LONGEST_LINE + 1), b"")
        for number, line in enumerate(read, 1):
            place = f"{file.name}:{number}"
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError
                told = json.loads(line)
                request = told["request"]
                if told["type"] != "response" or not path.fullmatch(request["path"].strip("/")):
                    continue
                if told.get("error") or request["operation"] not in {"create", "update"}:
                    continue
                data = request["data"]
                moment = _moment(told["time"])
                for place_in_batch, one in enumerate(data.get("batch_input") or [data]):
                    where = f"{place}.{place_in_batch}" if "batch_input" in data else place
                    mark = one.get("input")
                    yield DeviceUse(where, moment, key, mark if isinstance(mark, str) else None)
            except _NOT_AS_WRITTEN:
                raise AuditError(
                    f"{place} is no line of an audit device.",
                    hint="Give the file of a file audit device of OpenBao or Vault (JSON).",
                ) from None


def cloudtrail_uses(file: Path, key: str) -> Iterator[DeviceUse]:
    """What a CloudTrail file (JSON, packed with gzip or not) tells of an AWS KMS key's signatures.

    Args:
        file: As CloudTrail puts it into its bucket.
        key: The key's ARN, its id, or an alias as the caller named it.

    Raises:
        AuditError: It is no such file.
        OSError: It cannot be read.
    """
    try:
        for event in json.loads(_unpacked(file))["Records"]:
            if event["eventSource"] != "kms.amazonaws.com" or event["eventName"] != "Sign":
                continue
            if "errorCode" in event:
                continue
            named = [str((event.get("requestParameters") or {}).get("keyId"))]
            named += [str(resource["ARN"]) for resource in event.get("resources") or []]
            if any(key == name or name.endswith(f"/{key}") for name in named):
                yield DeviceUse(f"event {event['eventID']}", _moment(event["eventTime"]), key, None)
    except (*_NOT_AS_WRITTEN, EOFError, gzip.BadGzipFile, zlib.error):
        raise AuditError(
            f"{file.name} is no file of CloudTrail.",
            hint="It is JSON with Records, packed with gzip or not.",
        ) from None


def _unpacked(file: Path) -> bytes:
    with file.open("rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
    with gzip.open(file) if packed else file.open("rb") as content:
        data = content.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise AuditError(f"{file.name} is larger than {_LARGEST_FILE} bytes.")
    return data


def _done(uses: Iterable[RecordedUse]) -> list[RecordedUse]:
    return [use for use in uses if use.outcome == "done"]


def _moment(text: Any) -> datetime:
    """A time in RFC 3339, of which nine digits behind the point are too many for Python."""
    told = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    if told.tzinfo is None:
        msg = "no zone"
        raise ValueError(msg)
    return told.astimezone(UTC)

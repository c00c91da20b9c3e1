# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit reconcile` against the audit file of a real OpenBao, and CloudTrail's format."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from d1_signer import AuditError, open_signer
from d1_signer.audit import reconciling
from d1_signer.audit.trail import AuditTrail
from tests.attestation.samples import FOLDER, NeedSamples
from tests.audit.trails import ORIGIN, records, watched_signer
from tests.cli.conftest import Run
from tests.servers import vault

SIGNATURES = int(os.environ.get("D1_SIGNER_RECONCILED", "40"))
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[vault.Vault, Path]]:
    folder = tmp_path_factory.mktemp("vault")
    log = folder / "audit.log"
    with vault.vault(folder, audit_file=log) as running:
        running.make_key("d1")
        running.make_key("other")
        yield running, log


@pytest.fixture
def signed(
    server: tuple[vault.Vault, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A trail, and the part of the audit file from its beginning on."""
    running, log = server
    monkeypatch.setenv("BAO_ADDR", running.url)
    monkeypatch.setenv("BAO_TOKEN", vault.ROOT_TOKEN)
    place, since = tmp_path / "trail", log.stat().st_size
    with (
        AuditTrail(place, origin=ORIGIN, sync="none") as trail,
        open_signer("hashivault://d1", trail=trail) as signer,
    ):
        for number in range(SIGNATURES):
            signer.sign(str(number % (SIGNATURES - 1)).encode())  # one of them twice
    part = tmp_path / "part.log"
    part.write_bytes(log.read_bytes()[since:])
    return place, part


def again(server: tuple[vault.Vault, Path], part: Path, key: str, **fields: object) -> None:
    """Sign without a trail, and add what the audit file says of it."""
    running, log = server
    since = log.stat().st_size
    running.api("POST", f"transit/sign/{key}/sha2-256", **fields)
    with part.open("ab") as file:
        file.write(log.read_bytes()[since:])


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def openbao(run: Run, place: Path, part: Path) -> tuple[int, dict[str, Any]]:
    arguments = ("--openbao", str(part), "--device-key", "d1", "--json")
    result = run("audit", "reconcile", str(place), *arguments)
    return result.status, result.document


def test_every_signature_of_openbao_is_matched(
    run: Run, signed: tuple[Path, Path], server: tuple[vault.Vault, Path]
) -> None:
    status, told = openbao(run, *signed)
    assert (status, told["matched"]) == (0, SIGNATURES)
    again(server, signed[1], "other", input=digest("x"), prehashed=True)
    assert openbao(run, *signed)[0] == 0  # of another key


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": digest("foreign"), "prehashed": True}, 1),
        ({"input": digest("1"), "prehashed": True}, 1),  # recorded once, signed twice
        ({"input": base64.b64encode(b"1").decode()}, 1),
        ({"batch_input": [{"input": digest("f")}, {"input": digest("g")}], "prehashed": True}, 2),
    ],
)
def test_a_foreign_signature_is_named(
    run: Run,
    signed: tuple[Path, Path],
    server: tuple[vault.Vault, Path],
    fields: dict[str, object],
    named: int,
) -> None:
    place, part = signed
    again(server, part, "d1", **fields)
    status, told = openbao(run, place, part)
    assert (status, told["matched"], len(told["unrecorded"])) == (1, SIGNATURES, named)
    line = len(part.read_bytes().splitlines())
    assert told["unrecorded"][0]["place"].startswith(f"part.log:{line}")
    text = run("audit", "reconcile", str(place), "--openbao", str(part), "--device-key", "d1")
    assert "FINDING  part.log" in text.out


def test_a_record_that_the_device_does_not_have_is_named(
    run: Run, signed: tuple[Path, Path]
) -> None:
    place, part = signed
    lines = part.read_bytes().splitlines(keepends=True)
    gone = [n for n, line in enumerate(lines) if b'"type":"response"' in line and b"/sign/" in line]
    del lines[gone[3]]
    part.write_bytes(b"".join(lines))
    status, told = openbao(run, place, part)
    assert (status, told["matched"], len(told["unsigned"])) == (1, SIGNATURES - 1, 1)


def test_what_openbao_does_not_answer(
    run: Run, signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, part = signed
    arguments = ("--openbao", str(part), "--device-key", "d1", "--json")
    wrong = run("audit", "reconcile", str(place), *arguments, "--audit-device", "none")
    assert wrong.status in {1, 2}
    assert "audit" in wrong.document["message"]
    monkeypatch.setenv("BAO_TOKEN", "s.wrong")
    assert run("audit", "reconcile", str(place), *arguments).status in {1, 2}
    part.write_bytes(b"no JSON\n")
    assert "part.log:1" in openbao(run, place, part)[1]["message"]


def event(time: str, number: int, **members: object) -> dict[str, object]:
    """As in AWS's documentation of CloudTrail's entries for Sign."""
    return {
        "eventVersion": "1.08",
        "eventTime": time,
        "eventSource": "kms.amazonaws.com",
        "eventName": "Sign",
        "awsRegion": "eu-central-1",
        "requestParameters": {
            "messageType": "DIGEST",
            "keyId": ARN,
            "signingAlgorithm": "ECDSA_SHA_256",
        },
        "responseElements": None,
        "eventID": f"event-{number}",
        "readOnly": True,
        "resources": [{"accountId": "111122223333", "type": "AWS::KMS::Key", "ARN": ARN}],
        **members,
    }


@pytest.fixture
def amazon(tmp_path: Path) -> tuple[Path, list[dict[str, object]]]:
    place = tmp_path / "trail"
    with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
        for _ in range(3):
            signer.sign(b"x")
    times = [record["time"] for record in records(place) if record.get("action") == "sign"]
    events = [event(f"{time[:19]}Z", number) for number, time in enumerate(times)]
    events.append(event(events[0]["eventTime"], 9, errorCode="AccessDenied"))  # type: ignore[arg-type]
    events.append(event("2026-01-01T00:00:00Z", 10, eventName="GetPublicKey"))
    return place, events


def cloudtrail(
    run: Run, place: Path, events: list[dict[str, object]], key: str = ARN
) -> tuple[int, dict[str, Any]]:
    file = place.parent / "cloudtrail.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"Records": events}).encode()))
    arguments = ("--cloudtrail", str(file), "--device-key", key, "--json")
    result = run("audit", "reconcile", str(place), *arguments)
    return result.status, result.document


def test_cloudtrail_by_key_time_and_count(
    run: Run, amazon: tuple[Path, list[dict[str, object]]]
) -> None:
    place, events = amazon
    for key in (ARN, ARN.partition("/")[2]):
        status, told = cloudtrail(run, place, events, key)
        assert (status, told["matched"]) == (0, 3)
    status, told = cloudtrail(run, place, [*events, {**events[0], "eventID": "foreign"}])
    assert (status, told["matched"], len(told["unrecorded"])) == (1, 3, 1)
    late = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    status, told = cloudtrail(run, place, [*events, event(late, 11)])
    assert told["unrecorded"][0]["place"] == "event event-11"
    status, told = cloudtrail(run, place, events[1:])
    assert (status, len(told["unsigned"])) == (1, 1)


def test_what_is_no_file_of_cloudtrail(
    run: Run, amazon: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    arguments = ("--device-key", ARN, "--json")
    for content in (
        b"",
        b"[]",
        b"\x1f\x8bx",
        gzip.compress(b"{}")[:-8] + bytes(8),
        b'{"Records":[1]}',
    ):
        (tmp_path / "file").write_bytes(content)
        file = ("--cloudtrail", str(tmp_path / "file"))
        result = run("audit", "reconcile", str(amazon[0]), *file, *arguments)
        assert "no file of CloudTrail" in result.document["message"]
    assert run("audit", "reconcile", str(amazon[0]), *arguments).status == 2


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        (
            b'{"type":"response","time":"0001-01-01T00:00:00+23:59","request":{"path":"transit/sign/d1",'
            b'"operation":"update","data":{"input":"x"}}}'
        ),
        (
            b'{"type":"response","time":"2026-11-27T00:00:00Z","request":{"path":"transit/sign/d1",'
            b'"operation":"update","data":[1]}}'
        ),
        b"{}" + b" " * (1 << 26),
    ],
    ids=["nested", "time", "data", "long"],
)
def test_a_hostile_line_of_an_audit_device_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "audit.log").write_bytes(line + b"\n")
    with pytest.raises(AuditError, match=r"audit\.log:1 is no line"):
        [*reconciling.vault_uses(tmp_path / "audit.log", "d1", "transit")]


def test_a_mark_that_is_no_text_matches_nothing(tmp_path: Path) -> None:
    told = {"path": "transit/sign/d1", "operation": "update", "data": {"input": ["x"]}}
    line = {"type": "response", "time": "2026-11-27T00:00:00Z", "request": told}
    (tmp_path / "audit.log").write_text(json.dumps(line))
    device = reconciling.vault_uses(tmp_path / "audit.log", "d1", "transit")
    found = reconciling.by_mark([], device, lambda digest: digest.hex())
    assert len(found.unrecorded) == 1


def test_a_hostile_event_of_cloudtrail_is_told(tmp_path: Path) -> None:
    for content in (
        b"[" * 100_000,
        json.dumps({"Records": [event("0001-01-01T00:00:00+23:59", 1)]}).encode(),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(AuditError, match="no file of CloudTrail"):
            [*reconciling.cloudtrail_uses(tmp_path / "file", ARN)]


def test_a_period_bounds_what_is_held_against_each_other(
    run: Run, amazon: tuple[Path, list[dict[str, object]]]
) -> None:
    place, events = amazon
    file = place.parent / "cloudtrail.json"
    file.write_text(json.dumps({"Records": [*events, event("2026-01-01T00:00:00Z", 12)]}))
    arguments = ("audit", "reconcile", str(place), "--cloudtrail", str(file), "--device-key", ARN)
    assert run(*arguments, "--json").document["unrecorded"][0]["place"] == "event event-12"
    told = run(*arguments, "--from", "2026-02-01", "--json")
    assert (told.status, told.document["matched"]) == (0, 3)
    told = run(*arguments, "--until", "2026-02-01", "--json")
    assert (told.document["matched"], len(told.document["unsigned"])) == (0, 0)
    assert len(told.document["unrecorded"]) == 1


@NeedSamples
def test_the_audit_file_of_an_openbao_elsewhere() -> None:
    file = Path(FOLDER) / "openbao-audit" / "audit.log"
    device = [*reconciling.vault_uses(file, "d1", "transit")]
    told = [json.loads(line) for line in file.read_bytes().splitlines()]
    answers = [line for line in told if line["type"] == "response"]
    signed = [line for line in answers if line["request"]["path"].startswith("transit/sign/d1")]
    assert len(device) == len(signed) > 0
    marks = {f"{number:064x}": use.mark for number, use in enumerate(device)}
    assert all(str(mark).startswith("hmac-sha256:") for mark in marks.values())
    uses = [
        reconciling.RecordedUse(str(number), use.time, bytes.fromhex(digest), "done")
        for number, (digest, use) in enumerate(zip(marks, device, strict=True))
    ]
    found = reconciling.by_mark(uses[1:], device, lambda digest: str(marks[digest.hex()]))
    assert (found.matched, found.unsigned) == (len(device) - 1, [])
    assert found.unrecorded == [device[0]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_cloudtrail_has_a_largest_size(
    run: Run,
    amazon: tuple[Path, list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    packed: bool,
) -> None:
    content = b'{"Records":[]}'
    (tmp_path / "file").write_bytes(gzip.compress(content) if packed else content)
    file = ("--cloudtrail", str(tmp_path / "file"), "--device-key", ARN, "--json")
    for limit, told in ((len(content), None), (len(content) - 1, "file is larger than 13 bytes.")):
        monkeypatch.setattr(reconciling, "_LARGEST_FILE", limit)
        result = run("audit", "reconcile", str(amazon[0]), *file)
        assert result.document.get("message") == told

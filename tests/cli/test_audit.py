# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit`, and the records that every command makes."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d1_signer import generate_key
from d1_signer.audit import folder, record
from d1_signer.sandbox import Sandbox
from tests.audit import second
from tests.audit.trails import records, records_file
from tests.cli.conftest import Result, Run, run_process

ORIGIN = "bank.example/d1"
AUDIT_STEPS = ("audit-record", "audit-folder", "audit-seal")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


@pytest.fixture
def audited(tmp_path: Path, place: Path, key_uri: str) -> dict[str, str]:
    """Variables for a command with a trail that is sealed."""
    sealing = generate_key((tmp_path / "seal.pem").as_uri())
    return {
        "D1_AUDIT_TRAIL": str(place),
        "D1_AUDIT_ORIGIN": ORIGIN,
        "D1_AUDIT_KEY": sealing.uri,
        "D1_SIGNER_KEY": key_uri,
    }


def actions(place: Path) -> list[str]:
    return [record["action"] for record in records(place) if record["event"] == "begin"]


def vkey(run: Run) -> str:
    key: str = run("audit", "seal", "--json").document["verifier_key"]
    return key


def test_every_command_records_and_the_trail_is_whole(
    run: Run,
    audited: dict[str, str],
    settings: dict[str, str],
    place: Path,
    sandbox: Sandbox,
    tmp_path: Path,
) -> None:
    client = generate_key((tmp_path / "client.pem").as_uri()).uri
    assert run("token", "--json", **settings | audited).status == 0
    assert run("assertion").status == 0
    assert run("public-key").status == 0
    assert run("custody").status == 0
    assert run("csr", "--key", client, "--subject", "CN=x").status == 0
    assert run("generate-key", "--key", (tmp_path / "new.pem").as_uri()).status == 0
    assert run("generate-key", "--key", (tmp_path / "new.pem").as_uri()).status == 1
    assert run("check", "--json").document["ok"]
    assert actions(place) == [
        *("open", "sign"),
        *("open", "sign"),
        "open",
        *("open", "custody"),
        *("open", "sign"),
        *("generate-key", "generate-key"),
        *("open", "sign", "custody", "sign"),
    ]
    outcomes = [record["outcome"] for record in records(place) if record["event"] == "end"]
    assert outcomes.count("key_exists") == 1
    assert len(sandbox.exchanges) > 0
    whole = run("audit", "verify", str(place), "--key", vkey(run), "--json").document
    assert whole["whole"] is True
    (instance,) = whole["instances"]
    assert instance["sealed"] == instance["records"] == len(records(place))


def test_a_refused_key_file_is_recorded(run: Run, audited: dict[str, str], place: Path) -> None:
    result = run("public-key", "--key", "file:///nowhere/key.pem", **audited)
    assert result.status == 2
    assert [r["outcome"] for r in records(place) if r["event"] == "end"] == ["secret_source"]


def test_check_tells_of_the_trail(run: Run, audited: dict[str, str]) -> None:
    steps = {step["step"]: step for step in run("check", "--json", **audited).document["steps"]}
    assert "MiB free" in steps["audit-folder"]["detail"]
    assert re.fullmatch(rf"verifier key {ORIGIN}\+[0-9a-f]{{8}}…", steps["audit-seal"]["detail"])


def test_nothing_is_signed_without_the_trail(
    run: Run, audited: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    audited["D1_AUDIT_TRAIL"] = str(tmp_path / "file" / "trail")
    result = run("public-key", "--json", **audited)
    assert result.status == 1
    assert result.document["code"] == "audit_unavailable"
    assert result.document["retryable"] is True


def test_half_of_the_settings_is_refused(run: Run, audited: dict[str, str]) -> None:
    del audited["D1_AUDIT_TRAIL"]
    result = run("public-key", "--json", **audited)
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert "D1_AUDIT_TRAIL" in result.document["hint"]


def test_the_sealing_key_signs_nothing_else(run: Run, audited: dict[str, str]) -> None:
    audited["D1_SIGNER_KEY"] = audited["D1_AUDIT_KEY"]
    result = run("public-key", "--json", **audited)
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert "seals" in result.document["message"]


def test_a_tampered_record_is_named(run: Run, audited: dict[str, str], place: Path) -> None:
    run("public-key", **audited)
    key = vkey(run)
    file = records_file(place)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"bank-2026"', b'"bank-2027"')
    file.write_bytes(b"".join(lines))
    result = run("audit", "verify", str(place), "--key", key)
    assert result.status == 1
    assert "FINDING  Record 2: " in result.out
    assert "0 of them sealed by 0 accepted checkpoints" in result.out
    assert "\nNot whole: 1 finding. Leave the folder as it is, keep a copy, and" in result.out
    (instance,) = folder.instances(place)
    document = run("audit", "verify", str(instance), "--key", key, "--json").document
    assert document["whole"] is False
    assert document["instances"][0]["findings"][0]["record"] == 2


def test_verify_reads_a_key_from_a_file_and_kept_checkpoints(
    run: Run, audited: dict[str, str], place: Path, tmp_path: Path
) -> None:
    run("public-key", **audited)
    (tmp_path / "vkey").write_text(vkey(run) + "\n")
    (instance,) = folder.instances(place)
    kept = tmp_path / "kept"
    kept.write_bytes((instance / folder.CHECKPOINTS).read_bytes())
    key = f"file:{tmp_path / 'vkey'}"
    assert run("audit", "verify", str(place), "--key", key, "--since", str(kept)).status == 0
    records_file(place).unlink()
    (instance / folder.CHECKPOINTS).unlink()
    result = run("audit", "verify", str(place), "--key", key, "--since", str(kept))
    assert result.status == 1
    assert "missing" in result.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["FOLDER"],
        ["--key", "VKEY"],
        ["FOLDER", "--key", "nonsense"],
        ["FOLDER", "--key", "file:/nowhere"],
        ["/nowhere/trail", "--key", "VKEY"],
        ["FOLDER", "--key", "VKEY", "--since", "/nowhere"],
        ["FOLDER", "--key", "VKEY", "--since", "FOLDER"],
        ["FOLDER", "--key", "VKEY", "--unknown"],
    ],
)
def test_wrong_usage_has_status_2(
    run: Run, audited: dict[str, str], place: Path, arguments: list[str]
) -> None:
    run("public-key", **audited)
    values = {"FOLDER": str(place), "VKEY": vkey(run)}
    result = run("audit", "verify", *(values.get(text, text) for text in arguments))
    assert result.status == 2


def test_an_empty_folder_is_not_whole(run: Run, audited: dict[str, str], tmp_path: Path) -> None:
    run("public-key", **audited)
    (tmp_path / "empty").mkdir()
    result = run("audit", "verify", str(tmp_path / "empty"), "--key", vkey(run))
    assert result.status == 1
    assert "no instance" in result.out


def test_verify_reads_nothing_but_its_arguments(audited: dict[str, str], place: Path) -> None:
    assert run_process("public-key", **audited).status == 0
    key = json.loads(run_process("audit", "seal", "--json", **audited).out)["verifier_key"]
    audited |= {"D1_AUDIT_KEY": "file:///nowhere", "D1_SIGNER_KEY": "file:///nowhere"}
    assert run_process("audit", "verify", str(place), "--key", key, **audited).status == 0


def test_a_proof_shows_one_record_alone(
    run: Run, audited: dict[str, str], place: Path, tmp_path: Path
) -> None:
    for _ in range(3):
        run("custody", **audited)
    key = vkey(run)
    lines = records_file(place).read_bytes().splitlines()
    file = tmp_path / "record.tlog-proof"
    for number, line in enumerate(lines):
        assert run("audit", "proof", str(number), "-o", str(file), "--force").status == 0
        assert second.verify_proof(file.read_bytes(), line, key) == number
    written = file.read_bytes()
    assert run("audit", "proof", "0", "-o", str(file)).status == 2
    assert file.read_bytes() == written
    document = run("audit", "proof", "1", str(place), "--json").document
    assert document["record"].encode() == lines[1]
    result = run("audit", "proof", str(len(lines)), "--json")
    assert (result.status, result.document["code"]) == (1, "audit")


def test_seal_makes_up_for_processes_that_are_gone(
    run: Run, audited: dict[str, str], place: Path
) -> None:
    sealing = audited.pop("D1_AUDIT_KEY")
    run("public-key", **audited)
    result = run("audit", "proof", "1", "--json")
    assert "not sealed" in result.document["message"]
    document = run("audit", "seal", "--json", D1_AUDIT_KEY=sealing).document
    (instance,) = folder.instances(place)
    assert document["sealed"] == {instance.name: len(records(place))}
    whole = run("audit", "verify", str(place), "--key", document["verifier_key"], "--json").document
    assert whole["instances"][0]["sealed"] == len(records(place))


def test_a_pin_in_the_uri_is_not_recorded(audited: dict[str, str], place: Path) -> None:
    audited["D1_SIGNER_KEY"] = "pkcs11:token=x;object=y?pin-value=s3cret-pin"
    run_process("public-key", **audited)
    (begin,) = [record for record in records(place) if record["event"] == "begin"]
    assert begin["key"] == "pkcs11:token=x;object=y"
    assert b"s3cret" not in records_file(place).read_bytes()


def test_what_was_written_anew_after_its_checkpoints_were_removed_is_not_called_whole(
    run: Run, audited: dict[str, str], place: Path
) -> None:
    """Nothing inside shows that there were checkpoints: so it must not be told as whole."""
    run("public-key", **audited)
    arguments = ("audit", "verify", str(place), "--key", vkey(run))
    assert run(*arguments).out.endswith("\nWhole: no findings.\n")
    (instance,) = folder.instances(place)
    (instance / folder.CHECKPOINTS).unlink()
    file = records_file(place)
    told = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert (told[-1]["event"], "sealed" in told[-1]) == ("closed", False)
    forged = [{**each, "host": "elsewhere"} if "host" in each else each for each in told[:-1]]
    file.write_bytes(b"".join(record.encode(each) + b"\n" for each in forged))
    result = run(*arguments)
    assert result.status == 0
    assert "Whole" not in result.out
    last = f"{len(forged)} records may be of anybody who can write the folder.\n"
    assert result.out.endswith(f"Nothing was found in what is sealed. {last}")
    assert run(*arguments, "--json").document["unsealed"] == len(forged)


def steps_of(result: Result) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in result.document["steps"]}


def test_check_looks_at_record_folder_and_seal(
    run: Run, audited: dict[str, str], place: Path
) -> None:
    wanted = [*("--require", "audit-record"), *("--require", "audit-folder")]
    result = run("check", "--json", *wanted, "--require", "audit-seal", **audited)
    assert result.status == 0
    told = steps_of(result)
    assert {told[name]["status"] for name in AUDIT_STEPS} == {"ok"}
    assert [record["event"] for record in records(place)][:2] == ["opened", "check"]
    assert [record["sealed"] for record in records(place) if "sealed" in record] == [2]


def test_check_without_a_sealing_key_says_that_nothing_is_sealed(
    run: Run, audited: dict[str, str]
) -> None:
    del audited["D1_AUDIT_KEY"]
    result = run("check", "--json", **audited)
    assert result.status == 0
    told = steps_of(result)
    assert (told["audit-record"]["status"], told["audit-seal"]["status"]) == ("ok", "skipped")
    assert "D1_AUDIT_KEY" in told["audit-seal"]["detail"]
    result = run("check", "--json", "--require", "audit-seal", **audited)
    assert (result.status, steps_of(result)["audit-seal"]["status"]) == (1, "failed")


def test_check_of_a_folder_in_which_everybody_writes(
    run: Run, audited: dict[str, str], place: Path
) -> None:
    place.mkdir()
    place.chmod(0o777)
    result = run("check", "--json", **audited)
    told = steps_of(result)
    assert result.status == 1
    assert {told[name]["status"] for name in ("audit-record", "audit-seal", "signature")} == {"ok"}
    assert "Every user" in told["audit-folder"]["detail"]
    assert f"chmod o-w {place}" in told["audit-folder"]["error"]["hint"]
    place.chmod(0o770)
    assert run("check", **audited).status == 0


@pytest.mark.parametrize(
    ("room", "said"),
    [
        ({"f_bavail": 1023}, "room for 63 MiB only"),
        ({"f_favail": 99}, "room for 99 more files only"),
        ({"f_bavail": 1024, "f_favail": 100}, None),
        ({"f_files": 0, "f_favail": 0}, None),  # btrfs and others do not count them
    ],
)
def test_check_of_a_disk_that_is_nearly_full(
    run: Run,
    audited: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    room: dict[str, int],
    said: str | None,
) -> None:
    disk = {"f_frsize": 65_536, "f_bavail": 10_000, "f_files": 10_000, "f_favail": 10_000}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**(disk | room)))
    result = run("check", "--json", **audited)
    told = steps_of(result)["audit-folder"]
    if said is None:
        assert (result.status, told["status"]) == (0, "ok")
    else:
        assert (result.status, told["status"]) == (1, "failed")
        assert said in told["detail"]


def test_check_of_a_folder_that_cannot_be_made(
    run: Run, audited: dict[str, str], settings: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    audited["D1_AUDIT_TRAIL"] = str(tmp_path / "file" / "trail")
    result = run("check", "--json", **settings | audited)
    told = steps_of(result)
    assert result.status == 1
    assert told["audit-record"]["error"]["code"] == "audit_unavailable"
    rest = {name: step["status"] for name, step in told.items() if name != "audit-record"}
    names = ("key", "client-certificate", "endpoint", "access-token")
    assert rest == dict.fromkeys(names, "skipped")


def test_check_of_a_folder_that_takes_no_record(
    run: Run, audited: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    result = run("check", "--json", **audited)
    told = steps_of(result)
    assert result.status == 1
    assert "No space left" in told["audit-record"]["detail"]
    assert told["key"]["status"] == "skipped"
    assert place.exists()


def test_check_of_a_sealing_key_that_is_not_there(
    run: Run, audited: dict[str, str], tmp_path: Path
) -> None:
    audited["D1_AUDIT_KEY"] = (tmp_path / "nowhere.pem").as_uri()
    result = run("check", "--json", **audited)
    told = steps_of(result)
    assert result.status == 1
    assert told["audit-seal"]["status"] == "failed"
    assert told["audit-seal"]["error"]["code"] == "secret_source"
    assert told["key"]["status"] == "skipped"
    text = run("check", **audited)
    assert "Failed: audit-seal (audit trail" in text.out


def test_check_of_the_sealing_key_as_the_key(run: Run, audited: dict[str, str]) -> None:
    audited["D1_SIGNER_KEY"] = audited["D1_AUDIT_KEY"]
    result = run("check", "--json", **audited)
    assert result.status != 0
    assert "seals the audit trail" in result.out + result.err

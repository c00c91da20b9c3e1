# SPDX-License-Identifier: Apache-2.0
"""docs/audit: openssl as printed there, and members of records as the table names them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from opentelemetry.trace import NonRecordingSpan, SpanContext, use_span

from d1_signer import AuditTrail, CustodyPolicy, Evidence, Signer, Use, generate_key
from d1_signer.audit import folder
from d1_signer.audit.note import VerifierKey
from d1_signer.custody.evidence import ANSWERS
from tests.audit import second
from tests.audit.trails import ORIGIN, SIGNING, records, sealing_signer, verifier_key
from tests.servers.tsa import tsa
from tests.signing.backends import KeyBackend

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "audit" / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs" / "audit" / "format.md").read_text(encoding="utf-8")


def trail_of(tmp_path: Path) -> Path:
    place = tmp_path / "trail"
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        policy = CustodyPolicy(generated_in_place=True)
        evidence = Evidence(
            location="unit:key", exportable=None, generated_in_place=True, hardware=None, facts=()
        )
        backend = KeyBackend(SIGNING, evidence=evidence)
        with Signer(backend, trail=trail, custody_policy=policy) as signer:
            signer.sign(b"x", use=Use(purpose="p", references=(("jti", "j"),)))
            trail.seal()
            signer.custody()
    return place


def run(block: str, instance: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=instance,
        env=os.environ | {"VKEY": str(verifier_key())},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_openssl_verifies_a_checkpoint_as_printed(tmp_path: Path) -> None:
    (instance,) = folder.instances(trail_of(tmp_path))
    (block,) = re.findall(r"^```sh\n(tail .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert run(block, instance) == "0 Verified OK\n"
    text = (instance / "text").read_text().splitlines()
    lines = (instance / "records-0000000000000000.jsonl").read_bytes().splitlines()
    assert text[:2] == [ORIGIN, str(len(lines))]
    assert base64.b64decode(text[2]) == second.mth(lines)
    checkpoints = instance / folder.CHECKPOINTS
    altered = checkpoints.read_bytes().replace(f"\n{len(lines)}\n".encode(), b"\n1\n")
    checkpoints.write_bytes(altered)
    assert run(block, instance).startswith("1 Verification failure")


def test_the_leaf_of_a_record_as_printed(tmp_path: Path) -> None:
    (instance,) = folder.instances(trail_of(tmp_path))
    (block,) = re.findall(r"^```sh\n(head -n 1 .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (line, *_) = (instance / "records-0000000000000000.jsonl").read_bytes().splitlines()
    assert hashlib.sha256(b"\x00" + line).hexdigest() in run(block, instance)


def test_every_member_of_a_record_is_in_the_table(tmp_path: Path) -> None:
    rows = re.findall(r"^\| (`.*?) \|", FORMAT, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)}
    members = {member for record in records(trail_of(tmp_path)) for member in record}
    assert members - named == set()
    assert len(members) > 20
    assert {"demands", *ANSWERS} <= members & named


def test_every_command_runs_as_printed(tmp_path: Path) -> None:
    place = trail_of(tmp_path)
    (instance,) = folder.instances(place)
    program = tmp_path / "bin" / "d1-signer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m d1_signer "$@"\n')
    program.chmod(0o755)
    (tmp_path / "vkey.txt").write_text(f"{verifier_key()}\n")
    shutil.copy(tmp_path / "vkey.txt", tmp_path / "vkeys.txt")
    shutil.copy(instance / folder.CHECKPOINTS, tmp_path / "host-b.checkpoints")
    generated = generate_key((tmp_path / "collector.pem").as_uri())
    collector = VerifierKey("collector.example", generated.public_key)
    (tmp_path / "2026-11-01.json.gz").write_bytes(gzip.compress(b'{"Records": []}'))
    with tsa(tmp_path / "tsa") as authority:
        shutil.copy(authority.ca_file, tmp_path / "tsa-root.pem")
        printed = {
            "/var/lib/d1/audit": str(place),
            "/srv/all-trails": str(place),
            "FOLDER/INSTANCE": str(instance),
            "audit proof 4711": "audit proof 1",
            "bank.example/d1+1b2c3d4e+Ajk…": str(verifier_key()),
            "ssh vault.bank.example 'cat > checkpoints-2026-11-27'": "cat > checkpoints-2026-11-27",
            "https://tsa.example/": authority.url,
            " stamp collection ": " stamp collection-2026-11-27 ",
        }
        blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(d1-signer audit proof .*?)`", PAGE)
        # openssl's are run elsewhere, as is what needs an OpenBao.
        commands = [line for line in lines if "/audit" in line or "d1-signer" in line]
        commands = [line for line in commands if "--openbao" not in line]
        assert len(commands) >= 12
        for line in commands:
            command = line
            for text, real in printed.items():
                command = command.replace(text, real)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=tmp_path,
                env=os.environ
                | {
                    "PATH": f"{program.parent}:{os.environ['PATH']}",
                    "PYTHONPATH": str(ROOT),
                    "D1_AUDIT_KEY": generated.uri,
                    "D1_AUDIT_ORIGIN": collector.name,
                    "COLLECTOR_VKEY": str(collector),
                },
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "trail.html").stat().st_size


def test_a_record_is_found_by_its_trace_as_printed(tmp_path: Path) -> None:
    place = tmp_path / "trail"
    (block,) = re.findall(
        r"^```sh\n(d1-signer audit show [^\n]* 'select.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    (trace_id,) = re.findall(r"[0-9a-f]{32}", block)
    span = NonRecordingSpan(SpanContext(int(trace_id, 16), 7, is_remote=True))
    with (
        AuditTrail(place, origin=ORIGIN) as trail,
        Signer(KeyBackend(SIGNING), trail=trail) as signer,
    ):
        signer.sign(b"x")
        with use_span(span):
            signer.sign(b"y")
    command = block.replace("d1-signer", f"{sys.executable} -m d1_signer")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("/var/lib/d1/audit", str(place))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    digest = json.loads(done.stdout)["record"]["digest"]
    assert digest == hashlib.sha256(b"y").hexdigest()

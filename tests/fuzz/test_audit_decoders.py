# SPDX-License-Identifier: Apache-2.0
"""What an auditor reads of others: records, verifier keys, notes, checkpoints, proofs."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings

from d1_signer.audit import reading, record
from d1_signer.audit.note import Checkpoint, Proof, SignedNote, VerifierKey
from d1_signer.errors import AuditError
from d1_signer.es256 import PublicKey
from d1_signer.events import Recordable
from tests.audit import second
from tests.fuzz.mutations import mutated

FUZZ = settings.get_profile("fuzz")
PRIVATE = ec.derive_private_key(0xD1, ec.SECP256R1())
KEY = VerifierKey("bank.example/d1", PublicKey(PRIVATE.public_key()))
BEGIN: dict[str, Recordable] = {
    "action": "sign",
    "backend": "pkcs11",
    "clock": "synchronized",
    "digest": "0a" * 32,
    "event": "begin",
    "host": "host",
    "kid": "bank-2026",
    "number": 17,
    "process": 4,
    "purpose": "d1-assertion",
    "references": [["iss", "a"], ["jti", "b"]],
    "sealed": 9,
    "thumbprint": "t",
    "time": "2026-11-27T07:21:24.123456Z",
    "version": "d1-signer 0.1.0",
}
END: dict[str, Recordable] = {
    "begin": 17,
    "event": "end",
    "number": 18,
    "outcome": "done",
    "sealed": 3,
    "time": "2026-11-27T07:21:24.123457Z",
}
LINES = (record.encode(BEGIN), record.encode(END), record.encode({**END, "instance": "é\n"}))


def _note() -> bytes:
    text = Checkpoint(
        KEY.name, 5, second.mth([b"%d" % n for n in range(5)]), ("instance x",)
    ).text()
    r, s = utils.decode_dss_signature(PRIVATE.sign(text.encode(), ec.ECDSA(SHA256())))
    raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return SignedNote(text, (KEY.signature(raw),)).encode()


NOTE = _note()
PROOF = Proof(3, tuple(second.path(3, [b"%d" % n for n in range(5)])), NOTE, extra=b"3").encode()


@FUZZ
@given(mutated(*LINES))
def test_record(line: bytes) -> None:
    told: dict[str, Any] | None = None
    with contextlib.suppress(AuditError):
        told = record.decode(line)
        assert record.encode(told) == line
        assert json.loads(line) == told
    try:
        quick = reading.read(line)
    except AuditError:
        return
    # The quick way takes nothing that the strict one refuses, and reads the same in it.
    assert told is not None
    assert (quick.number, quick.event, quick.time) == (told["number"], told["event"], told["time"])
    assert quick.sealed == told.get("sealed", 0)
    if quick.event == "end" and "instance" not in told:
        assert quick.begin == told["begin"]


def test_the_usual_records_are_read_the_quick_way() -> None:
    assert [reading.read(line).rest for line in LINES[:2]] == [{}, {}]
    assert reading.read(LINES[2]).rest == json.loads(LINES[2])


@FUZZ
@given(mutated(str(KEY).encode()))
def test_verifier_key(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        key = VerifierKey.parse(text)
    except AuditError:
        return
    assert str(key) == text.removesuffix("\n")


@FUZZ
@given(mutated(NOTE))
def test_checkpoint(data: bytes) -> None:
    try:
        note = SignedNote.parse(data)
        assert note.encode() == data, "one note has one form"
        note.verified_by([KEY])
        told = Checkpoint.parse(note.text)
    except AuditError:
        return
    assert (told.origin, told.size) == (KEY.name, 5), "what is signed was not changed"
    assert second.open_note(data, str(KEY))[1] == "5"


@FUZZ
@given(mutated(PROOF))
def test_proof(data: bytes) -> None:
    try:
        proof = Proof.parse(data)
    except AuditError:
        return
    assert proof.encode() == data, "one proof has one form"

# SPDX-License-Identifier: Apache-2.0
"""The face: what it takes, how much of it, and that nothing but AttestationError comes out."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer import CustodyError
from d1_signer.attestation import (
    FORMATS,
    PUBLISHED,
    Anchor,
    AttestationError,
    Statement,
    read_anchors,
    verify,
)
from d1_signer.es256 import PublicKey
from tests.attestation.changing import refusal
from tests.attestation.makers import KEY, MAKERS, NONCE, ROOT, luna, tpm2
from tests.attestation.pki import NOW, ec_key, pem, rsa_key, spki, spki_sha256

EachFormat = pytest.mark.parametrize("name", MAKERS)


def test_makers_are_there_for_every_format() -> None:
    assert MAKERS.keys() == FORMATS


@EachFormat
def test_it_is_about_the_key_that_is_asked_for(name: str) -> None:
    made = MAKERS[name]()
    for key in (spki(KEY), PublicKey(KEY.public_key())):
        assert made.verify(public_key=key).spki == spki(KEY)
    for other in (ec_key("another"), rsa_key("another"), ec.generate_private_key(ec.SECP384R1())):
        assert "about another key" in refusal(made, public_key=spki(other))


@EachFormat
def test_a_nonce_is_carried_or_refused(name: str) -> None:
    made = MAKERS[name]()
    if name not in {"tpm2", "yubihsm"}:
        assert "carries none" in refusal(made, nonce=b"n")
        kept = replace(made, statement=replace(made.statement, nonce=b"n"))
        assert "carries none" in refusal(kept)
    assert "nonce" in refusal(made, nonce=b"another")
    assert "a nonce is empty" in refusal(made, nonce=b"")


@EachFormat
@pytest.mark.parametrize(
    "asked",
    [
        {"at": "2026"},
        {"at": float("nan")},
        {"at": float("inf")},
        {"at": True},
        {"public_key": b"x"},
        {"public_key": "x"},
        {"public_key": b""},
        {"nonce": "text"},
        {"anchors": None},
        {"anchors": "abc"},
        {"anchors": b"abc"},
        {"anchors": [1]},
        {"anchors": ["zz" * 32]},
        {"anchors": ["ab" * 16]},
        {"anchors": [b"ab" * 32]},
        {"anchors": [f"{number:064x}" for number in range(300)]},
    ],
    ids=str,
)
def test_arguments_that_are_no_such_thing(name: str, asked: dict[str, Any]) -> None:
    with pytest.raises(AttestationError):
        MAKERS[name]().verify(**asked)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (None, "not a Statement"),
        (b"bytes", "not a Statement"),
        (Statement(format="unknown"), "unknown is not known"),
        (Statement(format=None), "None is not known"),  # type: ignore[arg-type]
        (Statement(format=[]), "[] is not known"),  # type: ignore[arg-type]
        (Statement(format="tpm2", content="text"), "not all bytes"),  # type: ignore[arg-type]
        (Statement(format="tpm2", certificates="text"), "not all bytes"),  # type: ignore[arg-type]
        (Statement(format="tpm2", certificates=b"der"), "not all bytes"),  # type: ignore[arg-type]
        (Statement(format="tpm2", certificates=None), "cannot be read"),  # type: ignore[arg-type]
        (Statement(format="tpm2", parts=[1]), "not a mapping"),  # type: ignore[arg-type]
        (Statement(format="tpm2", parts={"attest": None}), "not all bytes"),  # type: ignore[dict-item]
        (Statement(format="tpm2", content=bytes(262_145)), "longer than 262144"),
        (Statement(format="tpm2", certificates=(bytes(131_073),) * 2), "longer than 262144"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_statements_that_are_none(statement: Any, told: str) -> None:
    with pytest.raises(AttestationError) as caught:
        verify(statement)
    assert told in caught.value.message


@pytest.mark.parametrize("at", [float("nan"), float("inf"), True])
def test_a_moment_is_a_number_of_seconds(at: float) -> None:
    assert "not a number of seconds" in refusal(luna(), at=at)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_garbage_is_refused_in_bounded_time(name: str) -> None:
    begin = pem(b"")[:27]
    million = 1_000_000
    for garbage in (b"\0" * million, b"\x30" * million, begin * 40_000, b"[" * million):
        for content in (garbage, garbage[:200_000]):
            started = time.perf_counter()
            for statement in (
                Statement(format=name, content=content),
                Statement(format=name, content=b"x", certificates=(content,)),
                Statement(format=name, parts=dict.fromkeys(["attest", "public"], content)),
            ):
                with pytest.raises(AttestationError):
                    verify(statement)
            assert time.perf_counter() - started < 20, "a generous limit for a loaded machine"


def test_deep_nesting_is_refused() -> None:
    deep = b""
    while len(deep) < 200_000:
        size = len(deep)
        octets = size.to_bytes((size.bit_length() + 7) // 8, "big") if size > 0x7F else b""
        deep = bytes([0x30, 0x80 | len(octets) if octets else size]) + octets + deep
    with pytest.raises(AttestationError) as caught:
        verify(Statement(format="luna-pkc", content=deep))
    assert "nested too deeply" in caught.value.message


def test_what_parsers_of_others_raise_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    from d1_signer.attestation import verifier

    for kind in (RecursionError, MemoryError, KeyError, AssertionError, StopIteration):

        def fail(*_: object, kind: type[Exception] = kind) -> None:
            raise kind

        monkeypatch.setitem(verifier._VERIFIERS, "luna-pkc", fail)
        with pytest.raises(AttestationError) as caught:
            luna().verify()
        assert caught.value.details == {"cause": kind.__name__}


def test_the_error_is_one_of_custody() -> None:
    with pytest.raises(CustodyError) as caught:
        verify(Statement(format="luna-pkc"))
    assert caught.value.code == "attestation"


def test_the_vendors_keys_are_what_they_say() -> None:
    assert len({anchor.spki_sha256 for anchor in PUBLISHED}) == len(PUBLISHED) == 9
    for anchor in PUBLISHED:
        assert anchor.formats
        assert anchor.formats <= FORMATS
        assert anchor.hardware is True
        assert hashlib.sha256(anchor.spki or b"").hexdigest() == anchor.spki_sha256
    assert {each for anchor in PUBLISHED for each in anchor.formats or ()} == FORMATS - {"tpm2"}


def test_a_vendors_hash_means_what_it_means_there() -> None:
    """Yubico's root stays Yubico's where it is named by its hash, and vouches for no TPM."""
    (yubico,) = [each for each in PUBLISHED if each.name == "Yubico YubiHSM Root CA"]
    from d1_signer.attestation.anchors import anchors_for

    assert anchors_for("yubihsm", [yubico.spki_sha256], PUBLISHED) == (yubico,)
    assert anchors_for("tpm2", [yubico.spki_sha256], PUBLISHED) == ()
    for ours in ("ab" * 32, "AB:" * 31 + "AB", b"\xab" * 32):
        assert anchors_for("tpm2", PUBLISHED | {ours}, PUBLISHED) == (Anchor("ab" * 32),)


def test_anchors_are_a_bounded_set() -> None:
    assert "not one text" in refusal(luna(), anchors="ab" * 32)
    many = [f"{number:064x}" for number in range(257)]
    assert "more than 256 anchors" in refusal(luna(), anchors=many)


def test_two_entries_of_one_key_are_one_anchor_in_whatever_order() -> None:
    from d1_signer.attestation.anchors import anchors_for

    (luna_root,) = [each for each in PUBLISHED if each.name.startswith("Chrysalis")]
    digest = luna_root.spki_sha256
    again = [Anchor(digest), Anchor(digest, name="A", formats=frozenset({"luna-pkc"}))]
    others = [Anchor(digest, formats=frozenset({"yubihsm"}), hardware=False)]
    for given in permutations([luna_root, *again, *others]):
        (found,) = anchors_for("luna-pkc", given, PUBLISHED)
        assert (found.hardware, found.spki, found.name) == (True, luna_root.spki, luna_root.name)
        (found,) = anchors_for("yubihsm", given, PUBLISHED)
        assert (found.hardware, found.spki) == (False, None)
    for other in (Anchor(digest, hardware=False), Anchor(digest, owner=True)):
        for given in permutations([luna_root, Anchor(digest, owner=False), other]):
            with pytest.raises(AttestationError, match="contradict each other"):
                anchors_for("luna-pkc", given, PUBLISHED)


def test_an_anchor_is_the_hash_of_its_key() -> None:
    with pytest.raises(AttestationError):
        Anchor("00" * 32, spki=spki(KEY))
    for name in ("", "AB" * 32, "ab" * 31, None):
        with pytest.raises(AttestationError):
            Anchor(name)  # type: ignore[arg-type]


def test_a_file_of_anchors() -> None:
    digest = spki_sha256(ROOT.key)
    colons = ":".join(digest[at : at + 2] for at in range(0, 64, 2)).upper()
    text = f"# ours\n\n{colons} formats=luna-pkc,tpm2 hardware=yes owner=no our root # here\n"
    (anchor,) = read_anchors(text)
    expected = Anchor(
        digest,
        name="our root",
        formats=frozenset({"luna-pkc", "tpm2"}),
        hardware=True,
        owner=False,
    )
    assert anchor == expected
    assert read_anchors(digest) == {Anchor(digest)}
    for wrong in (
        "",
        "#",
        "abc",
        f"{digest} hardware=maybe",
        f"{digest} format=tpm2",
        f"{digest} hardware=no hardware=yes",
        f"{digest} a=b",
    ):
        with pytest.raises(AttestationError):
            read_anchors(wrong)


def test_it_reads_no_file_no_clock_and_no_network() -> None:
    """An audit hook sees every file that is opened, every socket and every process."""
    program = """
import sys
from tests.attestation.makers import MAKERS
mades = [maker() for maker in MAKERS.values()]
for made in mades:
    made.verify()
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
for made in mades:
    made.verify()
outside = {"open", "socket", "subprocess", "os", "time"}
bad = [event for event in seen if event.split(".")[0] in outside]
assert not bad, bad
print(len(mades))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(len(FORMATS))


def test_facts_and_limits_are_for_people() -> None:
    for made in (maker() for maker in MAKERS.values()):
        verified = made.verify()
        for limit in verified.limits:
            assert limit.endswith(".")
            assert limit.isprintable()
        assert all(isinstance(each, bool | int | str | None) for each in verified.facts.values())
    assert tpm2().verify(nonce=NONCE, at=NOW).facts["nonce"] == NONCE.hex()

# SPDX-License-Identifier: Apache-2.0
"""The bundle: by OpenSSL alone, edited at random, without anything but its own bytes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from d1_signer.attestation import PUBLISHED
from d1_signer.custody.bundle import KeyReport, encoded, make_bundle, signed_part
from d1_signer.custody.difference import changes
from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.custody.report import CustodyReport, Maker
from d1_signer.custody.verifying import Checked, check_bundle
from d1_signer.errors import ConfigurationError, CustodyError, D1SignerError
from d1_signer.es256 import der_from_raw
from d1_signer.signing.signer import Signer
from tests.signing.backends import KeyBackend

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "custody" / "format.md").read_text()
VERIFY, THUMBPRINT = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
MAKER = Maker(host="h", user="ü\u202e", d1_signer="0", python="3")


def signer(name: str = "a", **answers: Any) -> Signer:
    told = {"exportable": False, "generated_in_place": True, "hardware": None, **answers}
    facts = (Fact(name='"quote"\n', value=None, source="</script>"),)
    evidence = Evidence(location="unit:key", facts=facts, **told)
    return Signer(KeyBackend(ec.generate_private_key(ec.SECP256R1()), evidence=evidence), kid=name)


def bundle(
    *signers: Signer,
    challenge: str | None = "2026-11-27 ü",
    away: bool = False,
    reports: list[CustodyReport] | None = None,
) -> bytes:
    keys: list[Any] = [
        (KeyReport(use="assertion", location="unit:key", report=report), one)
        for one, report in zip(signers, reports or [s.custody() for s in signers], strict=True)
    ]
    if away:
        error = D1SignerError("It is away.")
        keys.insert(0, (KeyReport(use="client", location="unit:away", error=error), None))
    return make_bundle(keys, challenge=challenge, made_by=MAKER, made_at=1_795_766_314)


def check(content: bytes, **options: Any) -> Checked:
    return check_bundle(content, anchors=PUBLISHED, **options)


def wrong(content: bytes, **options: Any) -> str:
    """What is wrong with a bundle; empty where it holds."""
    try:
        return " ".join(check(content, **options).all_findings)
    except CustodyError as error:
        return error.message


@pytest.mark.parametrize("number", [1, 2])
def test_openssl_verifies_it_as_the_page_prints(tmp_path: Path, number: int) -> None:
    signers = signer("a"), signer("b")
    commands = VERIFY.replace("sed -n 1p", f"sed -n {number}p") + THUMBPRINT

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", commands],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    file = tmp_path / "bundle.json"
    file.write_bytes(bundle(*signers))
    assert run().stdout.split("\n")[:2] == [
        "Verified OK",
        signers[number - 1].public_key.thumbprint(),
    ]
    file.write_bytes(file.read_bytes().replace(b'"hardware": null', b'"hardware": true'))
    assert "Verified OK" not in run().stdout


def test_what_it_holds_comes_back() -> None:
    one, other = signer("a"), signer("b", never_exportable=True)
    reports = [one.custody(), other.custody()]
    content = bundle(one, other, reports=reports)
    checked = check(content, challenge="2026-11-27 ü", thumbprint=other.public_key.thumbprint())
    assert not checked.all_findings
    assert content == encoded(json.loads(content))
    assert content.isascii()
    assert checked.made_by == MAKER
    assert [key.report for key in checked.keys] == reports


def test_another_text_for_the_same_bytes_is_another_file() -> None:
    content = bundle(signer())
    document = json.loads(content)
    for other in (
        json.dumps(document).encode(),
        content + b"\n",
        content[:-1],
        b" " + content,
        content.replace(b"\\u00fc", "ü".encode()),
        content.replace(b'"challenge": ', b'"challenge": "x",\n "challenge": '),
    ):
        assert "no custody bundle" in wrong(other)
    # Base64 whose last character holds bits that count for nothing.
    signature = b64decode(document["signatures"][0])
    while len(signature) % 3 == 0:
        document = json.loads(bundle(signer()))
        signature = b64decode(document["signatures"][0])
    text = b64encode(signature).decode()
    body = text.rstrip("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    again = body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + text[len(body) :]
    assert b64decode(again) == signature
    document["signatures"][0] = again
    assert "has not signed" in wrong(encoded(document))


def test_the_twin_of_a_signature_holds_as_the_page_says() -> None:
    """Nothing that is said changes with it; OpenSSL takes it too."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    document = json.loads(bundle(signer()))
    r, s = decode_dss_signature(b64decode(document["signatures"][0]))
    document["signatures"] = [b64encode(encode_dss_signature(r, order - s)).decode()]
    assert not wrong(encoded(document))
    assert "with n - s in the place of s" in " ".join(PAGE.split())


def resigned(document: dict[str, Any], *signers: Signer) -> bytes:
    """What the keys' owner can write: whatever he likes."""
    document["signatures"] = []
    message = signed_part(encoded(document))
    document["signatures"] = [
        b64encode(der_from_raw(one.sign(message))).decode() for one in signers
    ]
    return encoded(document)


def test_whoever_has_the_key_cannot_call_a_claim_attested() -> None:
    one = signer()
    document = json.loads(bundle(one))
    assert not wrong(resigned(document, one))
    for change in (
        {"attested": ["hardware"]},
        {"limits": ["x"]},
        {"hardware": 1},
        {"collected_at": 1.5},
        {"collected_at": True},
        {"kid": None},
        {"more": 1},
        {"facts": [{"name": "a", "value": 1, "source": "s", "assurance": "attested"}]},
    ):
        changed = json.loads(bundle(one))
        changed["keys"][0]["report"].update(change)
        assert "no custody bundle" in wrong(resigned(changed, one)), change


@pytest.mark.parametrize(
    "moment", [10**14, 10**17, 10**18, 2**63, 10**400, -(10**17), 253_402_300_800]
)
def test_a_time_that_is_too_far_away_is_no_time(moment: int) -> None:
    one = signer()
    document = json.loads(bundle(one))
    document["keys"][0]["report"]["collected_at"] = moment
    assert "no custody bundle" in wrong(resigned(document, one))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time", "2026-1-1T0:0:0Z"),
        ("time", "\u0662\u0660\u0662\u0666-11-27T08:00:00Z"),
        ("time", "2026-11-27T08:00:00Z "),
        ("challenge", ""),
        ("challenge", "x" * 1025),
        ("challenge", "\x1b[2J"),
    ],
)
def test_time_and_challenge_have_one_form(name: str, value: str) -> None:
    one = signer()
    assert "no custody bundle" in wrong(
        resigned({**json.loads(bundle(one)), name: value}, one), challenge=value
    )


def test_nothing_stands_in_it_that_nobody_reads() -> None:
    """One member more, or in another place: an auditor may read what was not verified."""
    one = signer()
    statement: dict[str, Any] = dict.fromkeys(("format", "content", "certificates"), "")
    statement |= {"nonce": None, "parts": None}
    error = D1SignerError("It is away.").to_dict()
    away = {"use": "client", "location": "unit:away", "error": error}

    def place(document: dict[str, Any], *path: Any) -> dict[str, Any]:
        for step in path:
            document = document[step]
        return document

    for path in (
        ("made_by",),
        ("keys", 0),
        ("keys", 0, "report"),
        ("keys", 0, "report", "made_by"),
        ("keys", 0, "report", "facts", 0),
        ("keys", 0, "statements", 0),
        ("keys", 1),
        ("keys", 1, "error"),
    ):
        for kind in ("more", "order"):
            document = json.loads(bundle(one))
            document["keys"][0]["statements"].append(dict(statement))
            document["keys"].append(json.loads(json.dumps(away)))
            inside = place(document, *path)
            if kind == "more":
                inside["public_key"] = "attested by the vendor"
            else:
                name = next(iter(inside))
                inside[name] = inside.pop(name)
            message = signed_part(encoded({**document, "signatures": []}))
            signature = b64encode(der_from_raw(one.sign(message))).decode()
            document["signatures"] = [signature, None]
            assert "no custody bundle" in wrong(encoded(document)), (path, kind)


def test_a_key_is_for_what_a_key_of_ours_is_for() -> None:
    one = signer()
    for use in ("", "assertion\nVerdict  holds", "Assertion"):
        document = json.loads(bundle(one))
        document["keys"][0]["use"] = use
        assert "no key of ours is for" in wrong(resigned(document, one))


def test_statements_of_a_key_are_a_few() -> None:
    one = signer()
    document = json.loads(bundle(one))
    statement: dict[str, Any] = dict.fromkeys(("format", "content", "certificates"), "")
    statement |= {"nonce": None, "parts": None}
    document["keys"][0]["statements"] = [statement] * 9
    assert "more than 8 statements" in wrong(resigned(document, one))


def test_a_key_for_two_purposes_is_told_of_twice() -> None:
    one = signer("a")
    keys = [
        (KeyReport(use=use, location="unit:key", report=one.custody()), one)
        for use in ("assertion", "client")
    ]

    def made(which: list[Any]) -> Checked:
        return check(make_bundle(which, challenge=None, made_by=MAKER, made_at=0))

    (gone,) = changes(made(keys), made(keys[1:]))
    assert (gone.what, gone.before, gone.after) == ("key (assertion)", "a", None)


def test_statement_that_proves_nothing_is_told() -> None:
    one = signer()
    document = json.loads(bundle(one))
    statement: dict[str, Any] = {
        "format": "marvell",
        "content": "AAAA",
        "certificates": [],
        "nonce": None,
        "parts": None,
    }
    document["keys"][0]["statements"] = [statement]
    assert "statement is refused" in wrong(resigned(document, one))
    document["keys"][0]["statements"] = [{**statement, "format": "no such"}]
    assert "format no such is not known" in wrong(resigned(document, one))


def test_another_key_another_challenge_no_key() -> None:
    one, other = signer("a"), signer("b")
    content = bundle(one)
    assert "another challenge" in wrong(content, challenge="2026-11-28")
    assert "another challenge" in wrong(bundle(one, challenge=None), challenge="x")
    assert "No key in it" in wrong(content, thumbprint=other.public_key.thumbprint())
    assert "has not signed" in wrong(resigned(json.loads(content), other))
    document = json.loads(content)
    document["keys"][0]["public_key"] = b64encode(other.public_key.der()).decode()
    assert "another key" in wrong(resigned(document, other))
    document = json.loads(content)
    document["signatures"] = [None]
    assert "has not signed" in wrong(encoded(document))
    document["keys"], document["signatures"] = [], []
    assert "No key has signed" in wrong(encoded(document))


def test_a_key_that_was_away_is_told() -> None:
    content = bundle(signer(), away=True)
    (finding,) = check(content).all_findings
    assert finding == "The key unit:away could not be asked: It is away."
    assert check(content).keys[1].report is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"d1_signer_custody_bundle": 2}',
        encoded({"d1_signer_custody_bundle": 1}),
        encoded(
            dict.fromkeys(("d1_signer_custody_bundle", "challenge", "time", "made_by", "keys"), 1)
        ),
    ],
)
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(CustodyError, match="no custody bundle"):
        check(content)


@pytest.mark.parametrize("challenge", ["", "a\nb", "x" * 1025, "\u202e"])
def test_a_challenge_that_cannot_be_printed_is_refused(challenge: str) -> None:
    with pytest.raises(ConfigurationError, match="challenge"):
        bundle(signer(), challenge=challenge)


def test_changes_are_told_key_by_key() -> None:
    one, other = signer("a"), signer("b")
    before = check(bundle(one, other))
    assert changes(before, check(bundle(one, other))) == []
    one._backend.evidence = Evidence(  # type: ignore[attr-defined]
        location="unit:key", exportable=True, generated_in_place=True, hardware=None, facts=()
    )
    found = changes(before, check(bundle(one)))
    told = {(change.what, change.before, change.after) for change in found}
    assert told == {
        ("exportable", "no (claimed)", "yes (claimed)"),
        ('"quote"\n [</script>]', "None (claimed)", None),
        ("key (assertion)", "b", None),
    }


_WATCHED = """
import sys
opened = []
def hook(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))
    elif event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")):
        opened.append(event)
sys.addaudithook(hook)
from d1_signer.cli import _app, main
del opened[:]  # urllib3 asks for IPv6 when it is imported
status = main(sys.argv[1:])
import json
print(json.dumps(opened), file=sys.stderr)
sys.exit(status)
"""


def test_verify_reads_nothing_but_its_arguments(tmp_path: Path) -> None:
    file = tmp_path / "bundle.json"
    file.write_bytes(bundle(signer()))
    strange = {
        "D1_SIGNER_KEY": "rubbish",
        "D1_CLIENT_KEY": "-----BEGIN",
        "D1_CUSTODY_POLICY": "nothing such",
        "D1_SIGNER_OPTIONS": "'",
        "D1_CONFIG": "/nowhere",
    }
    ran = subprocess.run(
        [sys.executable, "-c", _WATCHED, "custody", "verify", str(file)],
        env={**os.environ, **strange},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    code = (".py", ".pyc", ".so", ".pth", "pyvenv.cfg")
    others = {
        name
        for name in json.loads(ran.stderr.splitlines()[-1])
        if not name.endswith(code) and ".so." not in name and ".pyc." not in name
    }
    assert others == {str(file)}


def _places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: list[tuple[Any, object]] = []
    if isinstance(value, dict):
        inside = [*value.items()]
    elif isinstance(value, list):
        inside = [*enumerate(value)]
    return [path, *(place for name, one in inside for place in _places(one, (*path, name)))]


def test_whatever_stands_in_it_is_read_or_refused() -> None:
    dice = random.Random(14)
    one = signer()
    content = bundle(one, away=True)
    others: tuple[object, ...] = (None, True, 0, -1, 10**400, 1.5, "", "\ud800", "x", [], {}, [[]])
    for _ in range(400):
        document = json.loads(content)
        document["keys"][1]["statements"] = [
            {"format": "tpm2", "content": "", "certificates": ["AAAA"], "nonce": None, "parts": {}}
        ]
        *above, name = dice.choice(_places(document)[1:])
        inside = document
        for step in above:
            inside = inside[step]
        if dice.random() < 0.2:
            del inside[name]
        else:
            inside[name] = dice.choice(others)
        if isinstance(document.get("signatures"), list):
            message = signed_part(encoded({**document, "signatures": []}))
            document["signatures"] = [
                None,
                b64encode(der_from_raw(one.sign(message))).decode(),
            ]
        assert wrong(encoded(document))  # there is a key that was away, at least

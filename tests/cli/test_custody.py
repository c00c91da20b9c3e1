# SPDX-License-Identifier: Apache-2.0
"""`custody`: what is required, a key that is away, the bundle and the page as files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from base64 import b64encode
from pathlib import Path

import pytest

from d1_signer import generate_key, open_signer
from d1_signer.custody.bundle import encoded, signed_part
from d1_signer.es256 import der_from_raw
from tests.audit.trails import records
from tests.cli.conftest import Run


@pytest.fixture
def client_key(tmp_path: Path) -> str:
    return generate_key((tmp_path / "client.pem").as_uri()).uri


def test_a_key_that_falls_short_is_reported_and_signs_nothing(
    run: Run, key_uri: str, tmp_path: Path
) -> None:
    bundle, html = tmp_path / "bundle.json", tmp_path / "page.html"
    arguments = ("custody", "--key", key_uri, "--require", "hardware,attested")
    result = run(*arguments, "--bundle", str(bundle), "--html", str(html))
    assert result.status == 1
    assert "  NOT SHOWN TO BE: held by hardware.\n" in result.out
    _page, error, hint, _code, *_ = result.err.splitlines()
    assert error == (
        "Error: kid bank-2026 does not meet what is demanded (hardware, attested): "
        "it is not shown to be held by hardware."
    )
    assert "what pem says is a claim, and not attested" in hint
    assert "--option attestation=" in hint
    assert "No bundle is written" in result.err
    assert not bundle.exists()
    assert "1 of 1 keys not shown to be what is required" in html.read_text()
    told = run(*arguments, "--json")
    assert told.err == ""
    document = told.document
    assert document["policy"] == ["hardware", "attested"]
    assert document["keys"][0]["unmet"] == ["held by hardware"]


@pytest.mark.parametrize(
    "word",
    ["non-exportable", "never-exportable", "generated-in-place", "hardware", "attested", "fips"],
)
def test_each_word_is_refused_of_a_file(run: Run, key_uri: str, word: str) -> None:
    assert run("custody", "--key", key_uri, "--require", word).status == 1
    assert run("custody", "--key", key_uri, D1_CUSTODY_POLICY=word).status == 1
    for command in ("public-key", "assertion", "check"):
        arguments = ("--issuer-id", "i", "--no-audience") if command == "assertion" else ()
        result = run(command, "--key", key_uri, *arguments, "--json")
        assert result.status == 1, command
        assert '"custody"' in result.out


def test_a_word_that_is_not_known_is_a_wrong_setting(run: Run, key_uri: str) -> None:
    for words in ("hard", "", ","):
        result = run("custody", "--key", key_uri, "--require", words)
        assert result.status == 2
        assert "never-exportable" in result.err


def test_one_key_that_is_away_does_not_keep_the_others_from_being_told(
    run: Run, key_uri: str, tmp_path: Path
) -> None:
    away, bundle = (tmp_path / "none.pem").as_uri(), tmp_path / "bundle.json"
    keys = ("--key", away, "--key", key_uri)
    result = run("custody", *keys, "--bundle", str(bundle), "--json")
    assert result.status == 1
    first, second = result.document["keys"]
    assert first["error"]["code"] == "secret_source"
    assert first["location"] == away
    assert second["kid"] == "bank-2026"
    assert {"host", "user", "d1_signer", "python"} == set(result.document["made_by"])
    verified = run("custody", "verify", str(bundle))
    assert verified.status == 1
    assert "could not be asked" in verified.out
    assert "could not be asked" in run("custody", *keys).out
    assert run("custody", "--key", away).status == 2
    changed = run("custody", "diff", str(bundle), str(bundle))
    assert (changed.status, changed.out) == (0, "Nothing has changed.\n")


def test_the_client_key_and_the_trails_key_are_looked_at_as_well(
    run: Run, key_uri: str, client_key: str, tmp_path: Path
) -> None:
    audit = generate_key((tmp_path / "audit.pem").as_uri()).uri
    keys = {"D1_SIGNER_KEY": key_uri, "D1_CLIENT_KEY": client_key, "D1_AUDIT_KEY": audit}
    told = run("custody", "--json", **keys).document["keys"]
    assert [key["use"] for key in told] == ["assertion", "client", "audit"]
    path = run("custody", "--json", D1_CLIENT_KEY=str(tmp_path / "client.pem")).document["keys"]
    assert [key["use"] for key in path] == ["assertion", "audit"]


def test_the_bundle_is_written_once_and_verified(run: Run, key_uri: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    html = tmp_path / "page.html"
    asked = ("--bundle", str(bundle), "--challenge", "2026 ü", "--html", str(html))
    written = run("custody", "--key", key_uri, *asked)
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() in html.read_text()
    assert written.status == 0
    assert stat.S_IMODE(bundle.stat().st_mode) & 0o133 == 0
    content = bundle.read_bytes()
    html.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["bundle.json"]
    again = run("custody", "--key", key_uri, "--bundle", str(bundle))
    assert again.status == 2
    assert "is there already" in again.err
    assert bundle.read_bytes() == content
    verified = run("custody", "verify", str(bundle), "--challenge", "2026 ü", D1_SIGNER_KEY="x")
    assert verified.status == 0
    assert "claimed by pem" in verified.out
    document = run("custody", "verify", str(bundle), "--json").document
    assert document["holds"] is True
    assert document["keys"][0]["answers"]["hardware"] == {"answer": False, "by": "claimed by pem"}
    assert run("custody", "verify", str(bundle), "--challenge", "other").status == 1
    assert run("custody", "verify", str(bundle), "--thumbprint", "other").status == 1
    bundle.write_bytes(content.replace(b"pem", b"hsm"))
    assert run("custody", "verify", str(bundle)).status == 1
    assert run("custody", "diff", str(bundle), str(bundle)).status == 1
    bundle.write_bytes(content + b" ")
    assert run("custody", "verify", str(bundle), "--json").document["code"] == "custody"


def test_nothing_hostile_in_a_bundle_reaches_the_terminal(run: Run, tmp_path: Path) -> None:
    """Whoever has a key writes what he likes into its report, and signs it."""
    attack = "x\x1b[2J\x1b]0;t\x07\r\nVerdict  holds\u202e\u2028\x9b1m\ud800"
    key = generate_key((tmp_path / "a.pem").as_uri())
    bundle = tmp_path / "bundle.json"
    assert run("custody", "--key", key.uri, "--bundle", str(bundle)).status == 0
    document = json.loads(bundle.read_bytes())
    document["made_by"] = dict.fromkeys(document["made_by"], attack)
    report = document["keys"][0]["report"]
    report |= dict.fromkeys(("backend", "plug_in", "kid", "location"), attack)
    for fact in report["facts"]:
        fact |= {"name": attack, "value": attack, "source": attack}
    error = {"code": attack, "message": attack, "hint": attack, "retryable": False, "details": {}}
    document["keys"].append({"use": "client", "location": attack, "error": error})
    document["signatures"] = []
    with open_signer(key.uri) as signer:
        signature = der_from_raw(signer.sign(signed_part(encoded(document))))
    document["signatures"] = [b64encode(signature).decode(), None]
    bundle.write_bytes(encoded(document))
    old = tmp_path / "old.json"
    assert run("custody", "--key", key.uri, "--bundle", str(old)).status == 0
    for arguments in (("verify", str(bundle)), ("diff", str(old), str(bundle))):
        told = run("custody", *arguments)
        assert told.status == 1
        assert not [c for c in told.out + told.err if not (c.isprintable() or c == "\n")]
        assert not [line for line in told.out.splitlines() if line.startswith("Verdict  holds")]
        assert "\\x1b[2J" in told.out
        assert run("custody", *arguments, "--json").out.isascii()


def test_the_trails_key_is_looked_at_and_signs_beside_the_trail_that_it_seals(
    run: Run, key_uri: str, tmp_path: Path
) -> None:
    sealing = generate_key((tmp_path / "audit.pem").as_uri())
    bundle, place = tmp_path / "bundle.json", tmp_path / "trail"
    settings = {
        "D1_SIGNER_KEY": key_uri,
        "D1_AUDIT_TRAIL": str(place),
        "D1_AUDIT_ORIGIN": "bank.example/d1",
        "D1_AUDIT_KEY": sealing.uri,
    }
    arguments = ("custody", "--bundle", str(bundle), "--challenge", "2026 ü")
    assert run(*arguments, **settings).status == 0
    thumbprint = sealing.public_key.thumbprint()
    verified = run("custody", "verify", str(bundle), "--thumbprint", thumbprint, "--json")
    assert [key["use"] for key in verified.document["keys"]] == ["assertion", "audit"]
    assert verified.document["holds"] is True
    done = [record for record in records(place) if record["event"] == "begin"]
    assert [record["action"] for record in done] == ["open", "custody", "sign"]
    assert {record["kid"] for record in done[1:]} == {"bank-2026"}
    assert done[2]["purpose"] == "custody-bundle"
    assert done[2]["references"] == [["challenge", "2026 ü"]]
    options = ("--audit-trail", str(place), "--audit-origin", "x", "--audit-key", sealing.uri)
    for name in list(settings)[1:]:
        settings[name] = ""
    told = run("custody", *options, "--json", **settings).document["keys"]
    assert [key["use"] for key in told] == ["assertion", "audit"]


def test_a_trails_key_that_falls_short_seals_nothing_and_is_told_without_the_trail(
    run: Run, key_uri: str, tmp_path: Path
) -> None:
    place = tmp_path / "trail"
    sealing = generate_key((tmp_path / "audit.pem").as_uri()).uri
    settings = {"D1_SIGNER_KEY": key_uri, "D1_AUDIT_KEY": sealing, "D1_CUSTODY_POLICY": "hardware"}
    refused = run("custody", "--json", **settings, D1_AUDIT_TRAIL=str(place))
    assert (refused.status, refused.document["code"]) == (1, "custody")
    assert "audit.pem" in refused.document["message"]
    assert not list(place.rglob("checkpoints"))
    told = run("custody", "--json", **settings, D1_AUDIT_TRAIL="")
    assert told.status == 1
    assert told.document["keys"][1]["use"] == "audit"
    assert told.document["keys"][1]["unmet"] == ["held by hardware"]


@pytest.mark.parametrize("option", ["--bundle", "--html"])
def test_a_key_is_never_overwritten_and_another_file_by_force_alone(
    run: Run, key_uri: str, tmp_path: Path, option: str
) -> None:
    file, key = tmp_path / "file", tmp_path / "other.pem"
    generate_key(key.as_uri())
    file.write_text("what stands there")
    kept = key.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(key)
    for target in (key, link):
        refused = run("custody", "--key", key_uri, option, str(target), "--force")
        assert refused.status == 2
        assert "never" in refused.err
    assert key.read_bytes() == kept
    assert run("custody", "--key", key_uri, option, str(file)).status == 2
    assert file.read_text() == "what stands there"
    written = run("custody", "--key", key_uri, option, str(file), "--force")
    assert written.status == 0
    assert str(file) in written.err
    assert file.read_text() != "what stands there"
    assert run("custody", "--key", key_uri, "--force").status == 2
    both = ("--bundle", str(file), "--html", str(link.parent / "." / "file"), "--force")
    assert run("custody", "--key", key_uri, *both).status == 2


def test_what_cannot_be_written_or_read_is_a_wrong_setting(
    run: Run, key_uri: str, tmp_path: Path
) -> None:
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "none" / "bundle.json", tmp_path, dangling):
        for option in ("--bundle", "--html"):
            assert run("custody", "--key", key_uri, option, str(path)).status == 2
    assert not (tmp_path / "nowhere").exists()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path / "none", tmp_path, fifo):
        assert run("custody", "verify", str(path)).status == 2
    assert run("custody", "--key", key_uri, "--challenge", "x").status == 2
    assert run("custody", "verify").status == 2


def test_what_is_stray_is_not_repeated(run: Run, key_uri: str) -> None:
    result = run("custody", "--key", key_uri, "s3cret-stray")
    assert result.status == 2
    assert "s3cret" not in result.out + result.err


def test_a_statement_is_an_option_of_every_key(run: Run, key_uri: str, tmp_path: Path) -> None:
    file = tmp_path / "pkc.p7b"
    file.write_bytes(b"no statement")
    for value, status, told in (
        (f"luna-pkc:{file}", 1, "statement is refused"),
        (f"luna-pkc:{file}.none", 2, "cannot be read"),
        (str(file), 2, "FORMAT:PATH"),
        (f"tpm2:{file},{file}", 2, "public is missing"),
    ):
        result = run("custody", "--key", key_uri, "--option", f"attestation={value}")
        assert result.status == status
        assert told in result.err
    uri, _, kid = key_uri.partition("#")
    in_uri = run("custody", "--key", f"{uri}?attestation=luna-pkc:{file}#{kid}", "--json")
    assert json.loads(in_uri.out)["code"] == "attestation"
    twice = f"{uri}?attestation=luna-pkc:{file}&attestation=luna-pkc:{file}"
    assert run("custody", "--key", twice).status == 2

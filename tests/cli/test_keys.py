# SPDX-License-Identifier: Apache-2.0
"""Public keys in every form, read by others; new keys; custody."""

from __future__ import annotations

import base64
import json
import os
import pty
import stat
import subprocess
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)
from joserfc.jwk import ECKey, KeySet

from tests.cli.conftest import COMMAND, Run, run_process


def private_key_of(uri: str) -> ec.EllipticCurvePrivateKey:
    path = uri.removeprefix("file://").partition("#")[0].partition("?")[0]
    key = load_pem_private_key(Path(path).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def numbers(key: object) -> ec.EllipticCurvePublicNumbers:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_numbers()


def test_pem_is_the_default(run: Run, key_uri: str) -> None:
    result = run("public-key", "--key", key_uri)
    assert result.status == 0
    assert result.err == ""
    expected = numbers(private_key_of(key_uri).public_key())
    assert numbers(load_pem_public_key(result.out.encode())) == expected


def test_der_goes_to_a_pipe_and_to_a_file(key_uri: str, tmp_path: Path, run: Run) -> None:
    expected = numbers(private_key_of(key_uri).public_key())
    arguments = ["public-key", "--key", key_uri, "--format", "der"]
    piped = subprocess.run([*COMMAND, *arguments], capture_output=True, check=True, timeout=30)
    assert numbers(load_der_public_key(piped.stdout)) == expected
    file = tmp_path / "key.der"
    written = run(*arguments, "-o", str(file))
    assert (written.status, written.out) == (0, "")
    assert file.read_bytes() == piped.stdout
    shown = run(*arguments, "--json").document
    assert base64.b64decode(shown["public_key"]) == piped.stdout


@pytest.mark.parametrize("command", [["public-key"], ["csr", "--subject", "CN=a"]])
def test_der_is_not_written_to_a_terminal(key_uri: str, command: list[str]) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*COMMAND, *command, "--key", key_uri, "--format", "der"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=30,
    )
    os.close(theirs)
    with pytest.raises(OSError, match="Input/output"):  # nothing was written
        os.read(ours, 1)
    os.close(ours)
    assert done.returncode == 2
    assert "-o FILE" in done.stderr


def test_jwk_is_read_by_pyjwt_and_joserfc(run: Run, key_uri: str) -> None:
    text = run("public-key", "--key", key_uri, "--format", "jwk").out
    document = json.loads(text)
    expected = numbers(private_key_of(key_uri).public_key())
    assert numbers(jwt.PyJWK.from_json(text).key) == expected
    key = ECKey.import_key(document)
    assert numbers(key.public_key) == expected
    members = {"crv", "kty", "x", "y", "kid", "use", "alg"}
    assert set(document) == members
    assert (document["kid"], document["use"], document["alg"]) == ("bank-2026", "sig", "ES256")
    shown = run("public-key", "--key", key_uri, "--format", "jwk", "--json").document
    assert shown["public_key"] == document
    assert shown["keys"] == [{"kid": "bank-2026", "thumbprint": key.thumbprint()}]


def test_jwks_holds_all_keys_in_order(run: Run, key_uri: str, other_uri: str) -> None:
    uris = f"{key_uri} {other_uri}"
    text = run("public-key", "--format", "jwks", D1_SIGNER_KEY=uris).out
    keys = KeySet.import_key_set(json.loads(text)).keys
    assert [key.kid for key in keys] == ["bank-2026", "next-2027"]
    for key, uri in zip(keys, (key_uri, other_uri), strict=True):
        assert isinstance(key, ECKey)
        assert numbers(key.public_key) == numbers(private_key_of(uri).public_key())
    repeated = run("public-key", "--format", "jwks", "--key", other_uri, "--key", key_uri)
    assert [key["kid"] for key in json.loads(repeated.out)["keys"]] == ["next-2027", "bank-2026"]


def test_jwks_holds_the_others_where_a_key_is_away(run: Run, key_uri: str, tmp_path: Path) -> None:
    away = (tmp_path / "none.pem").as_uri()
    for keys in (f"{away} {key_uri}", f"{key_uri} {away}"):
        result = run("public-key", "--format", "jwks", D1_SIGNER_KEY=keys)
        assert result.status == 1
        assert [key["kid"] for key in json.loads(result.out)["keys"]] == ["bank-2026"]
        assert "Warning: a key is passed over" in result.err
        assert "none.pem" in result.err
    told = run("public-key", "--format", "jwks", "--json", D1_SIGNER_KEY=f"{key_uri} {away}")
    assert told.status == 1
    assert [(one["key"], one["error"]["code"]) for one in told.document["away"]] == [
        (away, "secret_source")
    ]
    module = "pkcs11:token=bank;object=d1?module-path=/nowhere/module.so"
    for gone in (module, "awskms:///alias/d1"):
        result = run("public-key", "--format", "jwks", "--json", D1_SIGNER_KEY=f"{gone} {key_uri}")
        assert result.status == 1, gone
        assert result.document["keys"][0]["kid"] == "bank-2026"
        assert gone.partition("?")[0] in result.err
    nothing = run("public-key", "--format", "jwks", D1_SIGNER_KEY=f"{away} {away}")
    assert (nothing.status, nothing.out) == (2, "")


@pytest.mark.parametrize("form", ["pem", "der", "jwk"])
def test_other_forms_take_one_key(run: Run, key_uri: str, other_uri: str, form: str) -> None:
    result = run("public-key", "--format", form, "--key", key_uri, "--key", other_uri)
    assert result.status == 2
    assert "single key" in result.err
    assert result.out == ""


def test_a_file_that_cannot_be_written(run: Run, key_uri: str, tmp_path: Path) -> None:
    result = run("public-key", "--key", key_uri, "-o", str(tmp_path / "none" / "key"), "--json")
    assert result.status == 2
    assert result.document["code"] == "configuration"
    assert "No such file" in result.document["message"]


SUBJECT = r"CN=TLSMA/bank PPR,O=Banque Générale\, SA,C=FR"


def test_a_signing_request_is_taken_by_others(run: Run, key_uri: str, tmp_path: Path) -> None:
    file = tmp_path / "client.csr"
    written = run("csr", "--key", key_uri, "--subject", SUBJECT, "-o", str(file))
    assert (written.status, written.out) == (0, "")
    request = x509.load_pem_x509_csr(file.read_bytes())
    assert numbers(request.public_key()) == numbers(private_key_of(key_uri).public_key())
    assert request.signature_algorithm_oid == x509.SignatureAlgorithmOID.ECDSA_WITH_SHA256
    openssl = ["openssl", "req", "-verify", "-noout", "-subject", "-nameopt", "RFC2253,-esc_msb"]
    told = subprocess.run([*openssl, "-in", str(file)], capture_output=True, check=True, timeout=30)
    assert b"verify OK" in told.stdout + told.stderr
    assert f"subject={SUBJECT}" in told.stdout.decode()


def test_a_signing_request_in_other_forms(run: Run, key_uri: str) -> None:
    arguments = ["csr", "--key", key_uri, "--subject", SUBJECT]
    text = run(*arguments, "--json").document
    assert x509.load_pem_x509_csr(text["csr"].encode()).is_signature_valid
    assert (text["format"], text["subject"]) == ("pem", SUBJECT)
    opened = run("public-key", "--json", "--key", key_uri).document
    assert text["thumbprint"] == opened["keys"][0]["thumbprint"]
    der = base64.b64decode(run(*arguments, "--format", "der", "--json").document["csr"])
    assert x509.load_der_x509_csr(der).is_signature_valid
    shown = run(*arguments).out
    assert x509.load_pem_x509_csr(shown.encode()).is_signature_valid


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("bank", "not as in RFC 4514"),
        ("CN=", "length"),
        ("CN=a,C=FRA", "length"),
        ("O=Bank", "common name"),
        ("CN=a,cn=b", "common name"),
        ("CN=…", "CN has no letter"),
        ("CN=...,O=Bank,C=FR", "CN has no letter"),
        ("CN=bank…", "stands for a name"),
        ("CN=a,O=…", "O has no letter"),
        (r"CN=\<name\>", "stands for a name"),
        ("CN=a,O=", "O has no letter"),
        (r"CN=\20", "CN has no letter"),
        (r"CN=a\20", "blanks around"),
        (r"CN=a\0Ab", "control characters"),
        ("CN=a,O=$BANK", "stands for a name"),
        ("CN=bank ($BANK)", "stands for a name"),
        ("CN=bank-$1", "stands for a name"),
        ("CN=${BANK}", "stands for a name"),
        ("CN=$(hostname)", "stands for a name"),
        ("CN={{ bank }}", "stands for a name"),
        ("CN=[name of the bank]", "stands for a name"),
        ("CN=[bank]", "stands for a name"),
        ("CN=%BANK%", "stands for a name"),
        ("CN=a,C=F1", "C has no code of a country"),
        ("CN=a,serialNumber=é", "characters that this attribute cannot have"),
        ("CN=a,serialNumber=1_2", "characters that this attribute cannot have"),
        ("CN=a,2.5.4.46=é", "characters that this attribute cannot have"),
        ("CN=a,emailAddress=é@bank.example", "ASCII only"),
        ("CN=a,DC=é", "DC has characters that this attribute cannot have: ASCII only"),
        ("CN=a,FOO=b", "not known: FOO"),
        ("CN=a,OO=Bank", "not known: OO"),
        ("CN=a+ORG=Bank", "not known: ORG"),
    ],
)
def test_a_subject_that_d1_could_not_take(
    run: Run, key_uri: str, subject: str, reason: str
) -> None:
    result = run("csr", "--key", key_uri, "--subject", subject)
    assert (result.status, result.out) == (2, "")
    assert reason in result.err


@pytest.mark.parametrize("kid", ["", "a\tb", "k" * 257])
def test_no_key_is_made_for_what_is_no_kid(run: Run, tmp_path: Path, kid: str) -> None:
    file = tmp_path / "new.pem"
    for arguments in (["--key", file.as_uri(), "--kid", kid], ["--key", f"{file.as_uri()}#{kid}"]):
        result = run("generate-key", *arguments)
        assert result.status == 2
        assert "The kid is empty, longer than 256 characters" in result.err
    assert not file.exists()


@pytest.mark.parametrize(
    ("subject", "read"),
    [
        ("cn=bank,o=Bank,c=FR", "CN=bank,O=Bank,C=FR"),
        ("Cn=bank+Ou=Cards,serialNumber=12", None),
        (r"CN=bank,O=a\,foo=b", r"CN=bank,O=a\,foo=b"),
        ("CN=bank,2.5.4.97=VATFR-1", None),
        ("CN=口座", "CN=口座"),
        ("CN=bank 50%,C=fr", "CN=bank 50%,C=fr"),
        ("CN=R&D [EU] bank", "CN=R&D [EU] bank"),
        ("CN=a,O=A$AP Bank", "CN=a,O=A$AP Bank"),
        ("CN=bank in US$ 5$", "CN=bank in US$ 5$"),
        ("CN=a%20b%20c", "CN=a%20b%20c"),
        ("CN=bank 50%off%", "CN=bank 50%off%"),
    ],
)
def test_names_of_attributes_in_any_case(
    run: Run, key_uri: str, subject: str, read: str | None
) -> None:
    made = run("csr", "--key", key_uri, "--subject", subject, "--json").document
    request = x509.load_pem_x509_csr(made["csr"].encode())
    assert request.subject.rfc4514_string() == made["subject"]
    assert made["subject"] == read or read is None


def test_a_signing_request_is_for_a_key_of_its_own(run: Run, key_uri: str, other_uri: str) -> None:
    result = run("csr", "--subject", "CN=a", D1_SIGNER_KEY=key_uri)
    assert result.status == 2
    assert "--key" in result.err
    path = key_uri.removeprefix("file://").partition("#")[0]
    for uri in (key_uri, f"file://{path}#another", f"file:{path}", f"file:///.{path}"):
        refused = run("csr", "--subject", "CN=a", "--key", uri)
        assert (refused.status, refused.out) == (2, "")
        assert "signs assertions" in refused.err
    assert run("csr", "--subject", "CN=a", "--key", other_uri).status == 0


def test_generate_key_makes_what_open_takes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.pem"
    made = run("generate-key", "--json", "--key", path.as_uri() + "#bank%202026")
    assert made.status == 0
    assert made.document["kid"] == "bank 2026"
    assert made.document["uri"] == path.as_uri() + "#bank%202026"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    expected = numbers(private_key_of(made.document["uri"]).public_key())
    assert numbers(load_pem_public_key(made.document["public_key"].encode())) == expected
    opened = run("public-key", "--json", "--key", made.document["uri"]).document
    assert opened["keys"] == [{n: made.document[n] for n in ("kid", "thumbprint")}]
    assert opened["public_key"] == made.document["public_key"]


def test_generate_key_for_people(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.pem"
    made = run("generate-key", D1_SIGNER_KEY=path.as_uri(), D1_SIGNER_KID="bank")
    assert made.status == 0
    assert f"{path.as_uri()}#bank" in made.out
    assert "-----BEGIN PUBLIC KEY-----" in made.out
    assert "PRIVATE" not in made.out


def test_generate_key_overwrites_nothing(run: Run, key_uri: str) -> None:
    before = private_key_of(key_uri).private_numbers()
    result = run("generate-key", "--key", key_uri)
    assert result.status == 1
    assert "code: key_exists" in result.err
    assert private_key_of(key_uri).private_numbers() == before


def test_generate_key_takes_one_key(run: Run, tmp_path: Path) -> None:
    first, second = ((tmp_path / name).as_uri() for name in ("a.pem", "b.pem"))
    assert run("generate-key", "--key", first, "--key", second).status == 2
    assert list(tmp_path.iterdir()) == []


def test_custody_for_people_and_machines(run: Run, key_uri: str, other_uri: str) -> None:
    result = run("custody", "--json", D1_SIGNER_KEY=f"{key_uri} {other_uri}")
    reports = result.document["keys"]
    assert [report["kid"] for report in reports] == ["bank-2026", "next-2027"]
    assert reports[0]["exportable"] is True
    assert reports[0]["generated_in_place"] is None
    assert {"name": "mode", "value": "0600"}.items() <= reports[0]["facts"][1].items()
    text = run("custody").out
    assert "Exportable          yes (claimed)\nNever exportable    no (claimed)\n" in text
    assert "Generated in place  not known\n" in text
    assert "  mode       claimed    operating system  0600\n" in text
    assert text.index("bank-2026") < text.index("next-2027")


def test_in_a_process_of_its_own(key_uri: str) -> None:
    result = run_process("custody", "--json", D1_SIGNER_KEY=key_uri)
    assert result.status == 0
    assert result.document["keys"][0]["kid"] == "bank-2026"

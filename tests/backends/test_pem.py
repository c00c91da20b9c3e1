# SPDX-License-Identifier: Apache-2.0
"""PEM files as the openssl command makes them, and everything that is not a P-256 private key."""

from __future__ import annotations

import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from d1_signer.errors import (
    AmbiguousKeyError,
    D1SignerError,
    InvalidKeyError,
    KeyExistsError,
    KeyUriError,
    SecretSourceError,
    SignerClosedError,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from tests.facts.secrecy import assert_hidden

PASSPHRASE = "hunter2-correct-horse"
WRONG = "hunter3-wrong-battery"
MADE_BY = """
openssl ecparam -name prime256v1 -genkey -noout -out sec1
openssl ecparam -name prime256v1 -genkey -out sec1-with-parameters
openssl ecparam -name prime256v1 -genkey -noout -param_enc explicit -out explicit
openssl pkcs8 -topk8 -nocrypt -in sec1 -out pkcs8
openssl pkcs8 -topk8 -passout pass:hunter2-correct-horse -in sec1 -out pkcs8-encrypted
openssl pkcs8 -topk8 -scrypt -passout pass:hunter2-correct-horse -in sec1 -out pkcs8-scrypt
openssl ec -aes256 -passout pass:hunter2-correct-horse -in sec1 -out sec1-encrypted
openssl req -x509 -new -key sec1 -subj /CN=unit -out certificate
openssl ec -in sec1 -pubout -out public
openssl ec -in sec1 -outform DER -out der
openssl ecparam -name secp384r1 -genkey -noout -out p384
openssl ecparam -name secp256k1 -genkey -noout -out secp256k1
openssl genrsa -out rsa 2048
openssl genpkey -algorithm ed25519 -out ed25519
ssh-keygen -q -t ecdsa -b 256 -N '' -f openssh
"""
PLAIN = ["sec1", "sec1-with-parameters", "pkcs8"]
ENCRYPTED = ["pkcs8-encrypted", "pkcs8-scrypt", "sec1-encrypted"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pem")
    for command in MADE_BY.strip().splitlines():
        subprocess.run(
            shlex.split(command), cwd=folder, check=True, capture_output=True, timeout=30
        )
    read = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_bytes(b"my key\n")
    (folder / "garbage").write_bytes(read["pkcs8"][:60] + b"!!" + read["pkcs8"][62:])
    (folder / "cut").write_bytes(read["pkcs8"][:100])
    (folder / "two").write_bytes(read["sec1"] + read["sec1-with-parameters"])
    (folder / "bundle").write_bytes(read["certificate"] + read["sec1"])
    (folder / "crlf").write_bytes(read["pkcs8"].replace(b"\n", b"\r\n"))
    (folder / "damaged-encrypted").write_bytes(read["pkcs8-encrypted"].replace(b"M", b"N", 1))
    for path in folder.iterdir():
        path.chmod(0o600)
    return folder


def right() -> str:
    return PASSPHRASE


def wrong() -> str:
    return WRONG


def refuse(
    folder: Path,
    name: str,
    error: type[D1SignerError],
    text: str,
    source: Callable[[], str] | None = None,
) -> D1SignerError:
    with pytest.raises(error, match=text) as caught:
        open_signer(f"file://{folder}/{name}", passphrase_source=source)
    assert type(caught.value) is error
    assert name in str(caught.value)
    for secret in (PASSPHRASE, WRONG):
        assert_hidden(secret, caught.value)
    return caught.value


def signs(signer: Signer, made: Path, name: str) -> None:
    """Openssl verifies what we sign, with the public key that it reads itself."""
    signature = made / f"{name}.sig"
    r_s = signer.sign(b"message")
    r, s = (int.from_bytes(half, "big") for half in (r_s[:32], r_s[32:]))
    body = b"".join(_der(value) for value in (r, s))
    signature.write_bytes(bytes((0x30, len(body))) + body)
    public = made / f"{name}.pub"
    public.write_text(signer.public_key.pem())
    command: list[str | Path] = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        public,
        "-signature",
        signature,
    ]
    done = subprocess.run(command, input=b"message", capture_output=True, check=False, timeout=30)
    assert done.stdout == b"Verified OK\n", done.stderr


def _der(value: int) -> bytes:
    body = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes((2, len(body))) + body


@pytest.mark.parametrize("name", [*PLAIN, "explicit", "bundle", "crlf"])
def test_plain_forms(made: Path, name: str) -> None:
    with open_signer(f"file://{made}/{name}") as signer:
        signs(signer, made, name)


@pytest.mark.parametrize("name", ENCRYPTED)
def test_encrypted_forms(
    made: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o600)
    monkeypatch.setenv("UNIT_PASSPHRASE", PASSPHRASE)
    uri = f"file://{made}/{name}"
    plain = open_signer(f"file://{made}/sec1")
    for signer in (
        open_signer(uri, passphrase_source=right),
        open_signer(f"{uri}?passphrase-source=env:UNIT_PASSPHRASE"),
        open_signer(f"{uri}?passphrase-source=file:{secret}#kid"),
        open_signer(f"{uri}?passphrase-source=env:UNIT_UNSET", passphrase_source=right),
    ):
        assert signer.public_key == plain.public_key
        plain.public_key.verify(signer.sign(b"m"), b"m")


@pytest.mark.parametrize("name", ENCRYPTED)
def test_wrong_and_missing_passphrase(made: Path, name: str) -> None:
    refuse(made, name, SecretSourceError, "cannot be decrypted", wrong)
    refuse(made, name, SecretSourceError, "cannot be decrypted", lambda: WRONG * 100)
    error = refuse(made, name, SecretSourceError, "is encrypted")
    assert "passphrase-source" in error.hint

    def fails() -> str:
        raise KeyError(PASSPHRASE)

    with pytest.raises(SecretSourceError, match="callable"):
        open_signer(f"file://{made}/{name}", passphrase_source=fails)


@pytest.mark.parametrize("name", PLAIN)
def test_unneeded_passphrase(made: Path, name: str) -> None:
    refuse(made, name, SecretSourceError, "not encrypted", right)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p384", "secp384r1"),
        ("secp256k1", "secp256k1"),
        ("rsa", "another kind .RSA."),
        ("ed25519", "another kind .Ed25519."),
        ("public", "public key or a certificate"),
        ("certificate", "public key or a certificate"),
        ("der", "no PEM"),
        ("empty", "no PEM"),
        ("text", "no PEM"),
        ("garbage", "cannot be read"),
        ("cut", "cannot be read"),
        ("openssh", "cannot be read"),
    ],
)
def test_what_is_no_p256_private_key(made: Path, name: str, text: str) -> None:
    error = refuse(made, name, InvalidKeyError, text)
    assert error.hint


def test_openssh_hint_leads_to_a_key_that_opens(made: Path) -> None:
    error = refuse(made, "openssh", InvalidKeyError, "cannot be read")
    assert "ssh-keygen -p -m PKCS8" in error.hint
    command: list[str | Path] = ["ssh-keygen", "-p", "-m", "PKCS8", "-N", "", "-f", made / "copy"]
    (made / "copy").write_bytes((made / "openssh").read_bytes())
    (made / "copy").chmod(0o600)
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    open_signer(f"file://{made}/copy").close()


def test_two_keys_in_one_file_are_ambiguous(made: Path) -> None:
    refuse(made, "two", AmbiguousKeyError, "more than one")


def test_damaged_encrypted_file(made: Path) -> None:
    refuse(made, "damaged-encrypted", SecretSourceError, "cannot be decrypted", right)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o666])
def test_open_file_is_refused(made: Path, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_bytes((made / "pkcs8").read_bytes())
    path.chmod(mode)
    refuse(tmp_path, "key", SecretSourceError, f"{mode:04o}")


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path, "none", SecretSourceError, "No such file")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path, "folder", SecretSourceError, "cannot be read")


@pytest.mark.parametrize(
    "uri",
    [
        *("file:key.pem", "file:", "file://host/key.pem", "file://key.pem", "file:///a%00b"),
        *(
            "file:///k?x=y",
            "file:///k?passphrase-source=env:A&passphrase-source=env:B",
            "file:///%",
        ),
    ],
)
def test_uri_that_names_no_file(uri: str) -> None:
    for call in (open_signer, generate_key):
        with pytest.raises(KeyUriError):
            call(uri)


# -- making a key -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key.pem", "a key?#%.pem", "ключ.pem"])
def test_made_key_is_private_pkcs8_and_opens(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    generated = generate_key(path.as_uri())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    theirs = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(theirs, ec.EllipticCurvePrivateKey)
    assert PublicKey(theirs.public_key()) == generated.public_key
    with open_signer(
        generated.uri, expected_thumbprint=generated.public_key.thumbprint()
    ) as signer:
        location = signer.custody().evidence.location
        generated.public_key.verify(signer.sign(b"m"), b"m")
    assert location == path.as_uri()  # no bare ? or # that would start a query or a fragment


def test_made_key_is_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    generated = generate_key(f"file://{path}", passphrase_source=right)
    assert "ENCRYPTED" in path.read_text()
    command: list[str | Path] = [
        "openssl",
        "pkey",
        "-in",
        path,
        "-passin",
        f"pass:{PASSPHRASE}",
        "-pubout",
    ]
    done = subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert PublicKey.from_pem(done.stdout) == generated.public_key
    assert PASSPHRASE not in repr(generated)


def test_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("mine")
    (tmp_path / "link.pem").symlink_to(tmp_path / "dangling")
    for name in ("key.pem", "link.pem"):
        with pytest.raises(KeyExistsError, match=name):
            generate_key(f"file://{tmp_path}/{name}")
    assert path.read_text() == "mine"
    assert not (tmp_path / "dangling").exists()


@pytest.mark.parametrize("name", ["missing/key.pem", "x" * 300, "key.pem/x"])
def test_unwritable_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "key.pem").write_text("")
    with pytest.raises(SecretSourceError, match="cannot be written") as caught:
        generate_key(f"file://{tmp_path}/{name}", passphrase_source=right)
    assert "the disk has room" in caught.value.hint


def test_a_file_that_cannot_take_all_of_a_key_is_not_left(tmp_path: Path) -> None:
    """A limit on the size of files, as a full disk or a quota is one; in a process of its own."""
    path = tmp_path / "key.pem"
    limited = (
        "import resource; from d1_signer import D1SignerError, generate_key\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))\n"
        f"try: generate_key({path.as_uri()!r})\n"
        "except D1SignerError as error: print(error.code, error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=False, timeout=50
    )
    assert ran.stdout.startswith("secret_source The key file cannot be written"), ran.stderr
    assert "the disk has room" in ran.stdout
    assert not path.exists()


def test_passphrase_is_bounded(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/key.pem"
    with pytest.raises(SecretSourceError, match="1023") as caught:
        generate_key(uri, passphrase_source=lambda: PASSPHRASE * 100)
    assert_hidden(PASSPHRASE, caught.value)
    assert not (tmp_path / "key.pem").exists()
    generate_key(uri, passphrase_source=lambda: "é" * 511 + "x")
    open_signer(uri, passphrase_source=lambda: "é" * 511 + "x").close()


def test_passphrase_that_is_not_utf8(tmp_path: Path, made: Path) -> None:
    for source in (lambda: b"\xff" + PASSPHRASE.encode(), lambda: "\udcff" + PASSPHRASE):
        with pytest.raises(SecretSourceError) as caught:
            open_signer(f"file://{made}/pkcs8-encrypted", passphrase_source=source)
        assert_hidden(PASSPHRASE, caught.value)
        with pytest.raises(SecretSourceError):
            generate_key(f"file://{tmp_path}/key.pem", passphrase_source=source)


# -- custody ----------------------------------------------------------------------------------


def test_custody_tells_what_the_file_is_now(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    generate_key(f"file://{path}")
    signer = open_signer(f"file://{path}")

    def facts() -> dict[str, object]:
        return {fact.name: fact.value for fact in signer.custody().evidence.facts}

    assert facts()["mode"] == "0600"
    path.chmod(0o644)
    assert facts()["mode"] == "0644"
    path.unlink()
    assert facts()["file"] == "No such file or directory"
    evidence = signer.custody().evidence
    assert (evidence.exportable, evidence.generated_in_place, evidence.hardware) == (
        True,
        None,
        False,
    )


def test_closed_backend_holds_no_key(tmp_path: Path) -> None:
    generate_key(f"file://{tmp_path}/key.pem")
    signer = open_signer(f"file://{tmp_path}/key.pem")
    backend = signer._backend
    signer.close()
    assert not any(
        isinstance(value, ec.EllipticCurvePrivateKey) for value in vars(backend).values()
    )
    with pytest.raises(SignerClosedError):
        backend.sign_digest(bytes(32), None)

# SPDX-License-Identifier: Apache-2.0
"""``-o``: what is written, what is never written over, and a disk that is full."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates

import d1_signer.cli._looking
from d1_signer import generate_key
from d1_signer.cli import _output_file
from d1_signer.cli._output import Output
from d1_signer.cli._output_file import OutputFile
from d1_signer.errors import ConfigurationError
from tests.cli.conftest import COMMAND, Run, run_on_full_stdout

CSR = ("csr", "--subject", "CN=bank")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    generate_key(path.as_uri())
    return path


@pytest.fixture(params=[("public-key",), CSR], ids=["public-key", "csr"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    command: tuple[str, ...] = request.param
    return command


@pytest.fixture
def usual_mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_mask")
def test_it_says_what_it_wrote(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.pem"
    result = run(*command, "--key", key.as_uri(), "-o", str(file))
    assert (result.status, result.out) == (0, "")
    assert result.err.startswith("Wrote the ")
    assert str(file) in result.err
    assert file.read_text().startswith("-----BEGIN")
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert {path.name for path in tmp_path.iterdir()} == {"key.pem", "out.pem"}
    again = run(*command, "--key", key.as_uri(), "-o", str(file), "--force", "--json")
    assert again.document["file"] == str(file)


@pytest.mark.parametrize("path", ["no/out.pem", "file/out.pem", "link"])
def test_a_folder_that_is_none_is_told_before_the_key_is_opened(
    run: Run, command: tuple[str, ...], tmp_path: Path, path: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "no" / "out.pem")
    refused = run(
        *command, "--key", (tmp_path / "no.pem").as_uri(), "-o", str(tmp_path / path), "--force"
    )
    assert (refused.status, refused.out) == (2, "")
    assert f"{tmp_path / path} cannot be written: " in refused.err


def test_a_file_is_overwritten_by_force_only(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path
) -> None:
    file, link = tmp_path / "out.pem", tmp_path / "link"
    file.write_text("precious")
    link.symlink_to(file)
    for path in (file, link):
        refused = run(*command, "--key", key.as_uri(), "-o", str(path))
        assert (refused.status, refused.out) == (2, "")
        assert "--force" in refused.err
    assert file.read_text() == "precious"
    assert run(*command, "--key", key.as_uri(), "-o", str(link), "--force").status == 0
    assert file.read_text().startswith("-----BEGIN")
    assert link.is_symlink()


def test_a_link_that_leads_nowhere_is_something(run: Run, key: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    assert run("public-key", "--key", key.as_uri(), "-o", str(link)).status == 2
    assert not (tmp_path / "elsewhere").exists()


def links_to(path: Path) -> list[Path]:
    symbolic, hard = path.with_suffix(".symbolic"), path.with_suffix(".hard")
    symbolic.symlink_to(path)
    hard.hardlink_to(path)
    return [path, path.parent / "." / path.name, symbolic, hard]


@pytest.mark.parametrize("form", ["pem", "der"])
def test_the_key_itself_is_never_overwritten(
    run: Run, command: tuple[str, ...], key: Path, form: str
) -> None:
    before = key.read_bytes()
    paths = links_to(key)
    for path in paths:
        arguments = ("--key", key.as_uri(), "--format", form, "-o", str(path), "--force")
        result = run(*command, *arguments)
        assert (result.status, result.out) == (2, "")
        assert "never" in result.err
    assert key.read_bytes() == before
    for path in paths[2:]:
        path.unlink()  # or each would be a key that was left about


def test_no_file_of_the_settings_is_overwritten(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path
) -> None:
    named = {}
    names = ("D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE", "pin", "option", "a b", "flag")
    for name in names:
        named[name] = tmp_path / f"{name}.file"
        named[name].write_text("what stands there")
    hsm = f"pkcs11:token=t?pin-source=file:{named['pin']}"
    spaced = f"pkcs11:token=t?pin-source=file:{quote(str(named['a b']))}"
    variables = {name: str(path) for name, path in named.items() if name.startswith("D1_")}
    variables |= {
        "D1_CLIENT_KEY": f"file://{named['D1_CLIENT_KEY']}",
        "D1_SIGNER_KEY": f"{hsm} {spaced}",
        "D1_SIGNER_OPTIONS": f"passphrase_source=file:{named['option']}",
    }
    flags = ("--option", f"passphrase_source=file:{named['flag']}")
    for path in named.values():
        result = run(
            *command, "--key", key.as_uri(), *flags, "-o", str(path), "--force", **variables
        )
        assert result.status == 2
        assert "never" in result.err, path
        assert path.read_text() == "what stands there"


def test_no_file_of_an_sdk_or_a_module_is_overwritten(run: Run, key: Path, tmp_path: Path) -> None:
    names = (
        *("AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE", "GOOGLE_APPLICATION_CREDENTIALS"),
        *("VAULT_CLIENT_KEY", "BAO_CACERT", "SOFTHSM2_CONF"),
    )
    for name in names:
        file = tmp_path / name
        file.write_text("what stands there")
        result = run(
            "public-key", "--key", key.as_uri(), "-o", str(file), "--force", **{name: str(file)}
        )
        assert result.status == 2
        assert "never" in result.err
        assert file.read_text() == "what stands there"


def test_nothing_is_written_into_an_audit_trail(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path
) -> None:
    trail = tmp_path / "trail"
    assert run(*command, "--key", key.as_uri(), "--audit-trail", str(trail)).status == 0
    (instance,) = trail.iterdir()
    before = {path: path.read_bytes() for path in instance.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(next(iter(before)))
    for path in (*before, link, instance / "new.pem"):
        result = run(*command, "--key", key.as_uri(), "-o", str(path), "--force")
        assert (result.status, result.out) == (2, "")
        assert "audit trail" in result.err
    assert {path: path.read_bytes() for path in instance.iterdir()} == before


def other_keys() -> dict[str, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    encodings = {"PEM": Encoding.PEM, "DER": Encoding.DER}
    formats = {"PKCS#8": PrivateFormat.PKCS8, "SEC 1": PrivateFormat.TraditionalOpenSSL}
    forms = {
        f"{form} in {encoding}": key.private_bytes(
            encodings[encoding], formats[form], NoEncryption()
        )
        for encoding in encodings
        for form in formats
    }
    encrypted = BestAvailableEncryption(b"passphrase")
    forms["encrypted"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encrypted)
    forms["PKCS#12"] = serialize_key_and_certificates(b"name", key, None, None, encrypted)
    forms["encrypted, in DER"] = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, encrypted)
    openssh = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    forms |= {"OpenSSH": openssh, "behind certificates": b"certificate\n" * 60_000 + openssh}
    # Made by no library that is here; what they begin with.
    forms |= {
        "PKCS#12 in BER": bytes.fromhex("3080 020103 3080 06092a864886f70d010701"),
        "encrypted, in BER": bytes.fromhex("3080 3080 06092a864886f70d01050d"),
        "a long PKCS#12": bytes.fromhex("3083012345 020103"),
        "OpenPGP": b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n",
        "PuTTY": b"PuTTY-User-Key-File-3: ecdsa-sha2-nistp256\n",
        "age": b"# created: 2026\nAGE-SECRET-KEY-1QQ\n",
        "JKS": bytes.fromhex("feedfeed 00000002 00000001"),
        "JCEKS": bytes.fromhex("cececece 00000002 00000001"),
    }
    return {**forms, "JWK": b'{"kty": "EC", "crv": "P-256", "d": "AA"}'}


@pytest.mark.parametrize("form", other_keys())
def test_another_private_key_is_not_overwritten_either(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path, form: str
) -> None:
    other = tmp_path / "other"
    before = other_keys()[form]
    other.write_bytes(before)
    result = run(*command, "--key", key.as_uri(), "-o", str(other), "--force")
    assert result.status == 2
    assert "private key" in result.err
    assert other.read_bytes() == before


@pytest.mark.parametrize("form", ["pem", "der"])
def test_what_was_written_before_is_replaced(
    run: Run, command: tuple[str, ...], key: Path, tmp_path: Path, form: str
) -> None:
    arguments = (*command, "--key", key.as_uri(), "--format", form, "-o", str(tmp_path / "out"))
    assert run(*arguments).status == 0
    assert run(*arguments, "--force").status == 0


def test_what_is_no_file_is_left(run: Run, key: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/null")):
        result = run("public-key", "--key", key.as_uri(), "-o", str(path), "--force")
        assert result.status == 2
        assert "no regular file" in result.err
    assert fifo.is_fifo()
    assert run("public-key", "--key", key.as_uri(), "--force").status == 2


def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    put = _output_file._put

    def after_somebody_else(*arguments: Any, **options: Any) -> None:
        path.write_text("of somebody else")
        put(*arguments, **options)

    monkeypatch.setattr(_output_file, "_put", after_somebody_else)
    with pytest.raises(ConfigurationError, match="File exists"):
        OutputFile(path=path, overwrite=False).write(b"ours", "it", Output())
    assert path.read_text() == "of somebody else"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("path", ["/proc/self/out.pem", "/proc/self/comm"])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_key_is_opened(
    run: Run, command: tuple[str, ...], tmp_path: Path, path: str
) -> None:
    key = (tmp_path / "no.pem").as_uri()
    result = run(*command, "--key", key, "-o", path, "--force", "--json")
    assert (result.status, result.document["code"]) == (2, "configuration")
    assert f"{path} cannot be written" in result.document["message"]


@pytest.mark.parametrize(
    "arguments",
    [("--version",), ("--help",), ("csr", "--help"), ("public-key", "--key", "KEY")],
    ids=" ".join,
)
def test_a_full_disk_behind_standard_output(arguments: tuple[str, ...], key: Path) -> None:
    command = [key.as_uri() if word == "KEY" else word for word in arguments]
    done = run_on_full_stdout(*command)
    assert done.status == 1
    assert done.err == "Error: Standard output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_key_that_was_made_is_told_whatever_became_of_standard_output(
    tmp_path: Path, more: list[str]
) -> None:
    made = (tmp_path / "made.pem").as_uri()
    done = run_on_full_stdout("generate-key", "--key", f"{made}#bank", *more)
    assert done.status == 1
    assert done.err == (
        f"The key was made all the same: {made}#bank\n"
        "Error: Standard output cannot be written: No space left on device.\n"
    )
    assert (tmp_path / "made.pem").exists()


def test_a_full_disk_behind_standard_error(key: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "public-key", "--key", str(key)],
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_full_disk_behind_the_file(
    run: Run, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:  # a file server may tell it that late
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "out.pem"
    result = run("public-key", "--key", key.as_uri(), "-o", str(file))
    assert (result.status, result.out) == (1, "")
    assert f"{file} cannot be written: No space left on device." in result.err
    assert "Make room" in result.err
    assert "defect" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_a_full_disk_behind_a_file_of_a_library(
    run: Run, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_report: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(d1_signer.cli._looking, "key_text", full)
    result = run("custody", "--key", key.as_uri(), "--json")
    assert result.status == 1
    assert result.document["message"] == "A file cannot be written: No space left on device."
    assert "TMPDIR" in result.document["hint"]

# SPDX-License-Identifier: Apache-2.0
"""Secret sources, on real files, a real pipe and a real terminal."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
import os
import pickle
import pty
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, strategies as st

from d1_signer.errors import SecretSourceError
from d1_signer.secret import Secret, SecretSource, holds_key, read_private_file, read_secret
from tests.owners import give_away

from .secrecy import assert_hidden

VALUE = "hunter2-correct-horse"


def secret_file(folder: Path, content: bytes, mode: int = 0o600, name: str = "pin") -> Path:
    path = folder / name
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refuse(source: object, *, match: str | None = None) -> SecretSourceError:
    with pytest.raises(SecretSourceError, match=match) as caught:
        read_secret(source, what="PIN")  # type: ignore[arg-type]
    assert_hidden(VALUE, caught.value)
    return caught.value


# -- the type ---------------------------------------------------------------------------------


def test_only_reveal_shows_the_value(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(VALUE)
    logging.getLogger("unit").warning("it is %s, %r", secret, secret)
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r}", "%s %r" % (secret, secret)]  # noqa: UP031
    shown += [f"{[secret]} {({'k': secret},)}", "{}".format(secret), caplog.text]  # noqa: UP032
    with pytest.raises(KeyError) as caught:
        dict[Secret, int]()[
            secret
        ]  # an error with the secret as its argument, in a frame that holds it
    report = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown += list(report.format())
    assert "****" in shown[0]
    assert VALUE not in "".join(shown)
    assert secret.reveal() == VALUE


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_copied_out(leave: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="pickled") as caught:
        leave(Secret(VALUE))
    assert_hidden(VALUE, caught.value)


@pytest.mark.parametrize("spec", [">40", "s", "x"])
def test_format_with_a_specification_shows_nothing(spec: str) -> None:
    with pytest.raises(TypeError) as caught:
        format(Secret(VALUE), spec)
    assert_hidden(VALUE, caught.value)


def test_it_has_no_other_attributes() -> None:
    secret = Secret(VALUE)
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        vars(secret)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1234", "1234"),
        (b"1234\n", "1234"),
        (b"1234\r\n", "1234"),
        (b"1234\n\n", "1234\n"),
        (b" 12 34 \n", " 12 34 "),
        (b"1234\r", "1234"),
        ("pässwörd 🔑\n".encode(), "pässwörd 🔑"),
    ],
)
def test_file_loses_one_line_end(tmp_path: Path, content: bytes, expected: str) -> None:
    path = secret_file(tmp_path, content)
    for source in (f"file:{path}", f"file://{path}"):
        assert read_secret(source, what="PIN").reveal() == expected


def test_path_may_be_percent_encoded(tmp_path: Path) -> None:
    path = secret_file(tmp_path, b"1234", name="a pin é")
    assert read_secret(f"file:{path}", what="PIN").reveal() == "1234"
    assert read_secret(path.as_uri(), what="PIN").reveal() == "1234"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\r\n", VALUE.encode() + b"\xff", b"\xed\xa0\x80"]
)
def test_empty_or_not_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    error = refuse(f"file:{secret_file(tmp_path, content)}", match=r"empty, or not UTF-8")
    assert not error.retryable
    assert error.code == "secret_source"


OWN_KEY = ec.generate_private_key(ec.SECP256R1())
NUMBER = OWN_KEY.private_numbers().private_value.to_bytes(32)


def _exported(encoding: Encoding, form: PrivateFormat, *, locked: bool = False) -> bytes:
    lock = BestAvailableEncryption(b"x" * 8) if locked else NoEncryption()
    return OWN_KEY.private_bytes(encoding, form, lock)


def _forms_of_a_key() -> Iterator[tuple[str, str]]:
    for name, form in (("PKCS8", PrivateFormat.PKCS8), ("SEC1", PrivateFormat.TraditionalOpenSSL)):
        der = _exported(Encoding.DER, form)
        encoded = base64.b64encode(der).decode()
        yield f"{name}, PEM", _exported(Encoding.PEM, form).decode()
        yield f"{name}, DER", os.fsdecode(der)
        yield f"{name}, DER as Latin-1", der.decode("latin-1")
        yield f"{name}, base64", encoded
        yield f"{name}, a line of base64", encoded[:64]
        yield f"{name}, behind a scheme", f"file:///{encoded}"
        yield f"{name}, base64 of PEM lines", base64.b64encode(b"." + der).decode()
        yield f"{name}, hexadecimal", der.hex()
        yield f"{name}, with colons", der.hex(":")
    locked = _exported(Encoding.DER, PrivateFormat.PKCS8, locked=True)
    yield "encrypted, PEM", _exported(Encoding.PEM, PrivateFormat.PKCS8, locked=True).decode()
    yield "encrypted, DER", os.fsdecode(locked)
    yield "encrypted, base64", base64.b64encode(locked).decode()
    yield "encrypted, hexadecimal", locked.hex()
    jwk = {"kty": "EC", "d": base64.urlsafe_b64encode(NUMBER).decode().rstrip("=")}
    yield "JWK", json.dumps(jwk)
    yield "JWK, indented", "\n " + json.dumps(jwk, indent=2)
    yield "JWK, as Python writes it", str(jwk)
    yield "JWKs", f"[{json.dumps(jwk)}]"
    yield "number", NUMBER.hex()
    yield "number, in capitals", f" 0x{NUMBER.hex().upper()}\n"
    yield "number, as OpenSSL writes it", f"00:{NUMBER.hex(':')}"
    yield "number, in lines", f"{NUMBER[:15].hex(':')}:\n    {NUMBER[15:].hex(':')}\n"


FORMS_OF_A_KEY = dict(_forms_of_a_key())
DIGEST = hashlib.sha256(b"a file").digest()


@pytest.mark.parametrize("form", FORMS_OF_A_KEY)
def test_a_key_itself_is_known(form: str) -> None:
    assert holds_key(FORMS_OF_A_KEY[form])


@pytest.mark.parametrize(
    "text",
    [
        *("", "/etc/d1/client.key", "client.key", "0", "30", "{", "0x1F"),
        f"/var/lib/containers/{DIGEST.hex()}/client.key",
        f"{DIGEST.hex()}.pem",
        "9" * 5000,
        DIGEST.hex()[:40],
        "/srv/MANAGED/secrets/d1.example/production/eu-central-1/client/certificates/key",
        "pkcs11:token=bank;object=d1?pin-source=file:/etc/d1/pin",
        f"pkcs11:token=bank;id=%{DIGEST.hex('%')}",
        "awskms:///arn:aws:kms:eu-central-1:000000000000:key/00000000-0000-0000-0000-000000000000",
    ],
)
def test_what_is_no_key_is_not_taken_for_one(text: str) -> None:
    assert holds_key(text) is (text == "{")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o660, 0o620, 0o610, 0o644, 0o777, 0o646])
def test_open_file_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    error = refuse(f"file:{secret_file(tmp_path, VALUE.encode(), mode)}", match=f"{mode:04o}")
    assert "chmod 600" in error.hint


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700, 0o440, 0o640])
def test_private_file_is_taken(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, b"1234", mode)
    assert read_private_file(str(path), what="file") == b"1234"


def test_file_of_another_user_is_taken_from_one_who_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = secret_file(tmp_path, b"1234", 0o640)
    owner = give_away(path, monkeypatch)
    refuse(f"file:{path}", match=f"another user .uid {owner}.")
    with pytest.raises(SecretSourceError):
        read_private_file(str(path), what="file", trusted_owner=owner + 7)
    assert read_private_file(str(path), what="file", trusted_owner=owner) == b"1234"
    assert read_secret(f"file:{path}", what="PIN", trusted_owner=owner).reveal() == "1234"
    for mode in (0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(SecretSourceError, match=f"{mode:04o}"):
            read_private_file(str(path), what="file", trusted_owner=owner)


def test_symbolic_link_counts_by_its_target(tmp_path: Path) -> None:
    target = secret_file(tmp_path, VALUE.encode(), 0o644)
    link = tmp_path / "link"
    link.symlink_to(target)
    refuse(f"file:{link}", match="0644")
    target.chmod(0o600)
    assert read_secret(f"file:{link}", what="PIN").reveal() == VALUE
    target.unlink()
    refuse(f"file:{link}", match="No such file")
    link.unlink()
    link.symlink_to(link)
    refuse(f"file:{link}", match="cannot be read")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    started = time.monotonic()
    refuse(f"file:{fifo}", match="not a regular file")
    refuse(f"file:{tmp_path}", match="cannot be read|not a regular file")
    refuse("file:/dev/null", match="not a regular file")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "path", ["", "/does/not/exist", "/etc/passwd/x", "a\0b", "%00", "x" * 5000]
)
def test_unreadable_path_is_our_error(path: str) -> None:
    refuse(f"file:{path}", match="cannot be read")


def test_size_is_bounded(tmp_path: Path) -> None:
    most = secret_file(tmp_path, b"a" * (1 << 20))
    assert len(read_private_file(str(most), what="file")) == 1 << 20
    refuse(f"file:{secret_file(tmp_path, b'a' * ((1 << 20) + 1))}", match="larger than 1 MiB")


# -- environment, callables, and what is none of these ---------------------------------------


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIT_PIN", VALUE)
    assert read_secret("env:UNIT_PIN", what="PIN").reveal() == VALUE
    monkeypatch.setenv("UNIT_PIN", "")
    refuse("env:UNIT_PIN", match="empty")


@pytest.mark.parametrize("name", ["UNIT_UNSET", VALUE, "", "a\0b", "a=b", "\ud800" + VALUE])
def test_unset_variable_is_not_named(name: str) -> None:
    # Somebody may have written the secret itself behind env:.
    error = refuse(f"env:{name}", match="not set")
    assert not name or name not in str(error)
    assert error.__context__ is None


def test_environment_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the value fails later, where it is encoded, in a UnicodeEncodeError that carries it.
    monkeypatch.setitem(os.environb, b"UNIT_PIN", VALUE.encode() + b"\xff")
    refuse("env:UNIT_PIN", match="not UTF-8")


@pytest.mark.parametrize("value", [VALUE, VALUE.encode()])
def test_callable(value: str | bytes) -> None:
    assert read_secret(lambda: value, what="PIN").reveal() == VALUE


@pytest.mark.parametrize(
    "value", ["", b"", None, 1234, [VALUE], b"\xff" + VALUE.encode(), "\ud800"]
)
def test_callable_that_gives_no_text(value: object) -> None:
    refuse(lambda: value, match="empty, or not UTF-8")


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, OSError, UnicodeError])
def test_callable_that_fails_with_the_secret_in_its_text(kind: type[Exception]) -> None:
    def source() -> str:
        raise kind(VALUE)

    error = refuse(source, match=kind.__name__)
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_passes_through(kind: type[BaseException]) -> None:
    def source() -> str:
        raise kind

    with pytest.raises(kind):
        read_secret(source, what="PIN")


@pytest.mark.parametrize(
    "source", [VALUE, "", "File:/x", "env", "prompt:", None, 7, b"env:X", [VALUE]]
)
def test_unknown_source_is_not_repeated(source: object) -> None:
    error = refuse(source, match="not understood")
    assert "file:PATH" in error.hint


@given(st.text())
def test_any_text_is_a_secret_or_our_error(text: str) -> None:
    source: SecretSource = text
    if not text.startswith(("file:", "env:", "prompt")):
        refuse(source)


# -- the prompt -------------------------------------------------------------------------------

ASK = (
    "from d1_signer.secret import read_secret\n"
    "secret = read_secret('prompt', what='PIN')\n"
    "print('length', len(secret.reveal()))"
)


def on_a_terminal(typed: bytes) -> tuple[int, str]:
    """Run `ASK` on a new terminal, type once it asks, and return its status and all it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", ASK])  # noqa: S606 (no shell wanted)
    shown = b""
    until = time.monotonic() + 20
    try:
        while time.monotonic() < until:
            ready, _, _ = select.select([terminal], [], [], 1)
            if not ready:
                continue
            try:
                read = os.read(terminal, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not read:
                break
            shown += read
            if typed and b"PIN: " in shown:
                os.write(terminal, typed)
                typed = b""
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), shown.decode()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_prompt_on_a_terminal_does_not_echo() -> None:
    status, shown = on_a_terminal(VALUE.encode() + b"\n")
    assert status == 0, shown
    assert f"length {len(VALUE)}" in shown
    assert VALUE not in shown


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("typed", "text"), [(b"\n", "empty"), (b"\x04", "No PIN was given")])
def test_prompt_without_an_answer(typed: bytes, text: str) -> None:
    status, shown = on_a_terminal(typed)
    assert status == 1
    assert f"SecretSourceError: The PIN is {text}" in shown or text in shown


@pytest.mark.parametrize("closed", [False, True])
def test_prompt_without_a_terminal(closed: bool) -> None:
    code = ("import sys; sys.stdin = None\n" if closed else "") + ASK
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "SecretSourceError: The PIN cannot be asked for" in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""A wrong PIN that many would send, and PIN files with more in them than a PIN."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer import SecretSourceError, open_signer
from d1_signer.backends.pkcs11.session.pin import Pin
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim
from tests.servers.process import free_port

ROOT = Path(__file__).parents[2]
_PAGE = (ROOT / "docs/pkcs11/operation.md").read_text()
_COUNT_LOW = 0x10000


@pytest.mark.parametrize("isolation", ["none", "process"])
@pytest.mark.parametrize(
    ("form", "told"),
    [
        (b"\xef\xbb\xbf%s", "a byte order mark"),
        (b"%s\n\n", "blanks or line ends"),
        (b"%s \n", "blanks or line ends"),
        (b" %s", "blanks or line ends"),
        (b"\xc2\xa0%s", "blanks or line ends"),
        (b"%s\r\n\r\n", "blanks or line ends"),
        (b"%s\nsecond line", "several lines"),
        (b"%s\x00", "control characters"),
    ],
)
def test_more_than_a_pin_is_not_sent(
    token: SoftHsmToken, shim: Shim, isolation: str, form: bytes, told: str
) -> None:
    token.pin_file.write_bytes(form % token.pin.encode())
    with pytest.raises(SecretSourceError, match=told):
        open_signer(token.uri, module_path=shim.path, isolation=isolation)
    assert shim.calls(Call.LOGIN) == 0


@pytest.mark.parametrize("form", [b"%s", b"%s\n", b"%s\r\n"])
def test_what_editors_write_is(token: SoftHsmToken, shim: Shim, form: bytes) -> None:
    token.pin_file.write_bytes(form % token.pin.encode())
    open_signer(token.uri, module_path=shim.path).close()


def test_a_pin_that_is_typed_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def person(prompt: str, **_: object) -> str:
        asked.append(prompt)
        return "98765432"

    monkeypatch.setattr("d1_signer.secret.getpass.getpass", person)
    monkeypatch.setattr("d1_signer.secret.sys.stdin.isatty", lambda: True, raising=False)
    pin = Pin("prompt", None, of="pkcs11:token=t")
    for _ in range(2):
        typed = pin.read()
        assert typed is not None
        assert typed is pin.kept
        assert typed.reveal() == "98765432"
    assert asked == ["PIN for pkcs11:token=t: "]
    assert Pin(None, None, of="pkcs11:token=t").read() is None


def test_a_pin_of_a_file_is_read_each_time_and_kept_where_the_file_is_away(tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.touch(mode=0o600)
    pin = Pin(f"file:{file}", None, of="pkcs11:token=t")
    for text in ("98765432", "23456789"):
        file.write_text(text)
        read = pin.read()
        assert read is not None
        assert read.reveal() == text
    file.unlink()
    kept = pin.read()
    assert kept is not None
    assert kept.reveal() == "23456789"
    with pytest.raises(SecretSourceError) as away:
        Pin(f"file:{file}", None, of="pkcs11:token=t").read()
    assert away.value.details["step"] == "login"


def test_a_pin_with_blanks_comes_by_other_ways(token: SoftHsmToken, shim: Shim) -> None:
    """It is the token that refuses it here."""
    with pytest.raises(Exception, match="PIN"):
        open_signer(token.uri, module_path=shim.path, pin_source=lambda: f"{token.pin} ")
    assert shim.calls(Call.LOGIN) == 1


def test_a_token_that_counts_is_warned_of(
    token: SoftHsmToken, shim: Shim, caplog: pytest.LogCaptureFixture
) -> None:
    shim.add_token_flags(_COUNT_LOW)
    with caplog.at_level(logging.WARNING):
        open_signer(token.uri, module_path=shim.path).close()
    assert [record for record in caplog.messages if record.startswith("pkcs11.pin_count_low")]


def test_status_that_a_supervisor_gives_up_on(token: SoftHsmToken, tmp_path: Path) -> None:
    """The page's example, with the status that its unit names."""
    token.pin_file.write_text("wrong-pin")
    (code,) = re.findall(r"^```python\n(.*?)^```$", _PAGE, re.DOTALL | re.MULTILINE)
    (status,) = re.findall(r"^RestartPreventExitStatus=(\d+)$", _PAGE, re.MULTILINE)
    script = tmp_path / "service.py"
    script.write_text(f"KEY = {token.key_uri('d1')!r}\n{code}")
    ran = subprocess.run([sys.executable, script], capture_output=True, timeout=60, check=False)
    assert ran.returncode == int(status), ran.stderr


_APPLICATION = """
import os
from d1_signer import open_signer

signer = open_signer(os.environ["KEY"], module_path=os.environ["MODULE"])

def application(environ, start_response):
    start_response("200 OK", [])
    return [b""]
"""


def test_workers_that_are_forked_after_the_opening(
    token: SoftHsmToken, shim: Shim, tmp_path: Path
) -> None:
    token.pin_file.write_text("wrong-pin")
    (tmp_path / "service.py").write_text(_APPLICATION)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "gunicorn", "--preload", "--workers", "4"),
            *("--bind", f"127.0.0.1:{free_port()}", "--no-control-socket", "service:application"),
        ],
        cwd=tmp_path,
        env=os.environ | {"KEY": token.uri, "MODULE": shim.path},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode != 0
    assert shim.calls(Call.LOGIN) == 1

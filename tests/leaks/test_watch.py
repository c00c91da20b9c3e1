# SPDX-License-Identifier: Apache-2.0
"""The watch fails a test in which a secret shows, wherever that is; tried in another pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer.errors import D1SignerError
from tests.leaks import allowed, hooks
from tests.leaks.watch import TESTS

_ROOT = TESTS.parent
# In each, PIN is a secret of the suite that no other line of the test shows.
_PLANTED = {
    "message": "raise_(InvalidInputError(f'no {PIN}'))",
    "hint": "raise_(InvalidInputError('no', hint=f'try {PIN}'))",
    "details": "raise_(InvalidInputError('no', details={'pin': PIN}))",
    "argument": "error = ValueError(1, (2, [PIN])); raise_(error)",
    "attribute": "error = ValueError(1); error.pin = {'held': PIN}; raise_(error)",
    "note": "error = ValueError(1); error.add_note(PIN); raise_(error)",
    "cause": "error = ValueError(1); error.__cause__ = KeyError(PIN); raise_(error)",
    "context": "error = ValueError(1); error.__context__ = KeyError(PIN); raise_(error)",
    "group": "raise_(ExceptionGroup('two', [KeyError(1), ValueError(PIN)]))",
    "group_in_group": "raise_(ExceptionGroup('2', [ExceptionGroup('1', [ValueError(PIN)])]))",
    "bytes": "raise_(ValueError(PIN.encode()))",
    "json": "import json\n    raise_(json.JSONDecodeError('no', PIN + '}', 0))",
    "quoted": "from urllib.parse import quote\n    raise_(ValueError(quote(PIN, safe='')))",
    "base64": "raise_(ValueError(base64.b64encode(PIN.encode()).decode()))",
    "base_exception": "raise_(KeyboardInterrupt(PIN))",
    "request": "import requests\n    raise_(requests.ConnectionError(request=requests.Request("
    "'GET', 'http://x', headers={'x': PIN}).prepare()))",
    "in_frame": "frame('holder = given; raise ValueError(1)', PIN)",
    "held_error": "frame('try:\\n  raise KeyError(given)\\n except KeyError as e: held = e\\n"
    " given = None\\n raise ValueError(1)', PIN)",
    "key_as_pem": "raise_(ValueError(PEM))",
    "key_as_number": "raise_(ValueError(KEY.private_numbers().private_value))",
    "key_as_der": "raise_(ValueError(DER))",
    "key_as_jwk": "raise_(ValueError(repr({'d': D})))",
    "log": "logging.getLogger('somebody.else').debug('value %s', PIN)",
    "log_of_a_loud_library": "logging.getLogger('loud').debug('value %s', PIN)",
    "log_with_error": "ours('logging.getLogger(\"d1_signer.x\").info(1, exc_info=True)', PIN)",
    "file": "ours('pathlib.Path(folder, \"f\").write_text(given)', PIN, folder=tmp_path)",
    "file_by_os": 'ours(\'os.write(os.open(folder / "f", os.O_WRONLY | os.O_CREAT), '
    "given.encode())', PIN, folder=tmp_path)",
    "file_elsewhere": "ours('pathlib.Path(folder, \"f\").write_text(given)', PIN, "
    "folder=tempfile.mkdtemp())",
    "file_that_is_gone": 'ours(\'pathlib.Path(folder, "f").write_text(given); '
    'pathlib.Path(folder, "f").unlink()\', PIN, folder=tmp_path)',
    "file_renamed": 'ours(\'pathlib.Path(folder, "f").write_text(given); '
    'pathlib.Path(folder, "f").rename(folder / "g")\', PIN, folder=tmp_path)',
    "file_of_a_child": "subprocess.run([sys.executable, '-c', 'import sys; "
    "open(sys.argv[1], \"w\").write(sys.argv[2])', tmp_path / 'f', PIN])",
}
_HARMLESS = {
    "masked": "raise_(InvalidInputError(repr(Secret(PIN))))",
    "in_the_tests_hands": "raise_(ValueError(1))",
    "file_of_the_test": "(tmp_path / 'pin').write_text(PIN)",
    "file_of_the_test_renamed": "(tmp_path / 'p').write_text(PIN); "
    "(tmp_path / 'p').rename(tmp_path / 'q')",
    "botocore": "logging.getLogger('botocore.endpoint').debug(PIN)",
}
_HEAD = """
import base64, logging, os, pathlib, subprocess, sys, tempfile, uuid
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
import d1_signer.secret
from d1_signer import InvalidInputError, Secret
from tests.leaks import hooks
logging.getLogger("loud").propagate = False
OURS = d1_signer.secret.__file__.replace("secret.py", "planted.py")

@hooks._noting_errors
def public(error):
    raise error

def raise_(error):
    with pytest.raises(BaseException):
        public(error)


def run(body, given, **names):
    scope = {**globals(), **names}
    exec(compile("def planted(given):\\n " + body, OURS, "exec"), scope)
    return scope["planted"](given)

def frame(body, given):
    with pytest.raises(BaseException):
        hooks._noting_errors(run)(body, given)

def ours(body, given, **names):
    run("try:\\n  raise ValueError(1)\\n except ValueError:\\n  " + body, given, **names)
"""
_TEST = """
def test_{name}(tmp_path):
    PIN = "a pin/" + uuid.uuid4().hex
    Secret(PIN)
    KEY = ec.generate_private_key(ec.SECP256R1())
    DER = KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    D = base64.urlsafe_b64encode(KEY.private_numbers().private_value.to_bytes(32)).decode()
    {planted}
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each planted test, by its name."""
    folder = tmp_path_factory.mktemp("planted")
    tests = (_TEST.format(name=name, planted=line) for name, line in (_PLANTED | _HARMLESS).items())
    (folder / "test_planted.py").write_text(_HEAD + "".join(tests))
    options = "-p no:cacheprovider -p no:benchmark -p tests.conftest -rA -q --tb=no -c /dev/null"
    places = ["--rootdir", str(folder), "--basetemp", str(folder / "temp"), str(folder)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), *places],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = [line.split() for line in ran.stdout.splitlines() if "::test_" in line]
    found = {words[1].partition("::test_")[2]: words[0] for words in lines}
    assert found.keys() == (_PLANTED | _HARMLESS).keys(), ran.stdout + ran.stderr
    return found


@pytest.mark.parametrize("name", _PLANTED)
def test_what_is_planted_is_found(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ERROR"


@pytest.mark.parametrize("name", _HARMLESS)
def test_what_shows_nothing_is_not(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "PASSED"


def test_what_is_left_out_is_what_the_documents_say() -> None:
    security = " ".join((_ROOT / "SECURITY.md").read_text().split())
    reasons = [reason for *_, reason in (*allowed.LOGGERS, *allowed.WRITERS)]
    said = [reason.partition(": ")[2] for reason in reasons if reason.startswith("SECURITY.md")]
    assert said
    for words in said:
        assert words in security
    for part, _ in allowed.WRITERS:
        assert Path(_ROOT, part).exists()


def test_what_comes_in_a_test_that_is_not_watched_is_not_held_against_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "current", hooks.current)
    before = [*hooks.between.errors]
    hooks.ignore()
    D1SignerError("Of a test that is not watched.")
    hooks.end()
    assert hooks.between.errors == before
    D1SignerError("Of a fixture that serves many tests.")
    assert len(hooks.between.errors) == len(before) + 1

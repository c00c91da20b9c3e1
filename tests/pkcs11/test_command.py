# SPDX-License-Identifier: Apache-2.0
"""The `d1-signer` command: the options of this backend, its steps, and what a module prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_public_key

from d1_signer.testing import SoftHsmToken
from tests.cli.conftest import COMMAND, Result, run_on_full_stdout, run_process
from tests.pkcs11.conftest import Run
from tests.pkcs11.shim import HANG, Call, Shim

GENERAL_ERROR = 5
PIN_PAD = 0x100  # CKF_PROTECTED_AUTHENTICATION_PATH
CRYPTO_USER = 0x80000001  # of a Luna partition
ISOLATION = pytest.mark.parametrize("isolation", ["none", "process"])


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("D1_")]:
        monkeypatch.delenv(name)


def options(**given: object) -> list[str]:
    return [word for name, value in given.items() for word in ("--option", f"{name}={value}")]


def statuses(result: Result) -> dict[str, str]:
    steps = ("module", "token", "login", "key", "signature", "custody")
    return {
        step["step"]: step["status"] for step in result.document["steps"] if step["step"] in steps
    }


# -- options ----------------------------------------------------------------------------------


def test_every_command_works_with_the_module_in_a_process_of_its_own(token: SoftHsmToken) -> None:
    isolated = options(isolation="process", max_sessions=2)
    made = run_process("generate-key", "--json", "--key", token.key_uri("made"), *isolated)
    assert made.status == 0, made.out
    uri = made.document["uri"]
    public = run_process("public-key", "--json", "--key", uri, *isolated)
    assert public.document["public_key"] == made.document["public_key"]
    custody = run_process("custody", "--json", "--key", uri, *isolated).document["keys"][0]
    facts = {fact["name"]: fact["value"] for fact in custody["facts"]}
    assert (facts["isolation"], custody["exportable"]) == ("process", False)
    request = run_process("csr", "--key", uri, "--subject", "CN=bank", *isolated)
    assert x509.load_pem_x509_csr(request.out.encode()).is_signature_valid
    assert statuses(run_process("check", "--json", "--key", uri, *isolated)) == dict.fromkeys(
        ("module", "token", "login", "key", "signature", "custody"), "ok"
    )


def test_module_pin_and_locking_by_options(token: SoftHsmToken) -> None:
    bare = token.uri.partition("?")[0]
    result = run_process(
        "custody",
        "--json",
        "--key",
        bare,
        "--option",
        "locking=lock",
        D1_SIGNER_OPTIONS=f"module_path={token.module_path} 'pin_source=file:{token.pin_file}'",
    )
    facts = {fact["name"]: fact["value"] for fact in result.document["keys"][0]["facts"]}
    assert facts["locking"] == "lock"


def test_the_user_type_of_a_vendor(token: SoftHsmToken, shim: Shim) -> None:
    vendor = options(module_path=shim.path, user_type=hex(CRYPTO_USER))
    result = run_process("check", "--json", "--key", token.uri, *vendor)
    assert shim.user_type == CRYPTO_USER
    assert (result.status, result.document["stopped_at"]["step"]) == (1, "login")


@ISOLATION
def test_a_pin_pad(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch, isolation: str
) -> None:
    uri = token.uri.partition("?")[0]
    pad = options(module_path=shim.path, protected_authentication_path="true", isolation=isolation)
    refused = run_process("check", "--json", "--key", uri, *pad)
    assert refused.document["stopped_at"]["step"] == "login"
    shim.add_token_flags(PIN_PAD)
    monkeypatch.setenv("SHIM_PIN", token.pin)  # what a person enters
    passed = run_process("check", "--json", "--key", uri, *pad)
    assert set(statuses(passed).values()) == {"ok"}


def test_a_token_without_the_public_key(
    token: SoftHsmToken, run_python: Run, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    assert run_process("public-key", "--key", token.uri, "-o", str(path)).status == 0
    gone = run_python(_DESTROY_PUBLIC, token.module_path, token.label, token.pin)
    assert gone.returncode == 0, gone.stderr
    without = run_process("check", "--json", "--key", token.uri)
    assert without.document["stopped_at"]["step"] == "key"
    for command in ("check", "custody", "public-key"):
        given = run_process(command, "--key", token.uri, *options(public_key=path))
        assert given.status == 0, given.out + given.err


_DESTROY_PUBLIC = """
import sys
import pkcs11
module, label, pin = sys.argv[1:]
with pkcs11.lib(module).get_token(token_label=label).open(rw=True, user_pin=pin) as session:
    for item in list(session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY})):
        item.destroy()
"""


@pytest.mark.parametrize(
    "option",
    [
        "locking=nonsense",
        "max_sessions=0",
        "max_sessions=many",
        "isolation=thread",
        "processes=0",
        "user_type=-1",
        "timeout=0",
        "session_timeout=x",
        "protected_authentication_path=yes",
        "no_such_option=1",
    ],
)
def test_a_wrong_value_is_wrong_usage(token: SoftHsmToken, option: str) -> None:
    for command in ("check", "public-key"):
        result = run_process(command, "--json", "--key", token.uri, "--option", option)
        assert result.status == 2
        assert option.partition("=")[0] in result.document["message"]


def test_a_hanging_module_is_given_up_after_the_time_that_is_given(
    token: SoftHsmToken, shim: Shim
) -> None:
    shim.fail(Call.SIGN, HANG)
    for limit in (("--timeout", "0.5"), ("--option", "timeout=0.5")):
        result = run_process(
            "public-key", "--json", "--key", token.uri, *options(module_path=shim.path), *limit
        )
        assert result.document["code"] == "signer_timeout"
    shim.heal()


# -- the steps of check -----------------------------------------------------------------------


@ISOLATION
@pytest.mark.parametrize(
    ("call", "stopped_at"),
    [
        (Call.INITIALIZE, "module"),
        (Call.LOGIN, "login"),
        (None, "key"),
        (Call.SIGN_INIT, "signature"),
        (Call.SIGN, "signature"),
    ],
)
def test_what_was_not_reached_is_skipped(
    token: SoftHsmToken, shim: Shim, call: Call | None, stopped_at: str, isolation: str
) -> None:
    if call is not None:
        shim.fail(call, GENERAL_ERROR)
    uri = token.key_uri("none" if call is None else "d1")
    given = options(module_path=shim.path, isolation=isolation)
    result = run_process("check", "--json", "--key", uri, *given)
    steps = ["module", "token", "login", "key", "signature", "custody"]
    at = steps.index(stopped_at)
    states = ["ok"] * at + ["failed"] + ["skipped"] * (len(steps) - at - 1)
    assert statuses(result) == dict(zip(steps, states, strict=True))
    shim.heal()


@ISOLATION
def test_a_pin_that_cannot_be_read(token: SoftHsmToken, isolation: str) -> None:
    token.pin_file.unlink()
    result = run_process("check", "--json", "--key", token.uri, *options(isolation=isolation))
    assert statuses(result) == {
        # The module is loaded before the PIN is read; in a process of its own, after.
        "module": "ok" if isolation == "none" else "skipped",
        "token": "skipped",
        "login": "failed",
        "key": "skipped",
        "signature": "skipped",
        "custody": "skipped",
    }


@ISOLATION
def test_a_uri_that_cannot_be_read(token: SoftHsmToken, isolation: str) -> None:
    uri = token.uri.replace("object=", "subject=")
    result = run_process("check", "--json", "--key", uri, *options(isolation=isolation))
    assert result.document["stopped_at"]["step"] == "key"
    assert "ok" not in statuses(result).values()


@ISOLATION
def test_a_pin_that_was_refused_before(token: SoftHsmToken, tmp_path: Path, isolation: str) -> None:
    wrong = tmp_path / "wrong-pin"
    wrong.touch(0o600)
    wrong.write_text("0000-wrong")
    uri = token.uri.replace(str(token.pin_file), str(wrong))
    given = options(isolation=isolation)
    result = run_process("check", "--json", "--key", uri, "--key", uri, *given)
    first, second = ([s["status"] for s in result.document["steps"]][at : at + 6] for at in (0, 6))
    assert first == ["ok", "ok", "failed", "skipped", "skipped", "skipped"]
    # The second process is not even started.
    before = ["ok", "ok"] if isolation == "none" else ["skipped", "skipped"]
    assert second == [*before, "failed", "skipped", "skipped", "skipped"]


def test_a_login_that_did_not_take_place(token: SoftHsmToken) -> None:
    bare = token.uri.partition("&pin-source")[0]
    result = run_process("check", "--json", "--key", bare)
    assert result.document["stopped_at"]["step"] == "login"
    assert statuses(result)["token"] == "ok"


# -- standard output --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def loud_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("No C compiler: apt-get install gcc libc6-dev.", pytrace=False)
    target = tmp_path_factory.mktemp("loud") / "loud.so"
    source = Path(__file__).with_name("loud.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return target


@pytest.fixture
def loud_uri(loud_path: Path, token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOUD_MODULE", token.module_path)
    return token.uri.replace(token.module_path, str(loud_path))


@ISOLATION
def test_what_a_module_prints_goes_to_standard_error(loud_uri: str, isolation: str) -> None:
    given = options(isolation=isolation)
    document = run_process("public-key", "--json", "--key", loud_uri, *given)
    assert set(document.document) == {"away", "format", "keys", "public_key"}
    assert "SDK Version" in document.err
    der = subprocess.run(
        [*COMMAND, "public-key", "--format", "der", "--key", loud_uri, *given],
        capture_output=True,
        check=True,
        timeout=30,
    )
    load_der_public_key(der.stdout)
    assert len(der.stdout) == 91
    made = run_process("generate-key", "--json", "--key", loud_uri.replace("=d1", "=d2"), *given)
    assert made.document["public_key"].startswith("-----BEGIN")
    told = run_process("check", "--key", loud_uri, *given)
    assert "SDK" not in told.out
    assert told.out.startswith("pkcs11:")


def test_what_a_module_holds_back_until_the_end_does_not_follow_ours(loud_uri: str) -> None:
    result = run_process("public-key", "--key", loud_uri)
    assert result.out.endswith("-----END PUBLIC KEY-----\n")
    assert "held back" in result.err


_CLOSED = """
import os, subprocess, sys
for number in map(int, sys.argv[1].split(",")):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "d1_signer.cli", *sys.argv[2:]])
"""


@pytest.mark.parametrize("closed", ["1", "2", "1,2", "0,1,2"])
@pytest.mark.parametrize("form", ["pem", "der"])
def test_closed_descriptors(
    loud_uri: str, run_python: Run, closed: str, form: str, tmp_path: Path
) -> None:
    arguments = ("public-key", "--format", form, "--key", loud_uri)
    ran = run_python(_CLOSED, closed, *arguments, "-o", str(tmp_path / "key"))
    assert ran.returncode == 0, ran.stderr
    assert b"SDK" not in (tmp_path / "key").read_bytes()
    if form == "pem" and "1" not in closed:
        plain = run_python(_CLOSED, closed, *arguments)
        assert plain.stdout.encode() == (tmp_path / "key").read_bytes()


_SERVICE = """
import os, sys
from d1_signer import open_signer
from d1_signer.cli import main
uri, isolation = sys.argv[1:]
before = os.fstat(1)
with open_signer(uri, isolation=isolation) as signer:
    signer.sign(b"x")
    assert main(["custody", "--key", uri]) == 0
    assert os.path.sameopenfile(1, 1) and os.fstat(1) == before
os.write(1, b"its own\\n")
"""


@ISOLATION
def test_the_descriptors_of_a_service_are_its_own(
    loud_uri: str, run_python: Run, isolation: str
) -> None:
    ran = run_python(_SERVICE, loud_uri, isolation)
    assert ran.returncode == 0, ran.stderr
    assert "its own" in ran.stdout
    assert "SDK Version" in ran.stdout  # of main(), which loads the module into this process


def test_nothing_can_be_written(token: SoftHsmToken) -> None:
    for more in ((), ("--json",)):
        done = run_on_full_stdout("custody", "--key", token.uri, *more)
        assert done.status == 1
        assert done.err == "Error: Standard output cannot be written: No space left on device.\n"


def test_a_reader_that_goes_away_before_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [*COMMAND, "custody", "--json", "--key", "file:///none"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=30,
        )
    assert (done.returncode, done.stderr) == (1, "")

# SPDX-License-Identifier: Apache-2.0
"""A TPM 2.0 through tpm2-pkcs11, set up as docs/pkcs11/tpm.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from d1_signer.es256 import PublicKey
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.conftest import Run
from tests.pkcs11.tpm import Tpm, running_tpm
from tests.pkcs11.wire import module

ROOT = Path(__file__).parents[2]
_PAGE = (ROOT / "docs" / "pkcs11" / "tpm.md").read_text()
_SET_UP, _NEW_PIN, _LOCKOUT = re.findall(r"^```sh\n(.*?)^```$", _PAGE, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A token ``bank`` with the key ``d1``, made by what the page shows."""

    tpm: Tpm
    folder: Path
    printed: str
    env: dict[str, str]
    uri: str

    def run(self, commands: str) -> str:
        """What commands of the page print."""
        return _run(self.tpm, self.folder, commands, self.env)

    def with_pin(self, pin: str) -> str:
        """The key's URI with another PIN."""
        file = self.folder / "another-pin"
        file.touch(0o600)
        file.write_text(pin)
        return self.uri.replace(str(self.folder / "pin"), str(file))

    @property
    def key(self) -> PublicKey:
        (pem,) = re.findall(r"-----BEGIN.*END PUBLIC KEY-----\n", self.printed, re.DOTALL)
        return PublicKey.from_pem(pem)


def _run(tpm: Tpm, folder: Path, commands: str, env: dict[str, str]) -> str:
    """Run commands as the page has them, with this TPM and folder in place of the machine's."""
    commands = commands.replace("device:/dev/tpmrm0", tpm.tcti).replace("/etc/d1", str(folder))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return tpm.tool("bash", "-eu", "-c", commands, PATH=path, **env)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("tpm")
    with running_tpm(folder) as tpm:
        printed = _run(tpm, folder, _SET_UP + 'echo "$D1_SIGNER_KEY"\n', {})
        env = {**tpm.env, "TPM2_PKCS11_STORE": str(folder / "tpm2")}
        uri = printed.splitlines()[-1]
        yield Store(tpm=tpm, folder=folder, printed=printed, env=env, uri=uri)


def test_set_up_as_the_page_says(store: Store) -> None:
    steps = re.findall(r"^  (\w+) +([\w-]+)", store.printed, re.MULTILINE)
    assert [name for word, name in steps if word == "ok"] == [
        *("module", "token", "login", "key", "signature", "custody")
    ]
    claimed = "exportable: no (claimed), generated in place: yes (claimed), hardware: yes (claimed)"
    assert f"{claimed}, locking: os, not judged: no D1_CUSTODY_POLICY is set" in store.printed


_USE = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from d1_signer import open_signer
from d1_signer.errors import D1SignerError

uri, isolation = sys.argv[1:]
with open_signer(uri, isolation=isolation, max_sessions=3, timeout=40) as signer:
    with ThreadPoolExecutor(6) as pool:
        signatures = list(pool.map(lambda turn: signer.sign(b"%d" % turn).hex(), range(48)))
    facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
    if isolation == "process":
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, signer.sign(b"48").hex().encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as told:
            signatures.append(told.read())
        os.waitpid(child, 0)
    signatures.append(signer.sign(b"%d" % len(signatures)).hex())
print(json.dumps([signatures, facts]))
"""


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_threads_sign(store: Store, run_python: Run, isolation: str) -> None:
    ran = run_python(_USE, store.uri, isolation, **store.env)
    assert ran.returncode == 0, ran.stderr
    signatures, facts = json.loads(ran.stdout)
    assert len(signatures) == (50 if isolation == "process" else 49)
    for turn, signature in enumerate(signatures):
        store.key.verify(bytes.fromhex(signature), b"%d" % turn)
    told = {"CKA_SENSITIVE", "CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE", "CKA_LOCAL"}
    assert all(facts[name] is True for name in told)
    assert facts["CKA_DECRYPT"] is False
    assert facts["library description"] == "TPM2.0 Cryptoki"


# What a child of a fork is told; each line of the output is one child's.
_FORK = """
import ctypes, json, logging, os, select, signal, sys
from d1_signer import generate_key, open_signer
from d1_signer.errors import D1SignerError

uri, keep = sys.argv[1], sys.argv[2] == "open"
signer = open_signer(uri)
signer.sign(b"message")
if not keep:
    signer.close()

def in_child(fork, work):
    child = fork()
    if child == 0:
        try:
            work()
            print(json.dumps("worked"), flush=True)
        except D1SignerError as error:
            print(json.dumps(error.to_dict()), flush=True)
        sys.exit(0)  # as a worker ends
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], 15)[0]:
        print(json.dumps("hung"), flush=True)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

for fork in (os.fork, ctypes.PyDLL(None).fork):
    if keep:
        in_child(fork, lambda: signer.sign(b"message"))
        in_child(fork, lambda: signer.sign(b"message", timeout=5))
        in_child(fork, signer.custody)
    in_child(fork, lambda: open_signer(uri))
    in_child(fork, lambda: generate_key(uri.replace("object=d1", "object=another")))
    in_child(fork, signer.close)
if keep:
    before = signer._backend._module.generation
    signer.sign(b"message")
    assert signer._backend._module.generation == before  # the children cost it nothing
"""


@pytest.mark.parametrize(
    ("kept", "through"), [("open", ""), ("closed", ""), ("open", "pkcs11-spy.so")]
)
def test_child_of_a_fork_is_refused_at_once(
    store: Store, run_python: Run, kept: str, through: str
) -> None:
    uri, env = store.uri, store.env
    if through:
        path = re.findall(r"module-path=([^&]+)", uri)[0]
        uri = uri.replace(path, module(through))
        env = {**env, "PKCS11SPY": path, "PKCS11SPY_OUTPUT": "/dev/null"}
    wrong_pins = store.tpm.property("TPM2_PT_LOCKOUT_COUNTER")
    ran = run_python(_FORK, uri, kept, **env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    refused = [one for one in told if one != "worked"]
    assert len(told) == (12 if kept == "open" else 6)
    assert len(refused) == len(told) - 2, told  # closing is no use
    for error in refused:
        assert (error["code"], error["retryable"]) == ("configuration", False), error
        # A signature names the token as well; an opening has none so far.
        named = {"token": "pkcs11:token=bank"} if "token" in error["details"] else {}
        assert error["details"] == {"step": "module"} | named
        assert 'isolation="process"' in error["hint"]
    assert store.tpm.property("TPM2_PT_LOCKOUT_COUNTER") == wrong_pins


_FIRST_AFTER_THE_FORK = """
import os, sys
from d1_signer import open_signer

for _ in range(2):
    child = os.fork()
    if child == 0:
        with open_signer(sys.argv[1]) as signer:
            print(signer.sign(b"message").hex(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_first_signer_after_the_fork_works(store: Store, run_python: Run) -> None:
    ran = run_python(_FIRST_AFTER_THE_FORK, store.uri, **store.env)
    assert ran.returncode == 0, ran.stderr
    for signature in ran.stdout.split():
        store.key.verify(bytes.fromhex(signature), b"message")
    assert len(ran.stdout.split()) == 2


_BESIDE_OTHERS = """
import ctypes, os, sys
from d1_signer import open_signer
from d1_signer.errors import ConfigurationError

for library in ("libtss2-esys.so.0", "libtss2-tcti-swtpm.so.0"):
    ctypes.CDLL(library)
with open_signer(sys.argv[1]) as signer:
    child = os.fork()
    if child == 0:
        try:
            signer.sign(b"message")
            print("signed", flush=True)
        except ConfigurationError:
            print("refused", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_other_code_that_speaks_to_a_tpm_changes_nothing(
    store: Store, token: SoftHsmToken, run_python: Run
) -> None:
    for uri, told in ((token.uri, "signed\n"), (store.uri, "refused\n")):
        ran = run_python(_BESIDE_OTHERS, uri, **store.env)
        assert (ran.returncode, ran.stdout) == (0, told), ran.stderr


_OPEN = """
import json, sys
from d1_signer import open_signer
from d1_signer.errors import D1SignerError

try:
    open_signer(sys.argv[1])
except D1SignerError as error:
    print(json.dumps(error.to_dict()))
"""


@pytest.mark.parametrize(
    ("name", "value", "code", "step", "text"),
    [
        (
            "TPM2_PKCS11_TCTI",
            "device:/dev/none",
            "signer_unavailable",
            "module",
            "CKR_GENERAL_ERROR",
        ),
        (
            "DBUS_SESSION_BUS_ADDRESS",
            "unix:/",
            "signer_unavailable",
            "module",
            "CKR_GENERAL_ERROR",
        ),
        ("TPM2_PKCS11_STORE", "EMPTY", "key_not_found", "token", "No token fits"),
    ],
    ids=["no device", "no broker", "another store"],
)
def test_errors_of_the_page(
    store: Store,
    run_python: Run,
    tmp_path: Path,
    name: str,
    value: str,
    code: str,
    step: str,
    text: str,
) -> None:
    env = {**store.env, name: value.replace("EMPTY", str(tmp_path))}
    ran = run_python(_OPEN, store.uri, **env)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["code"], told["details"]["step"]) == (code, step)
    assert text in told["message"]
    assert f"| `{code}`, step `{step}`" in _PAGE


_LOSE = """
import sys
from d1_signer import open_signer
from d1_signer.errors import SignerUnavailable

with open_signer(sys.argv[1], isolation=sys.argv[2]) as signer:
    signer.sign(b"message")
    print("signed", flush=True)
    sys.stdin.readline()  # the TPM is away now
    try:
        signer.sign(b"message")
        print("signed without a TPM", flush=True)
    except SignerUnavailable as error:
        print(error.details["pkcs11"], flush=True)
    sys.stdin.readline()  # it is back
    while True:
        try:
            signer.sign(b"message")
            break
        except SignerUnavailable:
            pass  # it is not tried again at once
    print("signed again", flush=True)
"""


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_broker_that_restarts_is_met_again(store: Store, isolation: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _LOSE, store.uri, isolation],
        env={**os.environ, **store.env},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "signed\n"
            with store.tpm.without_broker():
                child.stdin.write("\n")
                child.stdin.flush()
                assert child.stdout.readline() == "CKR_GENERAL_ERROR\n"
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "signed again\n"
            assert child.wait(30) == 0
        finally:
            child.kill()


_PIN = """
import sys
from d1_signer import open_signer
from d1_signer.errors import LoginError

for _ in range(2):  # the second one is not sent
    try:
        open_signer(sys.argv[1])
        print("open")
    except LoginError as error:
        print(error.details.get("pkcs11", "not tried"))
"""


def test_wrong_pins_lock_the_tpm_as_the_page_says(store: Store, run_python: Run) -> None:
    def answers(uri: str) -> list[str]:
        ran = run_python(_PIN, uri, **store.env)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.splitlines()

    def counted() -> int:
        return store.tpm.property("TPM2_PT_LOCKOUT_COUNTER")

    assert "TPM2_PT_MAX_AUTH_FAIL" in store.run(_LOCKOUT)
    try:
        for wrong in range(1, store.tpm.property("TPM2_PT_MAX_AUTH_FAIL") + 1):
            assert answers(store.with_pin("wrong-pin")) == ["CKR_PIN_INCORRECT", "not tried"]
            assert counted() == wrong
        assert answers(store.uri)[0] == "CKR_PIN_LOCKED"
    finally:
        store.run(_LOCKOUT)
    assert answers(store.uri) == ["open", "open"]


_KEYS = """
import json, sys
from d1_signer import open_signer

for uri in sys.argv[1:]:
    with open_signer(uri) as signer:
        facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
        print(json.dumps([signer.public_key.pem(), facts["CKA_DECRYPT"]]))
"""


def test_what_the_page_says_of_tools(store: Store, run_python: Run) -> None:
    for command in ("tpm2_getrandom --hex 8", "tpm2_ptool listtokens --pid=1"):
        assert f"`{command}`" in _PAGE
        assert store.run(command)
    pin = store.folder / "pin"
    pin.write_text("another-pin")
    store.run(_NEW_PIN)
    add = "tpm2_ptool addkey --algorithm=ecc256"
    assert f"`{add}`" in _PAGE
    store.run(f"{add} --label=bank --key-label=made --userpin=another-pin")
    made = store.uri.replace("object=d1", "object=made")
    ran = run_python(_KEYS, store.uri, made, **store.env)
    assert ran.returncode == 0, ran.stderr
    (key, decrypts), (_, another_decrypts) = map(json.loads, ran.stdout.splitlines())
    assert (key, decrypts, another_decrypts) == (store.key.pem(), False, True)

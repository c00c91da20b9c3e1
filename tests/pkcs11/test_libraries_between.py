# SPDX-License-Identifier: Apache-2.0
"""Libraries that stand before the module: p11-kit's proxy over several, opensc's spy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d1_signer.es256 import PublicKey
from d1_signer.signing.opening import generate_key
from d1_signer.testing import SoftHsmToken, make_softhsm_token
from tests.pkcs11.conftest import Run
from tests.pkcs11.nss import make_nss_database
from tests.pkcs11.wire import module, proxy

_SIGN_WITH_ALL = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from d1_signer import generate_key, open_signer

uris, isolation = sys.argv[2:], sys.argv[1]
generate_key(uris[-1])
signed = []

def sign(signers):
    turns = [(at, b"%d" % turn) for turn in range(20) for at in range(len(signers))]
    with ThreadPoolExecutor(6) as pool:
        made = pool.map(lambda turn: signers[turn[0]].sign(turn[1]).hex(), turns)
        return [(at, text.decode(), one) for (at, text), one in zip(turns, made)]

with ExitStack() as stack:
    signers = [stack.enter_context(open_signer(uri, isolation=isolation)) for uri in uris]
    signed += sign(signers)
    # A thread that still ends holds a lock of OpenSSL's, which a fork at that moment would keep.
    until = time.monotonic() + 1
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(writing, "w") as told:
            json.dump(sign(signers), told)
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        signed += json.load(told)
    assert os.waitpid(child, 0)[1] == 0
    signed += sign(signers)
    models = [{f.name: f.value for f in s.custody().evidence.facts}["token model"] for s in signers]
    print(json.dumps([[s.public_key.pem() for s in signers], models, signed]))
"""


@pytest.fixture
def behind_a_proxy(
    token: SoftHsmToken, tmp_path: Path
) -> tuple[list[str], dict[str, str], tuple[str, ...]]:
    """Keys ``d1`` of two tokens of SoftHSM and of one of NSS, which has none yet.

    A module that is not installed stands in the configuration too.
    """
    (tmp_path / "another").mkdir()
    another = make_softhsm_token(tmp_path / "another", label="another")
    for made in (tmp_path / "another" / "tokens").iterdir():
        made.rename(token.configuration.parent / "tokens" / made.name)
    generate_key(another.uri)
    database = make_nss_database(tmp_path)
    modules = {
        "softhsm": f"module: {token.module_path}\n",
        "nss": f"module: {database.module_path}\nx-init-reserved: {database.init_reserved}\n",
        "gone": f"module: {tmp_path}/gone.so\n",
    }
    path, env, prefix = proxy(tmp_path, modules)
    uris = [uri.replace(token.module_path, path) for uri in (token.uri, another.uri)]
    return [*uris, database.key_uri(path)], env, prefix


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_proxy_finds_the_key_by_its_token(
    behind_a_proxy: tuple[list[str], dict[str, str], tuple[str, ...]],
    run_python: Run,
    isolation: str,
) -> None:
    uris, env, prefix = behind_a_proxy
    ran = run_python(_SIGN_WITH_ALL, isolation, *uris, prefix=prefix, **env)
    assert ran.returncode == 0, ran.stderr
    keys, models, signed = json.loads(ran.stdout)
    assert len(set(keys)) == 3
    assert models == ["SoftHSM v2", "SoftHSM v2", "NSS 3"]
    assert len(signed) == 3 * 3 * 20
    for at, text, signature in signed:
        PublicKey.from_pem(keys[at]).verify(bytes.fromhex(signature), text.encode())


_OPEN = """
import json, sys
from d1_signer import open_signer
from d1_signer.errors import D1SignerError

try:
    open_signer(sys.argv[1])
except D1SignerError as error:
    print(json.dumps(error.to_dict()))
"""


def test_proxy_asks_which_of_the_tokens_is_meant(
    behind_a_proxy: tuple[list[str], dict[str, str], tuple[str, ...]], run_python: Run
) -> None:
    uris, env, prefix = behind_a_proxy
    some = re.sub("token=[^;]*;", "", uris[0])
    ran = run_python(_OPEN, some, prefix=prefix, **env)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["code"], told["details"]["step"]) == ("ambiguous_key", "token")
    for label in ("another", "NSS Certificate DB"):
        assert label in told["message"]


_THROUGH_A_SPY = """
import json, os, sys
from d1_signer import open_signer

with open_signer(sys.argv[1], module_path=sys.argv[2]) as signer:
    made = [signer.sign(b"message").hex()]
    evidence = signer.custody().evidence
    child = os.fork()
    if child == 0:
        signer.sign(b"message")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    made.append(signer.sign(b"message").hex())
    facts = {fact.name: fact.value for fact in evidence.facts}
    print(json.dumps([signer.public_key.pem(), made, evidence.exportable, facts]))
"""


def test_spy_changes_nothing(token: SoftHsmToken, run_python: Run, tmp_path: Path) -> None:
    spy, log = module("pkcs11-spy.so"), tmp_path / "spy.log"
    told = []
    for path in (token.module_path, spy):
        ran = run_python(
            *(_THROUGH_A_SPY, token.uri, path),
            PKCS11SPY=token.module_path,
            PKCS11SPY_OUTPUT=str(log),
        )
        assert ran.returncode == 0, ran.stderr
        told.append(json.loads(ran.stdout))
    (_, _, *without), (key, signatures, *facts) = told
    for seen in (without[-1], facts[-1]):  # which file was loaded is the one difference
        assert len(seen.pop("module SHA-256")) == 64
        assert seen.pop("module path")
    assert facts == without
    for signature in signatures:
        PublicKey.from_pem(key).verify(bytes.fromhex(signature), b"message")
    assert (
        len(re.findall(r"^\d+: C_Initialize$", log.read_text(errors="replace"), re.MULTILINE)) > 0
    )

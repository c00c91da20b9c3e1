# SPDX-License-Identifier: Apache-2.0
"""A second module, which shares no code with SoftHSM: NSS's software token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import run_process
from tests.pkcs11.conftest import Run
from tests.pkcs11.nss import make_nss_database

# In a process of its own: NSS cannot be told of another folder once it is loaded.
_USE = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from d1_signer import open_signer
from d1_signer.errors import D1SignerError, LoginError
from d1_signer.signing.opening import generate_key

uri, reserved = sys.argv[1], sys.argv[2]
try:
    open_signer(uri, init_reserved=reserved, pin_source=lambda: "wrong-pin")
except LoginError as error:
    refused = error.details["step"]
made = generate_key(uri, init_reserved=reserved)
with open_signer(uri, init_reserved=reserved) as signer:
    assert signer.public_key == made.public_key
    with ThreadPoolExecutor(8) as pool:
        signatures = list(pool.map(lambda turn: signer.sign(b"%d" % turn), range(400)))
    child = os.fork()
    if child == 0:
        try:
            signer.sign(b"child")
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    evidence = signer.custody().evidence
    facts = {fact.name: fact.value for fact in evidence.facts}
print(json.dumps({
    "refused": refused, "signatures": len(set(signatures)), "child": status,
    "exportable": evidence.exportable, "in_place": evidence.generated_in_place,
    "locking": facts["locking"], "model": facts["token model"],
}))
"""


@pytest.mark.parametrize("point", ["0", "1"], ids=["point in DER", "bare point"])
def test_nss(tmp_path: Path, run_python: Run, point: str) -> None:
    database = make_nss_database(tmp_path)
    uri = database.key_uri(database.module_path)
    ran = run_python(_USE, uri, database.init_reserved, NSS_USE_DECODED_CKA_EC_POINT=point)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["refused"], told["signatures"], told["child"]) == ("login", 400, 0)
    # What NSS says of its keys is passed on, also where it looks bad.
    assert (told["exportable"], told["in_place"]) == (False, False)
    assert (told["locking"], told["model"]) == ("os", "NSS 3")


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_the_command(tmp_path: Path, isolation: str) -> None:
    database = make_nss_database(tmp_path)
    uri = database.key_uri(database.module_path)
    settings = {
        "D1_SIGNER_KEY": uri,
        "D1_SIGNER_OPTIONS": f'init_reserved="{database.init_reserved}" isolation={isolation}',
    }
    made = run_process("generate-key", "--json", **settings)
    assert made.status == 0, made.out
    public = run_process("public-key", "--json", **settings)
    assert public.document["public_key"] == made.document["public_key"]
    assert run_process("custody", **settings).status == 0
    checked = run_process("check", "--json", **settings)
    assert checked.status == 0, checked.out
    untold = run_process("check", "--json", "--key", uri)
    assert untold.document["stopped_at"]["step"] in {"module", "token"}

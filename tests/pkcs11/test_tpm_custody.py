# SPDX-License-Identifier: Apache-2.0
"""A TPM's statement about a key behind PKCS#11, as docs/custody/tpm.md prints it: end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pkcs11.test_tpm import _SET_UP, ROOT, Store, _run
from tests.pkcs11.tpm import running_tpm

_PAGE = (ROOT / "docs" / "custody" / "tpm.md").read_text()
_AK, _KEY, _CHALLENGED, _VERIFY, _CERTIFIED = re.findall(
    r"^```sh\n(.*?)^```$", _PAGE, re.DOTALL | re.MULTILINE
)
_CHALLENGE = "auditor, 2026-11-27, ü"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("tpm")
    with running_tpm(folder) as tpm:
        printed = _run(tpm, folder, _SET_UP + 'echo "$D1_SIGNER_KEY"\n', {})
        uri = printed.splitlines()[-1]
        env = {
            **tpm.env,
            "TPM2_PKCS11_STORE": str(folder / "tpm2"),
            "D1_SIGNER_KEY": uri,
            "KEY": uri.replace("object=d1", "object=d1-attested"),
            "CHALLENGE": _CHALLENGE,
            "PYTHONPATH": str(ROOT),
        }
        made = Store(tpm=tpm, folder=folder, printed=printed, env=env, uri=uri)
        made.run(_AK)
        yield made


def command(store: Store, *arguments: str) -> tuple[int, dict[str, Any]]:
    """What a command answers, as JSON."""
    ran = subprocess.run(
        [sys.executable, "-m", "d1_signer.cli", *arguments, "--json"],
        cwd=store.folder,
        env={**os.environ, **store.env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.returncode, json.loads(ran.stdout)


def attested(store: Store, *files: str) -> list[str]:
    """Options that name a statement."""
    told = ",".join(files)
    return [
        *("--option", f"attestation=tpm2:{told}"),
        *("--option", f"attestation_anchors={store.folder}/anchors.txt"),
    ]


def test_from_the_tpm_to_the_auditor(store: Store) -> None:
    store.run(f"cd /etc/d1\n{_KEY}{_CHALLENGED}")
    assert "holds" in store.run(f"cd /etc/d1\n{_VERIFY}")
    bundle, anchors = str(store.folder / "bundle.json"), str(store.folder / "anchors.txt")
    verify = ("custody", "verify", bundle, "--anchors", anchors)
    status, document = command(store, *verify, "--challenge", _CHALLENGE)
    assert status == 0, document
    (key,) = document["keys"]
    assert key["statements_carry_challenge"] == [True]
    answers = {name: (told["answer"], told["by"][:8]) for name, told in key["answers"].items()}
    assert answers == {
        "exportable": (False, "attested"),
        "never_exportable": (True, "attested"),
        "generated_in_place": (True, "attested"),
        "hardware": (True, "attested"),
        "fips_mode": (None, ""),
    }
    # Nobody who trusts the published keys alone is told that anything is attested.
    status, document = command(store, "custody", "verify", bundle)
    assert status == 1
    assert "neither trusted nor certified" in document["findings"][0]
    status, document = command(store, *verify, "--challenge", "another")
    assert (status, document["holds"]) == (1, False)


def test_an_older_statement_says_that_it_does_not_carry_the_challenge(store: Store) -> None:
    files = ("attest", "signature", "key.pub", "ak.pub", "key.creation")
    paths = [str(store.folder / name) for name in files]
    if not Path(paths[0]).exists():
        store.run(f"cd /etc/d1\n{_KEY}{_CHALLENGED}")
    bundle = store.folder / "later.json"
    arguments = ("--bundle", str(bundle), "--challenge", "later")
    key = ("--key", store.env["KEY"])
    status, told = command(store, "custody", *key, *arguments, *attested(store, *paths))
    assert status == 0, told
    anchors = ("--anchors", str(store.folder / "anchors.txt"))
    status, document = command(
        store, "custody", "verify", str(bundle), "--challenge", "later", *anchors
    )
    assert status == 0
    assert document["keys"][0]["statements_carry_challenge"] == [False]
    assert document["keys"][0]["answers"]["never_exportable"]["by"].startswith("attested")


def test_a_key_that_was_there_already(store: Store) -> None:
    store.run(f"cd /etc/d1\n{_CERTIFIED}")
    files = [str(store.folder / name) for name in ("d1.attest", "d1.signature", "d1.pub", "ak.pub")]
    status, document = command(
        store,
        "custody",
        "--require",
        "hardware,never-exportable,attested",
        *attested(store, *files),
    )
    assert status == 0, document
    # Without it, the same key is only claimed to be.
    status, document = command(store, "custody", "--require", "hardware,attested")
    assert (status, document["keys"][0]["attested"]) == (1, [])
    # And it is no statement about another key.
    store.run("d1-signer generate-key --key ${D1_SIGNER_KEY/object=d1/object=other}")
    other = store.uri.replace("object=d1", "object=other")
    status, document = command(store, "custody", "--key", other, *attested(store, *files))
    assert (status, document["code"]) == (1, "attestation")

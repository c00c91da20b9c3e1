# SPDX-License-Identifier: Apache-2.0
"""What `d1_signer` offers: to a program, to a type checker, and at what cost of import."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import d1_signer

PACKAGE = Path(d1_signer.__file__).parent
OPTIONAL = [
    *("aiohttp", "asyncio", "boto3", "botocore", "click", "google", "google_crc32c", "grpc"),
    *("httpx", "hvac", "joserfc", "opentelemetry", "pkcs11", "redis", "valkey"),
]


def run(code: str, *arguments: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen_by_a_type_checker() -> dict[str, str]:
    """Names under ``if TYPE_CHECKING`` with the module that each comes from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING":
            continue
        for statement in node.body:
            assert isinstance(statement, ast.ImportFrom)
            for alias in statement.names:
                # `import X as X` is what a type checker takes for a re-export (PEP 484).
                assert alias.asname == alias.name
                assert alias.name not in names
                names[alias.name] = statement.module or ""
    return names


# Named by the package, and left out of __all__: `import *` must work without any extra.
NEEDS_AN_EXTRA = {"HttpxD1Auth", "RedisTokenStore"}


def test_all_is_what_a_type_checker_sees() -> None:
    names = set(seen_by_a_type_checker()) - NEEDS_AN_EXTRA
    assert len(d1_signer.__all__) == len(set(d1_signer.__all__))
    assert set(d1_signer.__all__) == names


@pytest.mark.parametrize("name", d1_signer.__all__)
def test_each_name_resolves_to_the_object_of_its_home(name: str) -> None:
    home = importlib.import_module(seen_by_a_type_checker()[name])
    expected = importlib.import_module("d1_signer.es256") if name == "es256" else vars(home)[name]
    assert getattr(d1_signer, name) is expected


def test_dir_and_star_import() -> None:
    assert dir(d1_signer) == sorted({*d1_signer.__all__, *NEEDS_AN_EXTRA})
    out = run("from d1_signer import *; print(*sorted(n for n in globals() if n[0] != '_'))")
    assert out.split() == sorted(d1_signer.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        d1_signer.nothing  # noqa: B018
    assert not hasattr(d1_signer, "__wrapped__")


def test_importing_loads_no_optional_library() -> None:
    # The second step resolves every name, which is more than any program does.
    code = (
        "import sys, d1_signer\n"
        "first = set(sys.modules)\n"
        "[getattr(d1_signer, name) for name in d1_signer.__all__]\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*(first & {'requests', 'cryptography', 'asn1crypto', 'ssl'}))\n"
        "print(*(loaded & set(sys.argv[1:])))"
    )
    assert run(code, *OPTIONAL).split() == []


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


USER = """
from typing import assert_type

import requests

from d1_signer import (
    AccessToken,
    Assurance,
    Backend,
    ClientCertificate,
    CustodyPolicy,
    CustodyReport,
    D1Auth,
    D1SignerError,
    Environment,
    Evidence,
    LazySigner,
    PublicKey,
    SignatureEncoding,
    SignEvent,
    Signer,
    SignerSet,
    TokenFetcher,
    es256,
    open_signer,
)


class MyBackend:
    name = "mine"
    encoding = SignatureEncoding.RAW

    def public_key(self) -> PublicKey:
        return PublicKey.from_point(b"")

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        return digest

    def custody(self) -> Evidence:
        return Evidence(
            location="x", exportable=None, generated_in_place=None, hardware=None, facts=()
        )

    def close(self) -> None: ...


backend: Backend = MyBackend()


def main(key: PublicKey) -> None:
    with open_signer("file:///k.pem", passphrase_source=lambda: "x", kid="k") as signer:
        assert_type(signer, Signer)
        assert_type(signer.sign(b"m", timeout=1.0), bytes)
        assert_type(signer.custody(), CustodyReport)
        assert_type(signer.custody().evidence.facts[0].assurance, Assurance)
        assert_type(es256.raw_from_der(b""), bytes)
        lazy = LazySigner(lambda: open_signer("x:"), kid="k", public_key=key)
        signers = SignerSet([signer, Signer(MyBackend()), lazy])
        assert_type(signers.attempt(lambda one: one.kid), str)
        fetcher = TokenFetcher(
            signers,
            issuer_id="i",
            environment=Environment.STAGING,
            client_certificate=ClientCertificate("c", "k"),
        )
        try:
            assert_type(fetcher.token(), AccessToken)
        except D1SignerError as error:
            assert_type((error.code, error.retryable, error.hint), tuple[str, bool, str])
        assert_type(fetcher.session(), requests.Session)
        requests.get("x", auth=D1Auth(fetcher), timeout=1)
    CustodyPolicy(hardware=True).check(backend.custody())
"""
WRONG = """
from d1_signer import CustodyPolicy, PublicKey, Signer, open_signer

CustodyPolicy(True)
open_signer(7)
Signer(object())
open_signer("x:").sign("text")
open_signer("x:").kid = "k"
PublicKey.from_jwk([])
"""


def test_users_code_type_checks(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "good.py", "wrong.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
        cwd=tmp_path,
        env={"PATH": "", "MYPYPATH": str(PACKAGE.parent), "HOME": str(tmp_path)},
    )
    found = [line.split(":")[:2] for line in done.stdout.splitlines() if " error: " in line]
    assert [line for line in found if line[0] != "wrong.py"] == [], done.stdout
    assert {int(line[1]) for line in found} == set(range(4, 10)), done.stdout


def test_a_sample_of_wrong_code_is_what_it_says() -> None:
    assert len(WRONG.strip().splitlines()) == 8


def test_version_is_that_of_the_distribution() -> None:
    assert d1_signer.__version__ == importlib.metadata.version("d1-signer")
    assert run("import sys, d1_signer; print('importlib.metadata' in sys.modules)") == "False\n"

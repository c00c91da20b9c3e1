# SPDX-License-Identifier: Apache-2.0
"""Snippets in Python that no other test takes from their page, run as printed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import d1_signer
from d1_signer import (
    ClientCertificate,
    HttpxD1Auth,
    RedisTokenStore,
    TokenFetcher,
    generate_key,
    open_signer,
    otel,
    sandbox as sandboxes,
)
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken
from tests.docs.reading import ROOT, Snippet, snippets
from tests.servers.redis_server import RedisServer

# The beginning of a snippet's key; what its page says that the reader has, beside the names of
# the package.
RUN: dict[str, tuple[str, ...]] = {
    "docs/audit/README.md: from d1_signer import AuditTrail": (),
    "d1_signer/audit/trail.py: hsm = ": (),
    "docs/backends.md: from cryptography": ("signer",),
    "docs/observability.md: from d1_signer": (),
    "d1_signer/__init__.py: from d1_signer": (),
    "d1_signer/otel.py: observer = ": ("uri", "settings"),
    "d1_signer/sandbox/__init__.py: with Sandbox": ("signer", "Sandbox", "Fault"),
    "d1_signer/signing/opening.py: from d1_signer": (),
    "d1_signer/signing/opening.py: open_signer(hsm": ("hsm", "vault"),
    "d1_signer/backends/pkcs11/__init__.py: open_signer(": (),
    "d1_signer/token/auth.py: session.get": ("session", "fetcher"),
    "d1_signer/token/fetcher.py: fetcher = ": ("signer",),
    "d1_signer/token/httpx_auth.py: with httpx": ("fetcher", "httpx"),
    "d1_signer/token/redis_store.py: store = ": ("signer", "redis", "url", "key", "settings"),
    "docs/backends.md: # test_my_backend.py": ("pytest",),
    "docs/backends.md: # conftest.py": ("pytest",),
    "docs/backends.md: # test_with_an_hsm.py": ("pytest",),
    "d1_signer/testing/__init__.py: # conftest.py": ("pytest",),
    "d1_signer/testing/conformance.py: class TestMyBackend": ("pytest",),
}
ALL = {first: next(each for each in snippets() if each.key.startswith(first)) for first in RUN}
CHOSEN = "not TestMyBackend or test_digest_is_signed"
PLAIN = [first for first, given in RUN.items() if given != ("pytest",)]
SUITES = [first for first, given in RUN.items() if given == ("pytest",)]


class Stand:
    """A token with keys, a sandbox that knows them, and what readers have beside."""

    def __init__(self, token: SoftHsmToken, d1: Sandbox, stack: ExitStack, folder: Path) -> None:
        self.d1 = d1
        self.folder = folder
        self._token = token
        self._stack = stack
        for name in ("d1", "audit"):
            generate_key(self.uri(name))
        self.signer = stack.enter_context(open_signer(self.uri("d1"), kid="bank-2026"))
        d1.register_key("bank-2026", self.signer.public_key.jwk())
        d1.register_key(self.signer.public_key.thumbprint(), self.signer.public_key.jwk())

    def uri(self, name: str) -> str:
        return re.sub("object=[^?]*", f"object={name}", self._token.uri)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "issuer_id": "my-issuer",
            "environment": self.d1.base_url,
            "client_certificate": ClientCertificate(self.d1.client_certificate, self.d1.client_key),
            "ca_file": self.d1.ca_file,
        }

    def given(self, name: str) -> Any:
        if name == "fetcher":
            return self._stack.enter_context(TokenFetcher(self.signer, **self.settings))
        if name == "session":
            return self._stack.enter_context(self.given("fetcher").session())
        if name == "url":
            folder = self.folder / "redis"
            folder.mkdir()
            return self._stack.enter_context(RedisServer(folder)).url
        return {
            "signer": self.signer,
            "uri": self.uri("d1"),
            "hsm": self.uri("d1").partition("&pin-source")[0],
            "vault": Keeper(self._token.pin),
            "settings": self.settings,
            "key": bytes(32),
            "Sandbox": Sandbox,
            "Fault": sandboxes.Fault,
            "httpx": httpx,
            "redis": redis,
        }[name]

    def placed(self, text: str) -> str:
        """The snippet with what is on this machine in place of what is on the reader's."""
        module, pin = self.uri("d1").partition("?module-path=")[2].split("&pin-source=file:")
        text = text.replace("/usr/lib/softhsm/libsofthsm2.so", module)
        text = text.replace("/etc/d1/pin", pin).replace("token=bank", f"token={self._token.label}")
        text = text.replace("/var/lib/d1/audit", str(self.folder / "audit"))
        text = text.replace("/etc/d1/client.pem", str(self.d1.client_certificate))
        text = text.replace("/etc/d1/client.key", str(self.d1.client_key))
        here = f"environment={self.d1.base_url!r}, ca_file={str(self.d1.ca_file)!r},"
        return text.replace("environment=Environment.STAGING,", here)


class Keeper:
    """Somebody's own store of secrets."""

    def __init__(self, pin: Any) -> None:
        self._pin = pin

    def read(self, name: str) -> Any:
        assert name == "d1-pin"
        return self._pin


@pytest.fixture
def stand(softhsm_token: SoftHsmToken, tmp_path: Path) -> Iterator[Stand]:
    with ExitStack() as stack:
        d1 = stack.enter_context(Sandbox("my-issuer"))
        yield Stand(softhsm_token, d1, stack, tmp_path)


@pytest.mark.parametrize("first", PLAIN)
def test_it_runs(stand: Stand, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    public = {name: getattr(d1_signer, name) for name in d1_signer.__all__}
    # Not in __all__, for they need extras.
    names = public | {
        "OpenTelemetryObserver": otel.OpenTelemetryObserver,
        "HttpxD1Auth": HttpxD1Auth,
        "RedisTokenStore": RedisTokenStore,
    }
    names |= {name: stand.given(name) for name in RUN[first]}
    before = dict(names)
    code = stand.placed(ALL[first].text)
    try:
        exec(kept(code), names)  # noqa: S102 (the page's own)
        for fetcher in (each for each in names.values() if isinstance(each, TokenFetcher)):
            assert fetcher.status().token == "fresh" or fetcher.token().value
    finally:
        for name, value in reversed(names.items()):
            if before.get(name) is not value and hasattr(value, "close"):
                value.close()
    assert "Traceback" not in capsys.readouterr().err


def kept(code: str) -> Any:
    """The code; what its last line gives and does not keep is kept, so that it can be closed."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if isinstance(last, ast.Expr):
        target = ast.Name(id="last", ctx=ast.Store())
        tree.body[-1] = ast.Assign(targets=[target], value=last.value)
    return compile(ast.fix_missing_locations(tree), "snippet", "exec")


def files(snippet: Snippet) -> dict[str, str]:
    """The files that a snippet names in comments, or one."""
    parts = re.split(r"^# (\w+\.py).*$\n", snippet.text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) or {"test_it.py": snippet.text}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", SUITES)
def test_a_suite_of_the_readers_runs(first: str, tmp_path: Path) -> None:
    key = generate_key((tmp_path / "key.pem").as_uri()).uri
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text('pytest_plugins = ["d1_signer.testing"]\n')
    imports = (
        "import pytest\nfrom d1_signer import generate_key, open_signer\n"
        "from d1_signer.testing import SignerConformance\n"
    )
    for name, text in files(ALL[first]).items():
        head = "" if name == "conftest.py" else imports
        (suite / name).write_text(head + text.replace("mykms:///alias/d1", key))
    if "conftest" in first and not list(suite.glob("test_*")):
        (suite / "test_it.py").write_text("def test_it(softhsm_token):\n    assert True\n")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"),
            # The same class stands in docs/backends.md, whose run is the whole suite.
            *(["-k", CHOSEN] if first.startswith("d1_signer/") else []),
        ],
        cwd=suite,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^\d+ passed", ran.stdout, re.MULTILINE)

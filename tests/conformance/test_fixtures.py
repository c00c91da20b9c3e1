# SPDX-License-Identifier: Apache-2.0
"""What `d1_signer.testing` gives to a user's own suite, run as such a suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from d1_signer import Signer
from d1_signer.testing import (
    SignerConformance,
    SoftHsmToken,
    make_in_memory_signer,
    make_softhsm_token,
)

pytest_plugins = ["d1_signer.testing", "pytester"]


def test_softhsm_token_is_seen_by_the_module(softhsm_token: SoftHsmToken) -> None:
    # In another process: this one may have the module loaded under another configuration.
    code = (
        "import sys, pkcs11\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])\n"
        "with token.open(user_pin=open(sys.argv[3]).read()): print('in')"
    )
    arguments = [softhsm_token.module_path, softhsm_token.label, str(softhsm_token.pin_file)]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert ran.stdout == "in\n", ran.stderr


def test_softhsm_token_shows_no_pin(tmp_path: Path) -> None:
    token = make_softhsm_token(tmp_path, label="named")
    assert token.label == "named"
    assert token.pin not in repr(token)
    assert token.so_pin not in repr(token)
    assert token.pin not in token.uri
    assert token.pin_file.read_text() == token.pin
    assert token.pin_file.stat().st_mode & 0o777 == 0o600


def test_missing_softhsm_fails_with_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        pytest_plugins = ["d1_signer.testing"]
        def test_with_a_token(softhsm_token): pass
        """
    )
    monkeypatch.setenv("PATH", str(pytester.path))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*apt-get install softhsm2*"])


def test_suite_runs_on_a_users_backend_and_finds_its_faults(pytester: pytest.Pytester) -> None:
    # A backend that signs another digest, leaks its password, and lives on after close().
    pytester.makepyfile(
        """
        import pytest
        from cryptography.hazmat.primitives.asymmetric import ec, utils
        from cryptography.hazmat.primitives.hashes import SHA256
        from d1_signer.custody.evidence import Evidence
        from d1_signer.es256 import PublicKey
        from d1_signer.signing.signer import Signer
        from d1_signer.testing import SignerConformance

        class Faulty:
            name = encoding = "der"
            def __init__(self):
                self._key = ec.generate_private_key(ec.SECP256R1())
                self.password = "hunter2"
            def public_key(self):
                return PublicKey(self._key.public_key())
            def sign_digest(self, digest, deadline):
                return self._key.sign(digest[::-1], ec.ECDSA(utils.Prehashed(SHA256())))
            def custody(self):
                return Evidence(location="here", exportable=None, generated_in_place=None,
                                hardware=None, facts=())
            def close(self):
                pass

        class TestFaulty(SignerConformance):
            @pytest.fixture
            def secrets(self):
                return ("hunter2",)
            @pytest.fixture
            def signer(self):
                return Signer(Faulty(), verify=False)

        class TestForgotten(SignerConformance):
            pass
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "not Forgotten")
    failed = {
        line.split()[1].partition("::TestFaulty::")[2]
        for line in result.outlines
        if line.startswith("FAILED")
    }
    assert {
        "test_digest_is_signed_as_it_is",
        "test_message_of_any_length_is_signed[0]",
        "test_threads_share_one_signer",
        "test_forked_child_and_parent_both_sign",
        "test_fork_while_threads_sign",
        "test_closed_signer_refuses",
        "test_custody_rests_on_facts",
        "test_repr_and_log_show_no_secret",
    } <= failed
    assert "test_public_key_is_pinned" not in failed
    forgotten = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "Forgotten")
    forgotten.stdout.fnmatch_lines(["*Give your class a fixture named signer*"])
    assert forgotten.parseoutcomes().get("passed", 0) == 0


_SLOW_BACKEND = """
import time

import pytest

from d1_signer import Signer
from d1_signer.errors import SignerTimeout
from d1_signer.testing import SignerConformance
from d1_signer.testing.in_memory import _InMemoryBackend

pytest_plugins = ["d1_signer.testing"]


class Slow(_InMemoryBackend):
    def sign_digest(self, digest, deadline):
        time.sleep(0.7)
        return super().sign_digest(digest, deadline)


class InTime(_InMemoryBackend):
    def sign_digest(self, digest, deadline):
        if deadline is not None and time.monotonic() + 0.7 > deadline:
            raise SignerTimeout("Not in time.")
        return super().sign_digest(digest, deadline)


class TestSlow(SignerConformance):
    @pytest.fixture
    def signer(self):
        return Signer(Slow())


class TestInTime(SignerConformance):
    @pytest.fixture
    def signer(self):
        return Signer(InTime())
"""


def test_the_suite_fails_a_backend_that_ignores_its_deadline(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(_SLOW_BACKEND)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "test_deadline_is_kept")
    result.assert_outcomes(failed=2, passed=2)
    result.stdout.fnmatch_lines(["FAILED *::TestSlow::test_deadline_is_kept*"] * 2)


def test_a_service_is_tested_with_the_sandbox(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        pytest_plugins = ["d1_signer.testing"]

        def test_a_call(d1_fetcher, d1_sandbox, in_memory_signer):
            d1_sandbox.misbehave("status-503", times=1)
            with d1_fetcher.session() as session:
                assert session.get(d1_sandbox.banking_url + "/ping").ok
            assert d1_sandbox.counters.token_requests == 2
            assert in_memory_signer.kid == "test-key"

        def test_another(d1_fetcher, d1_sandbox):
            d1_fetcher.token()
            assert d1_sandbox.counters.token_requests == 1
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)


def test_without_pytest_the_extra_is_named() -> None:
    code = "import sys; sys.modules['pytest'] = None; import d1_signer.testing"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert 'pip install "d1-signer[test]"' in ran.stderr


class TestInMemory(SignerConformance):
    @pytest.fixture
    def signer(self) -> Signer:
        return make_in_memory_signer()

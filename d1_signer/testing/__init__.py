# SPDX-License-Identifier: Apache-2.0
"""What users need to test with d1_signer in their own pytest suite; needs ``d1-signer[test]``.

A conformance suite for a backend, a SoftHSM token that is thrown away after the test, a signer with
a key in memory, and a sandbox of D1 that knows that key::

    # conftest.py of your suite
    pytest_plugins = ["d1_signer.testing"]

    # test_my_backend.py
    class TestMyBackend(SignerConformance):
        @pytest.fixture
        def signer(self):
            return open_signer("mykms:///alias/d1")

    # test_with_an_hsm.py
    def test_signing(softhsm_token):
        generate_key(softhsm_token.uri)
        with open_signer(softhsm_token.uri) as signer:
            assert len(signer.sign(b"message")) == 64

    # test_my_service.py
    def test_a_call(d1_fetcher, d1_sandbox):     # in_memory_signer signs
        d1_sandbox.misbehave("status-503", times=1)
        with d1_fetcher.session() as session:
            assert session.get(d1_sandbox.banking_url + "/ping").ok

The plug-in may be named in any test module or ``conftest.py``, also after an import of this module,
which holds no assert itself: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from d1_signer.errors import MissingExtraError

try:
    import pytest
except ModuleNotFoundError:
    raise MissingExtraError.of("pytest", "test") from None

# Before the import: pytest rewrites the asserts of a module only while it is being imported.
pytest.register_assert_rewrite("d1_signer.testing.conformance")

from d1_signer.sandbox.softhsm import SoftHsmToken  # noqa: E402
from d1_signer.testing.conformance import SignerConformance  # noqa: E402
from d1_signer.testing.in_memory import (  # noqa: E402
    d1_fetcher,
    d1_sandbox,
    in_memory_signer,
    make_in_memory_signer,
)
from d1_signer.testing.softhsm import make_softhsm_token, softhsm_token  # noqa: E402

__all__ = [
    "SignerConformance",
    "SoftHsmToken",
    "d1_fetcher",
    "d1_sandbox",
    "in_memory_signer",
    "make_in_memory_signer",
    "make_softhsm_token",
    "softhsm_token",
]

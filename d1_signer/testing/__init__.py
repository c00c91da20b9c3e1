# SPDX-License-Identifier: Apache-2.0
"""What users need to test with d1_signer in their own pytest suite; imports pytest.

A conformance suite for a backend, and a SoftHSM token that is thrown away after the test::

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

The plug-in may be named in any test module or ``conftest.py``, also after an import of this module,
which holds no assert itself: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import pytest

# Before the import: pytest rewrites the asserts of a module only while it is being imported.
pytest.register_assert_rewrite("d1_signer.testing.conformance")

from d1_signer.testing.conformance import SignerConformance  # noqa: E402
from d1_signer.testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_token  # noqa: E402

__all__ = ["SignerConformance", "SoftHsmToken", "make_softhsm_token", "softhsm_token"]

# SPDX-License-Identifier: Apache-2.0
"""The private side of python-pkcs11 that is relied on: a release that changes it fails here."""

from __future__ import annotations

import ctypes

import pytest
from pkcs11 import _pkcs11

from d1_signer.backends.pkcs11.module import cryptoki
from d1_signer.signing.signer import open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Shim


def test_function_list_is_found_in_the_bindings_object(token: SoftHsmToken) -> None:
    binding = _pkcs11.lib.__new__(_pkcs11.lib, token.module_path)  # type: ignore[call-arg]
    assert not binding.initialized
    library = ctypes.CDLL(token.module_path)
    address = ctypes.c_void_p()
    assert library.C_GetFunctionList(ctypes.byref(address)) == 0
    assert cryptoki._list_of(binding) == address.value


def test_list_from_the_module_where_the_bindings_is_not_found(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cryptoki, "_list_of", lambda _: None)
    with open_signer(token.uri, module_path=shim.path) as signer:
        signer.public_key.verify(signer.sign(b"message"), b"message")

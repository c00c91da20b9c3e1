# SPDX-License-Identifier: Apache-2.0
"""The private side of python-pkcs11 that is relied on: a release that changes it fails here."""

from __future__ import annotations

import ctypes

import pkcs11
import pytest
from pkcs11 import _pkcs11

from d1_signer.backends.pkcs11.module import cryptoki, lending
from d1_signer.signing.opening import open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim


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


def test_arguments_of_initialize_stay_as_they_were(token: SoftHsmToken, shim: Shim) -> None:
    for _ in range(2):
        with open_signer(token.uri, module_path=shim.path) as signer:
            junk = [b"\xff" * size for size in range(1, 300) for _ in range(20)]
            for _ in range(20):
                signer.sign(b"message")
            del junk
            shim.fail(Call.SIGN, 0x30, times=1)
            signer.sign(b"message")
    assert shim.initialized_with_os_locking == 4
    assert shim.arguments_changed == 0


def test_place_for_other_code_is_where_the_binding_looks(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path):
        made = pkcs11._loaded[shim.path]
        assert isinstance(made, lending.Lent)
        assert isinstance(made, _pkcs11.lib)
    assert shim.path not in pkcs11._loaded


def test_binding_without_a_registry(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pkcs11, "_loaded")
    with open_signer(token.uri, module_path=shim.path) as signer:
        signer.sign(b"message")

# SPDX-License-Identifier: Apache-2.0
"""Other code in the process that uses python-pkcs11 on the same module, before or after us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pkcs11
import pytest
from pkcs11 import Mechanism, ObjectClass, exceptions as sdk

from d1_signer.errors import SignerUnavailable
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

_DEVICE_ERROR = 0x30


@pytest.fixture
def uri(token: SoftHsmToken, shim: Shim) -> Iterator[str]:
    """A token with a second key, which the other code uses."""
    generate_key(token.key_uri("other"), module_path=shim.path)
    yield token.uri
    loaded: Any = pkcs11._loaded
    if shim.path in loaded:
        loaded[shim.path].finalize()


class Other:
    """Other code: a session and a key of its own."""

    def __init__(self, shim: Shim, token: SoftHsmToken, user_pin: str | None = None) -> None:
        self.library = pkcs11.lib(shim.path)
        self._session = self.library.get_token(token_label=token.label).open(user_pin=user_pin)
        self._key: Any = self._session.get_key(ObjectClass.PRIVATE_KEY, label="other")
        self._public: Any = self._session.get_key(ObjectClass.PUBLIC_KEY, label="other")

    def works(self) -> None:
        """Its handle stands for its own key."""
        signature = self._key.sign(bytes(32), mechanism=Mechanism.ECDSA)
        assert self._public.verify(bytes(32), signature, mechanism=Mechanism.ECDSA)


def _signs(signer: Signer) -> None:
    signer.public_key.verify(signer.sign(b"message"), b"message")


def test_other_code_after_us(uri: str, token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(uri, module_path=shim.path) as signer:
        other = Other(shim, token)
        assert other.library.manufacturer_id == "SoftHSM"
        assert pkcs11.lib(shim.path) is other.library
        other.works()
        _signs(signer)
    finalized = shim.calls(Call.FINALIZE)
    other.works()  # it outlives the signer
    with open_signer(uri, module_path=shim.path) as signer:
        _signs(signer)
        other.works()
    assert shim.calls(Call.FINALIZE) == finalized
    other.library.finalize()
    assert shim.calls(Call.FINALIZE) == finalized + 1


def test_other_code_before_us(uri: str, token: SoftHsmToken, shim: Shim) -> None:
    other = Other(shim, token, user_pin=token.pin)
    with open_signer(uri, module_path=shim.path) as signer:
        _signs(signer)
        other.works()
        assert pkcs11.lib(shim.path) is other.library
    other.works()


def test_other_code_that_has_finalised_what_it_began(
    uri: str, token: SoftHsmToken, shim: Shim
) -> None:
    Other(shim, token, user_pin=token.pin).library.finalize()
    with open_signer(uri, module_path=shim.path) as signer:
        other = Other(shim, token)
        other.works()
        _signs(signer)


def test_other_code_after_we_have_closed(uri: str, token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(uri, module_path=shim.path) as signer:
        _signs(signer)
    Other(shim, token, user_pin=token.pin).works()


@pytest.mark.parametrize("first", ["we", "other"])
def test_handles_of_other_code_never_stand_for_other_keys(
    uri: str, token: SoftHsmToken, shim: Shim, first: str
) -> None:
    before = Other(shim, token, user_pin=token.pin) if first == "other" else None
    with open_signer(uri, module_path=shim.path) as signer:
        other = before or Other(shim, token)
        finalized = shim.calls(Call.FINALIZE)
        shim.fail(Call.SIGN, _DEVICE_ERROR, times=1)
        _signs(signer)  # a new session sufficed
        shim.fail(Call.SIGN, _DEVICE_ERROR)
        with pytest.raises(SignerUnavailable) as raised:
            signer.sign(b"message")
        assert "other code" in raised.value.message
        assert "isolation" in raised.value.hint
        assert raised.value.details["needs"] == "process"
        assert raised.value.details["pkcs11"] == "CKR_DEVICE_ERROR"
        shim.heal()
        assert shim.calls(Call.FINALIZE) == finalized
        other.works()


def test_module_that_is_given_back_is_initialised_anew_again(
    uri: str, token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(uri, module_path=shim.path) as signer:
        other = Other(shim, token)
        other.works()
        finalized = shim.calls(Call.FINALIZE)
        other.library.finalize()
        assert shim.calls(Call.FINALIZE) == finalized, "it is in use"
        shim.fail(Call.SIGN, _DEVICE_ERROR, times=1)
        _signs(signer)
        assert shim.calls(Call.FINALIZE) == finalized + 1


def test_module_with_one_lock_is_not_shared(uri: str, shim: Shim) -> None:
    with open_signer(uri, module_path=shim.path, locking="lock") as signer:
        with pytest.raises(sdk.PKCS11Error, match="isolation"):
            pkcs11.lib(shim.path)
        _signs(signer)


def test_child_of_a_fork_leaves_handles_of_other_code_alone(
    uri: str, token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(uri, module_path=shim.path) as signer:
        other = Other(shim, token)
        if (child := os.fork()) == 0:
            status = 1
            try:
                _signs(signer)
                other.works()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        other.works()
        _signs(signer)

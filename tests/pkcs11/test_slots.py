# SPDX-License-Identifier: Apache-2.0
"""Slots that do not tell about themselves, and lists of them that change."""

from __future__ import annotations

import logging

import pytest
from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.module import owners
from d1_signer.backends.pkcs11.module.token import read_slots
from d1_signer.errors import KeyNotFoundError, LoginError, SignerUnavailable
from d1_signer.signing.opening import open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

_ANSWERS = [0x05, 0x06, 0x30, 0x32, 0xE0, 0xE1, 0x80000005]


def _other_slot(shim: Shim) -> int:
    """SoftHSM has one more slot, whose token is not initialised."""
    module = owners.acquire(shim.path, locking="auto", reserved=None)
    try:
        seen = read_slots(module.cryptoki)
    finally:
        module.release()
    assert (len(seen.tokens), seen.failures) == (2, {})
    return next(token.slot_id for token in seen.tokens if not token.initialized)


@pytest.mark.parametrize("call", [Call.GET_SLOT_INFO, Call.GET_TOKEN_INFO], ids=str)
@pytest.mark.parametrize("answer", _ANSWERS, ids=hex)
def test_slot_that_does_not_tell_is_passed_over_and_named(
    token: SoftHsmToken,
    shim: Shim,
    call: Call,
    answer: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="d1_signer")
    slot = _other_slot(shim)
    shim.only_slot(slot)
    shim.fail(call, answer)
    with open_signer(token.uri, module_path=shim.path) as signer:
        signer.public_key.verify(signer.sign(b"message"), b"message")
        shim.fail(Call.SIGN, 0x30, times=1)
        signer.public_key.verify(signer.sign(b"after a recovery"), b"after a recovery")
    assert f"pkcs11.slot_passed_over slot={slot} answer=" in caplog.text
    with pytest.raises(KeyNotFoundError) as raised:
        open_signer("pkcs11:token=none;object=d1", module_path=shim.path)
    assert f"{slot} (" in raised.value.message
    assert str(raised.value.details["silent_slots"]).startswith(f"{slot} (")
    assert raised.value.retryable


@pytest.mark.usefixtures("token")
def test_silent_slot_that_is_not_the_one_asked_for_gives_no_hope(shim: Shim) -> None:
    slot = _other_slot(shim)
    shim.only_slot(slot)
    shim.fail(Call.GET_TOKEN_INFO, 0x30)
    for asked, hope in ((slot + 1, False), (slot, True)):
        with pytest.raises(KeyNotFoundError) as raised:
            open_signer(f"pkcs11:slot-id={asked};object=d1", module_path=shim.path)
        assert raised.value.retryable is hope


def test_only_slot_that_does_not_tell(token: SoftHsmToken, shim: Shim) -> None:
    shim.fail(Call.GET_SLOT_INFO, 0x30)
    with pytest.raises(SignerUnavailable) as raised:
        open_signer(token.uri, module_path=shim.path)
    assert raised.value.details["step"] == "token"
    assert raised.value.details["pkcs11"] == "CKR_DEVICE_ERROR"
    shim.heal()
    with open_signer(token.uri, module_path=shim.path) as signer:
        signer.sign(b"message")


def test_list_that_cannot_be_had_is_the_modules_own_failure(
    token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        module = signer._backend._module  # type: ignore[attr-defined]
        for answer in (0x150, 0x190):  # it grows for ever; C_Finalize by other code
            shim.fail(Call.GET_SLOT_LIST, answer)
            with pytest.raises(sdk.PKCS11Error):
                read_slots(module.cryptoki)


@pytest.mark.usefixtures("token")
def test_a_token_whose_names_would_forge_a_line_is_told_in_one(
    shim: Shim, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="d1_signer")
    forged = b"7\nERROR \x1b[2J"
    shim.script(f"token.label={forged.hex()} token.serial={forged.hex()}")
    with pytest.raises(KeyNotFoundError) as raised:
        open_signer("pkcs11:token=none;object=d1", module_path=shim.path)
    assert "7\\nERROR" in raised.value.message
    with pytest.raises(LoginError) as raised_too:
        open_signer("pkcs11:manufacturer=SoftHSM%20project;object=d1", module_path=shim.path)
    assert raised_too.value.message.isprintable()
    assert all(text.isprintable() for text in (raised.value.message, *caplog.messages))


@pytest.mark.parametrize("name", ["token", "serial"])
def test_a_name_that_was_left_empty_is_not_that_of_an_empty_slot(
    token: SoftHsmToken, shim: Shim, name: str
) -> None:
    with pytest.raises(KeyNotFoundError, match=f"No token fits pkcs11:{name}="):
        open_signer(
            f"pkcs11:{name}=;object=d1", module_path=shim.path, pin_source=f"file:{token.pin_file}"
        )

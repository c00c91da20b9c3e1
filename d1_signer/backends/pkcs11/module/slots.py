# SPDX-License-Identifier: Apache-2.0
"""The slots that tell about themselves; python-pkcs11 gives none out if a single one does not.

Where one does not, the binding's object of the module is lent another function list while it asks:
a copy of the module's, whose ``C_GetSlotList`` leaves such slots out.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from typing import Any

import pkcs11
from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.failures import not_initialized, told
from d1_signer.backends.pkcs11.module.cryptoki import (
    CKR_BUFFER_TOO_SMALL,
    CKR_OK,
    Cryptoki,
    place_of_list,
)

_log = logging.getLogger(__name__)

_FUNCTIONS = 68  # of CK_FUNCTION_LIST, behind the version
_GET_SLOT_LIST = 1 + 4
_List = ctypes.c_void_p * (1 + _FUNCTIONS)
_GetSlotList = ctypes.CFUNCTYPE(
    ctypes.c_ulong, ctypes.c_ubyte, ctypes.POINTER(ctypes.c_ulong), ctypes.POINTER(ctypes.c_ulong)
)

# By the module's own list and the slots that are shown; kept, since the binding's objects refer to
# them.
_copies: dict[tuple[int, tuple[int, ...]], tuple[Any, Any]] = {}


def tokens(
    binding: Any, cryptoki: Cryptoki
) -> tuple[list[pkcs11.Token], dict[int, sdk.PKCS11Error]]:
    """The tokens that tell about themselves, and what the slots that do not tell answer.

    Raises:
        pkcs11.PKCS11Error: The module gives no list of slots.
    """
    slots, silent = with_tokens(binding, cryptoki)
    present: list[pkcs11.Token] = []
    for slot in slots:
        try:
            present.append(slot.get_token())
        except sdk.PKCS11Error as error:
            if not_initialized(error):
                raise
            silent[slot.slot_id] = error
    for number, answer in silent.items():
        _log.info("pkcs11.slot_passed_over slot=%d answer=%s", number, told(answer))
    return present, silent


def with_tokens(
    binding: Any, cryptoki: Cryptoki
) -> tuple[list[pkcs11.Slot], dict[int, sdk.PKCS11Error]]:
    """The slots that have a token, and what ``C_GetSlotInfo`` answers of those passed over.

    Raises:
        pkcs11.PKCS11Error: The module gives no list of slots.
    """
    shown, silent = cryptoki.slots()
    with cryptoki.listing:
        if not silent:
            with contextlib.suppress(sdk.PKCS11Error):
                slots = binding.get_slots(token_present=True)
                if [slot.slot_id for slot in slots] == shown:
                    return slots, silent
        # One is silent, or the list has changed meanwhile, which the binding reads wrongly.
        return _listed(binding, cryptoki, shown), silent


def _listed(binding: Any, cryptoki: Cryptoki, shown: list[int]) -> list[pkcs11.Slot]:
    place = place_of_list(binding)
    if place is None or not shown:
        slots = binding.get_slots(token_present=True) if shown else []
        return [slot for slot in slots if slot.slot_id in shown]
    place.value = ctypes.addressof(_copy(cryptoki.address, tuple(shown)))
    try:
        listed: list[pkcs11.Slot] = binding.get_slots(token_present=True)
        return listed
    finally:
        place.value = cryptoki.address


def _copy(address: int, shown: tuple[int, ...]) -> Any:
    known = _copies.get((address, shown))
    if known is None:

        def tell(_: int, ids: Any, count: Any) -> int:
            if ids and count[0] < len(shown):
                return CKR_BUFFER_TOO_SMALL
            for place, slot in enumerate(shown if ids else ()):
                ids[place] = slot
            count[0] = len(shown)
            return CKR_OK

        copy, function = _List.from_buffer_copy(_List.from_address(address)), _GetSlotList(tell)
        copy[_GET_SLOT_LIST] = ctypes.cast(function, ctypes.c_void_p).value
        known = _copies[address, shown] = copy, function
    return known[0]

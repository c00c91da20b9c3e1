# SPDX-License-Identifier: Apache-2.0
"""The slots of a module and the tokens in them: ``C_GetSlotList``, ``C_GetTokenInfo``.

PKCS#11 v2.40 base specification, sections 3.2 and 5.5.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.failures import impossible
from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki, Version, structure, unpadded
from d1_signer.backends.pkcs11.returns import Ckr, check, code_of, error_of, name_of
from d1_signer.errors import SignerUnavailable

_GET_SLOT_LIST, _GET_SLOT_INFO, _GET_TOKEN_INFO = 4, 5, 6
_LOOKS = 5  # at a list of slots that grows between the question for its length and the answer
_MOST = 4096  # slots; CK_UNAVAILABLE_INFORMATION, of 4 and of 8 bytes, is more

CKF_TOKEN_INITIALIZED = 0x400

_SlotInfo = structure(
    "CK_SLOT_INFO",
    description=ctypes.c_char * 64,
    manufacturer=ctypes.c_char * 32,
    flags=ctypes.c_ulong,
    hardware_version=Version,
    firmware_version=Version,
)
_TokenInfo = structure(
    "CK_TOKEN_INFO",
    label=ctypes.c_char * 32,
    manufacturer=ctypes.c_char * 32,
    model=ctypes.c_char * 16,
    serial=ctypes.c_char * 16,
    flags=ctypes.c_ulong,
    numbers=ctypes.c_ulong * 10,
    hardware_version=Version,
    firmware_version=Version,
    time=ctypes.c_char * 16,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token in its slot, as the module described both; texts without their padding."""

    cryptoki: Cryptoki = field(repr=False)
    slot_id: int
    slot_description: str
    slot_manufacturer: str
    slot_flags: int
    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int

    @property
    def initialized(self) -> bool:
        """Whether the token says that it was initialised; else it holds no key."""
        return bool(self.flags & CKF_TOKEN_INITIALIZED)

    def flags_now(self) -> int:
        """The token's flags, asked anew."""
        return int(_token_info(self.cryptoki, self.slot_id).flags)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """What was found.

    Attributes:
        tokens: The tokens that are present.
        failures: Slots that could not be read, and why.
    """

    tokens: list[Token]
    failures: dict[int, sdk.PKCS11Error]


def read_slots(cryptoki: Cryptoki) -> Slots:
    """Read every slot with a token; one that cannot be read does not hide the others.

    Raises:
        pkcs11.PKCS11Error: There is no list of slots, or the module is not initialised.
        SignerUnavailable: The list goes on growing.
        SignerError: It has an impossible length.
    """
    tokens, failures = [], {}
    for slot_id in _slot_ids(cryptoki):
        try:
            tokens.append(_token(cryptoki, slot_id))
        except sdk.PKCS11Error as failure:
            if code_of(failure) == Ckr.CRYPTOKI_NOT_INITIALIZED:
                raise  # the module's own state, not the slot's
            failures[slot_id] = failure.with_traceback(None)
    return Slots(tokens=tokens, failures=failures)


def _slot_ids(cryptoki: Cryptoki) -> list[int]:
    get = cryptoki.function(_GET_SLOT_LIST, ctypes.c_ubyte, ctypes.c_void_p, ctypes.c_void_p)
    count = ctypes.c_ulong()
    code = int(Ckr.BUFFER_TOO_SMALL)
    for _ in range(_LOOKS):
        check(get(1, None, ctypes.byref(count)), "C_GetSlotList")
        room = count.value
        if room > _MOST:
            raise impossible("C_GetSlotList", f"a number of slots of {room:#x}")
        numbers = (ctypes.c_ulong * max(1, room))()
        code = get(1, numbers, ctypes.byref(count))
        if code == Ckr.OK and count.value > room:
            raise impossible("C_GetSlotList", f"{count.value:#x} slots where {room} were asked for")
        if code == Ckr.OK:
            return list(dict.fromkeys(list(numbers)[: count.value]))
        if code != Ckr.BUFFER_TOO_SMALL:
            raise error_of(code, "C_GetSlotList")
    raise SignerUnavailable(
        f"The list of slots went on growing while it was read (C_GetSlotList: {name_of(code)}).",
        hint="Try again when no reader is being plugged in or out.",
        details={"step": "token", "call": "C_GetSlotList", "pkcs11": name_of(code)},
    )


def _token(cryptoki: Cryptoki, slot_id: int) -> Token:
    get = cryptoki.function(_GET_SLOT_INFO, ctypes.c_ulong, ctypes.c_void_p)
    slot = _SlotInfo()
    check(get(slot_id, ctypes.byref(slot)), "C_GetSlotInfo")
    token = _token_info(cryptoki, slot_id)
    return Token(
        cryptoki=cryptoki,
        slot_id=slot_id,
        slot_description=unpadded(slot.description),
        slot_manufacturer=unpadded(slot.manufacturer),
        slot_flags=slot.flags,
        label=unpadded(token.label),
        manufacturer=unpadded(token.manufacturer),
        model=unpadded(token.model),
        serial=unpadded(token.serial),
        flags=token.flags,
    )


def _token_info(cryptoki: Cryptoki, slot_id: int) -> ctypes.Structure:
    get = cryptoki.function(_GET_TOKEN_INFO, ctypes.c_ulong, ctypes.c_void_p)
    info = _TokenInfo()
    check(get(slot_id, ctypes.byref(info)), "C_GetTokenInfo")
    return info  # type: ignore[no-any-return]

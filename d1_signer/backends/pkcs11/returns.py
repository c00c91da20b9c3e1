# SPDX-License-Identifier: Apache-2.0
"""Return values of PKCS#11 by name, and the exceptions that carry them.

python-pkcs11's exceptions are used, so that code beside ours can catch them; it knows no class for
about a third of the values, and none of its classes tells which call answered.
"""

from __future__ import annotations

from enum import IntEnum

from pkcs11 import exceptions as sdk

_VENDOR_DEFINED = 0x80000000


class Ckr(IntEnum):
    """``CK_RV``: PKCS#11 v2.40 and v3.1, ``pkcs11t.h`` of OASIS."""

    OK = 0x000
    CANCEL = 0x001
    HOST_MEMORY = 0x002
    SLOT_ID_INVALID = 0x003
    GENERAL_ERROR = 0x005
    FUNCTION_FAILED = 0x006
    ARGUMENTS_BAD = 0x007
    NO_EVENT = 0x008
    NEED_TO_CREATE_THREADS = 0x009
    CANT_LOCK = 0x00A
    ATTRIBUTE_READ_ONLY = 0x010
    ATTRIBUTE_SENSITIVE = 0x011
    ATTRIBUTE_TYPE_INVALID = 0x012
    ATTRIBUTE_VALUE_INVALID = 0x013
    ACTION_PROHIBITED = 0x01B
    DATA_INVALID = 0x020
    DATA_LEN_RANGE = 0x021
    DEVICE_ERROR = 0x030
    DEVICE_MEMORY = 0x031
    DEVICE_REMOVED = 0x032
    ENCRYPTED_DATA_INVALID = 0x040
    ENCRYPTED_DATA_LEN_RANGE = 0x041
    AEAD_DECRYPT_FAILED = 0x042
    FUNCTION_CANCELED = 0x050
    FUNCTION_NOT_PARALLEL = 0x051
    FUNCTION_NOT_SUPPORTED = 0x054
    KEY_HANDLE_INVALID = 0x060
    KEY_SIZE_RANGE = 0x062
    KEY_TYPE_INCONSISTENT = 0x063
    KEY_NOT_NEEDED = 0x064
    KEY_CHANGED = 0x065
    KEY_NEEDED = 0x066
    KEY_INDIGESTIBLE = 0x067
    KEY_FUNCTION_NOT_PERMITTED = 0x068
    KEY_NOT_WRAPPABLE = 0x069
    KEY_UNEXTRACTABLE = 0x06A
    MECHANISM_INVALID = 0x070
    MECHANISM_PARAM_INVALID = 0x071
    OBJECT_HANDLE_INVALID = 0x082
    OPERATION_ACTIVE = 0x090
    OPERATION_NOT_INITIALIZED = 0x091
    PIN_INCORRECT = 0x0A0
    PIN_INVALID = 0x0A1
    PIN_LEN_RANGE = 0x0A2
    PIN_EXPIRED = 0x0A3
    PIN_LOCKED = 0x0A4
    SESSION_CLOSED = 0x0B0
    SESSION_COUNT = 0x0B1
    SESSION_HANDLE_INVALID = 0x0B3
    SESSION_PARALLEL_NOT_SUPPORTED = 0x0B4
    SESSION_READ_ONLY = 0x0B5
    SESSION_EXISTS = 0x0B6
    SESSION_READ_ONLY_EXISTS = 0x0B7
    SESSION_READ_WRITE_SO_EXISTS = 0x0B8
    SIGNATURE_INVALID = 0x0C0
    SIGNATURE_LEN_RANGE = 0x0C1
    TEMPLATE_INCOMPLETE = 0x0D0
    TEMPLATE_INCONSISTENT = 0x0D1
    TOKEN_NOT_PRESENT = 0x0E0
    TOKEN_NOT_RECOGNIZED = 0x0E1
    TOKEN_WRITE_PROTECTED = 0x0E2
    UNWRAPPING_KEY_HANDLE_INVALID = 0x0F0
    UNWRAPPING_KEY_SIZE_RANGE = 0x0F1
    UNWRAPPING_KEY_TYPE_INCONSISTENT = 0x0F2
    USER_ALREADY_LOGGED_IN = 0x100
    USER_NOT_LOGGED_IN = 0x101
    USER_PIN_NOT_INITIALIZED = 0x102
    USER_TYPE_INVALID = 0x103
    USER_ANOTHER_ALREADY_LOGGED_IN = 0x104
    USER_TOO_MANY_TYPES = 0x105
    WRAPPED_KEY_INVALID = 0x110
    WRAPPED_KEY_LEN_RANGE = 0x112
    WRAPPING_KEY_HANDLE_INVALID = 0x113
    WRAPPING_KEY_SIZE_RANGE = 0x114
    WRAPPING_KEY_TYPE_INCONSISTENT = 0x115
    RANDOM_SEED_NOT_SUPPORTED = 0x120
    RANDOM_NO_RNG = 0x121
    DOMAIN_PARAMS_INVALID = 0x130
    CURVE_NOT_SUPPORTED = 0x140
    BUFFER_TOO_SMALL = 0x150
    SAVED_STATE_INVALID = 0x160
    INFORMATION_SENSITIVE = 0x170
    STATE_UNSAVEABLE = 0x180
    CRYPTOKI_NOT_INITIALIZED = 0x190
    CRYPTOKI_ALREADY_INITIALIZED = 0x191
    MUTEX_BAD = 0x1A0
    MUTEX_NOT_LOCKED = 0x1A1
    NEW_PIN_MODE = 0x1B0
    NEXT_OTP = 0x1B1
    EXCEEDED_MAX_ITERATIONS = 0x1B5
    FIPS_SELF_TEST_FAILED = 0x1B6
    LIBRARY_LOAD_FAILED = 0x1B7
    PIN_TOO_WEAK = 0x1B8
    PUBLIC_KEY_INVALID = 0x1B9
    FUNCTION_REJECTED = 0x200
    TOKEN_RESOURCE_EXCEEDED = 0x201
    OPERATION_CANCEL_FAILED = 0x202
    KEY_EXHAUSTED = 0x203


# Where python-pkcs11's class has another name than the standard's.
_RENAMED = {
    Ckr.FUNCTION_CANCELED: sdk.FunctionCancelled,
    Ckr.TOKEN_NOT_RECOGNIZED: sdk.TokenNotRecognised,
    Ckr.USER_ANOTHER_ALREADY_LOGGED_IN: sdk.AnotherUserAlreadyLoggedIn,
}
_BY_NAME: dict[str, type[sdk.PKCS11Error]] = {
    name.lower(): kind for name, kind in vars(sdk).items() if isinstance(kind, type)
}
_KINDS: dict[int, type[sdk.PKCS11Error]] = {
    code: kind
    for code in Ckr
    if (kind := _RENAMED.get(code) or _BY_NAME.get(code.name.replace("_", "").lower()))
}
_CODES = {kind: code for code, kind in _KINDS.items()}


def error_of(code: int, call: str) -> sdk.PKCS11Error:
    """The exception for a return value.

    Args:
        code: ``CK_RV``.
        call: The function that answered it, such as ``C_Sign``.
    """
    if code == Ckr.CRYPTOKI_NOT_INITIALIZED:
        error = sdk.PKCS11Error("Cryptoki is not initialized")
    else:
        error = _KINDS.get(code, sdk.PKCS11Error)()
    vars(error).update(code=code, call=call)
    return error


def check(code: int, call: str) -> None:
    """Raise what a return value stands for, unless it is ``CKR_OK``.

    Raises:
        pkcs11.PKCS11Error: It is another one.
    """
    if code != Ckr.OK:
        raise error_of(code, call)


def code_of(failure: sdk.PKCS11Error) -> int | None:
    """The return value that a failure stands for; None where the binding raised it by itself."""
    code: int | None = vars(failure).get("code", _CODES.get(type(failure)))
    return code


def call_of(failure: sdk.PKCS11Error) -> str | None:
    """The function that failed, where that is known."""
    call: str | None = vars(failure).get("call")
    return call


def name_of(code: int) -> str:
    """``CKR_…`` by the standard, else the number, in hexadecimal as vendors list theirs."""
    if code in _NAMES:
        return f"CKR_{_NAMES[code]}"
    return f"{code:#x}"


def is_vendors(code: int) -> bool:
    """Whether the standard leaves the value's meaning to the module's vendor."""
    return code >= _VENDOR_DEFINED


_NAMES = {int(code): code.name for code in Ckr}

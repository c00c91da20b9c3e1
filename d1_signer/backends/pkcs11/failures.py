# SPDX-License-Identifier: Apache-2.0
"""What a module's failures mean: what can be recovered from, and as which error they are told.

Return values: PKCS#11 v2.40 base specification, section 5.1. Nearly all of python-pkcs11's
exceptions have an empty text, so that the table goes by their class.
"""

from __future__ import annotations

from enum import IntEnum

from pkcs11 import exceptions as sdk

from d1_signer.errors import (
    D1SignerError,
    InvalidKeyError,
    LoginError,
    SignerError,
    SignerUnavailable,
)


class Recovery(IntEnum):
    """How much must be made anew before a failed call can be tried again."""

    NONE = 0
    SESSION = 1  # the session, the login checked and renewed on the way
    MODULE = 2  # C_Finalize and C_Initialize


_SESSION = (
    sdk.SessionHandleInvalid,
    sdk.SessionClosed,
    sdk.ObjectHandleInvalid,
    sdk.KeyHandleInvalid,
    sdk.OperationActive,
    sdk.OperationNotInitialized,
    sdk.UserNotLoggedIn,
)
# A dead remote HSM answers these for ever, new sessions included, until C_Finalize.
_MODULE = (
    sdk.DeviceError,
    sdk.DeviceMemory,
    sdk.DeviceRemoved,
    sdk.FunctionFailed,
    sdk.GeneralError,
    sdk.HostMemory,
    sdk.SlotIDInvalid,
    sdk.TokenNotPresent,
    sdk.TokenNotRecognised,
)
_NOT_INITIALIZED = "not initialized"  # the binding tells this one by its text alone

_CHECK_PIN = "Check the PIN; it is not tried again by this process, which could lock the token."
_RESET_PIN = "Log in once with the vendor's tool, or let the security officer reset the PIN."

_ERRORS: dict[type[sdk.PKCS11Error], tuple[type[D1SignerError], str, str]] = {
    sdk.PinIncorrect: (LoginError, "The token refused the PIN.", _CHECK_PIN),
    sdk.PinInvalid: (LoginError, "The PIN has characters that the token forbids.", _CHECK_PIN),
    sdk.PinLenRange: (LoginError, "The PIN's length is not one that the token takes.", _CHECK_PIN),
    sdk.PinLocked: (LoginError, "The PIN is locked.", _RESET_PIN),
    sdk.PinExpired: (LoginError, "The PIN has expired or must be changed first.", _RESET_PIN),
    sdk.UserPinNotInitialized: (LoginError, "The token has no user PIN yet.", _RESET_PIN),
    sdk.UserNotLoggedIn: (
        LoginError,
        "The token asks for a login.",
        "Name the source of its PIN: pin-source=file:PATH or env:NAME.",
    ),
    sdk.AnotherUserAlreadyLoggedIn: (
        LoginError,
        "Another user is logged in on the token in this process.",
        "Log that user out first, or give its user_type.",
    ),
    sdk.FunctionCancelled: (LoginError, "The login was cancelled at the device.", "Try again."),
    sdk.SessionCount: (
        SignerUnavailable,
        "The token has no free session.",
        "Lower max_sessions, or end other users of the token.",
    ),
    sdk.MechanismInvalid: (
        InvalidKeyError,
        "The token does not sign with CKM_ECDSA.",
        "Check the token's mechanisms, and its FIPS or policy settings.",
    ),
    sdk.KeyTypeInconsistent: (InvalidKeyError, "The key is no EC key.", "Use a key on P-256."),
}
# Return values that the binding has no class for, by the end of its text.
_UNMAPPED: dict[str, tuple[type[D1SignerError], str, str]] = {
    "0x68": (  # CKR_KEY_FUNCTION_NOT_PERMITTED
        InvalidKeyError,
        "The key may not sign (CKA_SIGN).",
        "Use a key that was made for signing.",
    ),
    "0x103": (  # CKR_USER_TYPE_INVALID
        LoginError,
        "The token does not know this user type.",
        "Leave user_type out, or take the number from the vendor's documents.",
    ),
}


def recovery_for(failure: sdk.PKCS11Error) -> Recovery:
    """How much to make anew after a failure."""
    if isinstance(failure, _SESSION):
        return Recovery.SESSION
    if isinstance(failure, _MODULE) or not_initialized(failure):
        return Recovery.MODULE
    # A return value that the binding does not know (vendors define their own): begin small.
    unknown = type(failure) is sdk.PKCS11Error and _last_word(failure) not in _UNMAPPED
    return Recovery.SESSION if unknown else Recovery.NONE


def not_initialized(failure: sdk.PKCS11Error) -> bool:
    """Whether it is ``CKR_CRYPTOKI_NOT_INITIALIZED``."""
    return _NOT_INITIALIZED in str(failure)


def translated(failure: sdk.PKCS11Error, *, step: str) -> D1SignerError:
    """The error of ours for a failure of the module.

    Args:
        failure: What the binding raised.
        step: Where it happened: ``module``, ``token``, ``login``, ``key`` or ``signature``; told in
            the error's ``details``.
    """
    name = told(failure)
    details: dict[str, str | int | float] = {"step": step, "pkcs11": name}
    known = _ERRORS.get(type(failure)) or _UNMAPPED.get(_last_word(failure))
    if known is not None:
        kind, text, hint = known
        return kind(text, hint=hint, details=details)
    if recovery_for(failure) is not Recovery.NONE:
        return SignerUnavailable(
            f"The PKCS#11 token does not work ({name}).",
            hint="Check the HSM, its connection and its client software; it is tried again.",
            details=details,
        )
    return SignerError(
        f"The PKCS#11 module failed ({name}).",
        hint="Look the code up in the vendor's documents.",
        details=details,
    )


def told(failure: sdk.PKCS11Error) -> str:
    """The failure's name, with the return value where the binding knew no name for it."""
    text = str(failure)
    return text.rstrip(".") if type(failure) is sdk.PKCS11Error and text else type(failure).__name__


def _last_word(failure: sdk.PKCS11Error) -> str:
    return str(failure).rpartition(" ")[2]

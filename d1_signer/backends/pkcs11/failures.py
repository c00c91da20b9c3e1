# SPDX-License-Identifier: Apache-2.0
"""What a module's return values mean: what can be recovered from, and as which error they are told.

Return values: PKCS#11 v2.40 base specification, section 5.1, and v3.1. What is not in the table
says that the call as such was wrong; it is told by its name, and nothing is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.returns import Ckr, call_of, code_of, is_vendors, name_of
from d1_signer.errors import (
    AccessDeniedError,
    D1SignerError,
    InvalidKeyError,
    KeyDisabledError,
    LoginError,
    SignerError,
    SignerUnavailable,
)


class Recovery(IntEnum):
    """How much must be made anew before a failed call can be tried again."""

    NONE = 0
    SESSION = 1  # the session, the login checked and renewed on the way
    MODULE = 2  # C_Finalize and C_Initialize


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a return value is told as."""

    kind: type[D1SignerError]
    text: str
    hint: str
    recovery: Recovery = Recovery.NONE
    retryable: bool | None = None  # None: as its class is


_CHECK_PIN = (
    "The token counts each wrong PIN and locks itself after some: correct the PIN at its source "
    "before this is run again or started anew. This process does not send a refused PIN again."
)
_RESET_PIN = "Log in once with the vendor's tool, or let the security officer reset the PIN."
_CHECK_DEVICE = "Check the HSM, its connection and its client software; it is tried again."
_LOCKS = 'Use locking="lock"; where it is in force, update the vendor\'s software.'
_USE_P256 = "Use a key on P-256."
_ATTRIBUTES = "Check the token's policy on the attributes of new keys."


def _away(recovery: Recovery) -> Meaning:
    return Meaning(
        SignerUnavailable, "The PKCS#11 token does not work", _CHECK_DEVICE, recovery=recovery
    )


def _login(text: str, hint: str = _RESET_PIN) -> Meaning:
    return Meaning(LoginError, text, hint)


def _template(text: str) -> Meaning:
    return Meaning(SignerError, text, _ATTRIBUTES)


MEANINGS: dict[int, Meaning] = {
    # The session, or what was found through it, is gone.
    Ckr.SESSION_HANDLE_INVALID: _away(Recovery.SESSION),
    Ckr.SESSION_CLOSED: _away(Recovery.SESSION),
    Ckr.OBJECT_HANDLE_INVALID: _away(Recovery.SESSION),
    Ckr.KEY_HANDLE_INVALID: _away(Recovery.SESSION),
    Ckr.KEY_CHANGED: _away(Recovery.SESSION),
    Ckr.OPERATION_ACTIVE: _away(Recovery.SESSION),
    Ckr.OPERATION_NOT_INITIALIZED: _away(Recovery.SESSION),
    # A dead remote HSM answers these for ever, new sessions included, until C_Finalize.
    Ckr.CRYPTOKI_NOT_INITIALIZED: _away(Recovery.MODULE),
    Ckr.DEVICE_ERROR: _away(Recovery.MODULE),
    Ckr.DEVICE_MEMORY: _away(Recovery.MODULE),
    Ckr.DEVICE_REMOVED: _away(Recovery.MODULE),
    Ckr.FUNCTION_FAILED: _away(Recovery.MODULE),
    Ckr.GENERAL_ERROR: _away(Recovery.MODULE),
    Ckr.HOST_MEMORY: _away(Recovery.MODULE),
    Ckr.SLOT_ID_INVALID: _away(Recovery.MODULE),
    Ckr.TOKEN_NOT_PRESENT: _away(Recovery.MODULE),
    Ckr.TOKEN_NOT_RECOGNIZED: _away(Recovery.MODULE),
    # Room that others take, or a person who was asked: later it may be otherwise.
    Ckr.SESSION_COUNT: Meaning(
        SignerUnavailable,
        "The token has no free session",
        "Lower max_sessions, or end other users of the token.",
    ),
    Ckr.TOKEN_RESOURCE_EXCEEDED: Meaning(
        SignerUnavailable, "The token has no resources left for this", "Try again when it is idle."
    ),
    Ckr.CANCEL: Meaning(
        SignerError, "The call was cancelled", "Try again, and confirm it.", retryable=True
    ),
    Ckr.FUNCTION_CANCELED: Meaning(
        SignerError,
        "The call was cancelled at the device",
        "Try again, and confirm it at the device.",
        retryable=True,
    ),
    # The login.
    Ckr.PIN_INCORRECT: _login("The token refused the PIN", _CHECK_PIN),
    Ckr.PIN_INVALID: _login("The PIN has characters that the token forbids", _CHECK_PIN),
    Ckr.PIN_LEN_RANGE: _login("The PIN's length is not one that the token takes", _CHECK_PIN),
    Ckr.PIN_LOCKED: _login("The PIN is locked"),
    Ckr.PIN_EXPIRED: _login("The PIN has expired or must be changed first"),
    Ckr.PIN_TOO_WEAK: _login("The PIN is too weak for the token's policy and must be changed"),
    Ckr.NEW_PIN_MODE: _login("The token asks for a new PIN"),
    Ckr.NEXT_OTP: _login("The token asks for the next one-time password"),
    Ckr.USER_PIN_NOT_INITIALIZED: _login("The token has no user PIN yet"),
    Ckr.USER_NOT_LOGGED_IN: Meaning(
        LoginError,
        "The token asks for a login",
        "Name the source of its PIN: pin-source=file:PATH or env:NAME.",
        recovery=Recovery.SESSION,
    ),
    Ckr.USER_ALREADY_LOGGED_IN: Meaning(
        LoginError,
        "The token calls the user logged in, and its sessions are not",
        "End what else uses the token on this host, or restart the vendor's client service.",
        recovery=Recovery.MODULE,
    ),
    Ckr.USER_ANOTHER_ALREADY_LOGGED_IN: _login(
        "Another user is logged in on the token in this process",
        "Log that user out first, or give its user_type.",
    ),
    Ckr.USER_TOO_MANY_TYPES: _login(
        "Other users are logged in on the token, and it takes no further one",
        "Log them out first.",
    ),
    Ckr.USER_TYPE_INVALID: _login(
        "The token does not know this user type",
        "Leave user_type out, or take the number from the vendor's documents.",
    ),
    Ckr.SESSION_READ_ONLY_EXISTS: _login(
        "The security officer cannot log in where a session for reading is open",
        "Leave user_type out: the user signs, not the security officer.",
    ),
    Ckr.SESSION_READ_WRITE_SO_EXISTS: _login(
        "The security officer is logged in on the token in this process",
        "Log the security officer out first.",
    ),
    # The key, or the token, is not made for this.
    Ckr.MECHANISM_INVALID: Meaning(
        InvalidKeyError,
        "The token does not take the mechanism",
        "Check the token's mechanisms, and its FIPS or policy settings.",
    ),
    Ckr.MECHANISM_PARAM_INVALID: Meaning(
        InvalidKeyError,
        "The token does not take the mechanism's parameters",
        "Check the token's mechanisms, and its FIPS or policy settings.",
    ),
    Ckr.KEY_TYPE_INCONSISTENT: Meaning(
        InvalidKeyError, "The key's type does not fit the mechanism", _USE_P256
    ),
    Ckr.KEY_SIZE_RANGE: Meaning(
        InvalidKeyError, "The token does not take a key of this size", _USE_P256
    ),
    Ckr.CURVE_NOT_SUPPORTED: Meaning(
        InvalidKeyError,
        "The token does not support the curve P-256",
        "Check the token's mechanisms, and its FIPS or policy settings.",
    ),
    Ckr.DOMAIN_PARAMS_INVALID: Meaning(
        InvalidKeyError,
        "The token does not take the curve P-256",
        "Check the token's mechanisms, and its FIPS or policy settings.",
    ),
    Ckr.KEY_FUNCTION_NOT_PERMITTED: Meaning(
        InvalidKeyError, "The key may not sign (CKA_SIGN)", "Use a key that was made for signing."
    ),
    Ckr.KEY_EXHAUSTED: Meaning(
        KeyDisabledError,
        "The key has made as many signatures as it may",
        "Make a new key, and register it with D1.",
    ),
    Ckr.FUNCTION_REJECTED: Meaning(
        AccessDeniedError,
        "The token refused the request",
        "Check what the user, or the authentication key, may do on the token.",
    ),
    Ckr.ACTION_PROHIBITED: Meaning(
        AccessDeniedError,
        "The token's policy prohibits this",
        "Check the token's policy and the attributes of the key.",
    ),
    # Making a key.
    Ckr.ATTRIBUTE_READ_ONLY: _template("The token does not let an attribute of the key be set"),
    Ckr.ATTRIBUTE_TYPE_INVALID: _template("The token does not know an attribute of the key"),
    Ckr.ATTRIBUTE_VALUE_INVALID: _template("The token refuses the value of an attribute"),
    Ckr.TEMPLATE_INCOMPLETE: _template("The token wants more attributes for a key"),
    Ckr.TEMPLATE_INCONSISTENT: _template("The token refuses this combination of attributes"),
    Ckr.SESSION_READ_ONLY: Meaning(
        SignerError, "The token gives sessions for reading only", "Make the key by another user."
    ),
    Ckr.TOKEN_WRITE_PROTECTED: Meaning(
        SignerError, "The token is protected against writing", "Remove the protection first."
    ),
    # The module.
    Ckr.FUNCTION_NOT_SUPPORTED: Meaning(
        SignerError, "The PKCS#11 module does not offer this call", "Update the vendor's software."
    ),
    Ckr.FIPS_SELF_TEST_FAILED: Meaning(
        SignerError,
        "The token's self-test failed",
        "It serves nothing until an operator has seen to it; ask the vendor.",
    ),
    Ckr.LIBRARY_LOAD_FAILED: Meaning(
        SignerError,
        "The PKCS#11 module could not load a library that it needs",
        "Check the installation of the vendor's software.",
    ),
    Ckr.MUTEX_BAD: Meaning(SignerError, "The PKCS#11 module's locks do not work", _LOCKS),
    Ckr.MUTEX_NOT_LOCKED: Meaning(SignerError, "The PKCS#11 module's locks do not work", _LOCKS),
}
_VENDORS = Meaning(
    SignerUnavailable,
    "The PKCS#11 token failed with a return value of its vendor's own",
    "Look the number up in the vendor's documents; it is tried again.",
    recovery=Recovery.SESSION,
)
_OTHER = Meaning(
    SignerError, "The PKCS#11 module failed", "Look the answer up in the vendor's documents."
)
_NOT_TOLD = Meaning(  # the binding's own, which says what it met in words
    SignerUnavailable, "The PKCS#11 module failed", _CHECK_DEVICE, recovery=Recovery.SESSION
)

# The step that a call belongs to, whatever was under way when it failed.
STEPS = {
    "C_Initialize": "module",
    "C_GetInfo": "module",
    "C_GetSlotList": "token",
    "C_GetSlotInfo": "token",
    "C_GetTokenInfo": "token",
    "C_OpenSession": "token",
    "C_GetSessionInfo": "login",
    "C_Login": "login",
    "C_FindObjectsInit": "key",
    "C_FindObjects": "key",
    "C_GetAttributeValue": "key",
    "C_GenerateKeyPair": "key",
    "C_DestroyObject": "key",
    "C_SignInit": "signature",
    "C_Sign": "signature",
}


def meaning_of(code: int | None) -> Meaning:
    """What a return value means; None: there is none (see `returns.code_of`)."""
    if code is None:
        return _NOT_TOLD
    return MEANINGS.get(code, _VENDORS if is_vendors(code) else _OTHER)


def recovery_for(failure: sdk.PKCS11Error) -> Recovery:
    """How much to make anew after a failure."""
    return meaning_of(code_of(failure)).recovery


def translated(failure: sdk.PKCS11Error, *, step: str) -> D1SignerError:
    """The error of ours for a failure of the module.

    Args:
        failure: What was raised.
        step: Where it happened, unless the call that failed tells: ``module``, ``token``,
            ``login``, ``key`` or ``signature``; told in the error's ``details``.
    """
    meaning, call = meaning_of(code_of(failure)), call_of(failure)
    details: dict[str, str | int | float] = {
        "step": STEPS.get(call or "", step),
        "pkcs11": answer_of(failure),
    }
    if call is not None:
        details["call"] = call
    # Whatever keeps a login from being made, it is the login that fails.
    kind = LoginError if call == "C_Login" and meaning.kind is SignerError else meaning.kind
    return kind(
        f"{meaning.text} ({told(failure)}).",
        hint=meaning.hint,
        retryable=meaning.retryable,
        details=details,
    )


def told(failure: sdk.PKCS11Error) -> str:
    """The module's answer and the call that it answered, for an error's text."""
    call = call_of(failure)
    return f"{call}: {answer_of(failure)}" if call else answer_of(failure)


def answer_of(failure: sdk.PKCS11Error) -> str:
    """The module's answer by its name, or as a number where it has none."""
    code = code_of(failure)
    return (str(failure).rstrip(".") or type(failure).__name__) if code is None else name_of(code)


def impossible(call: str, text: str) -> SignerError:
    """The error for an answer of ``CKR_OK`` beside what the standard does not allow.

    Args:
        call: The function that answered it.
        text: What it told.
    """
    return SignerError(
        f"The PKCS#11 module's {call} answers CKR_OK and tells {text}.",
        hint="The module does not keep to PKCS#11; update the vendor's software.",
        details={"step": STEPS[call], "call": call, "pkcs11": name_of(Ckr.OK)},
    )

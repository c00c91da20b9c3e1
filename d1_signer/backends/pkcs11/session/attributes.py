# SPDX-License-Identifier: Apache-2.0
"""Attributes as values. What a module does not tell, or tells in another size, is unknown.

Modules refuse an attribute that they do not know by whatever return value they like, and some give
a ``CK_BBOOL`` or ``CK_ULONG`` the size of another type. Only an answer by which the session, the
object or the token is gone is a failure.
"""

from __future__ import annotations

import ctypes

from pkcs11 import exceptions as sdk

from d1_signer.backends.pkcs11.returns import Ckr, code_of
from d1_signer.backends.pkcs11.session.session import Session

PUBLIC_KEY_INFO = 0x129  # CKA_PUBLIC_KEY_INFO, which the binding has no name for

_GONE = {
    Ckr.CRYPTOKI_NOT_INITIALIZED,
    Ckr.DEVICE_REMOVED,
    Ckr.OBJECT_HANDLE_INVALID,
    Ckr.SESSION_CLOSED,
    Ckr.SESSION_HANDLE_INVALID,
    Ckr.TOKEN_NOT_PRESENT,
}


def octets(session: Session, item: int, name: int) -> bytes | None:
    """An attribute's bytes.

    Raises:
        pkcs11.PKCS11Error: The session, the object or the token is gone.
    """
    try:
        return session.attribute(item, name)
    except sdk.PKCS11Error as failure:
        if code_of(failure) in _GONE:
            raise
        return None


def flag(session: Session, item: int, name: int) -> bool | None:
    """A ``CK_BBOOL``: one byte. Raises what `octets` does."""
    value = octets(session, item, name)
    return None if value is None or len(value) != 1 else value != b"\0"


def number(session: Session, item: int, name: int) -> int | None:
    """A ``CK_ULONG``. Raises what `octets` does."""
    value = octets(session, item, name)
    return None if value is None else ulong(value)


def ulong(value: bytes) -> int | None:
    """The number in a ``CK_ULONG``; None for another size and ``CK_UNAVAILABLE_INFORMATION``."""
    if len(value) != ctypes.sizeof(ctypes.c_ulong) or not value.strip(b"\xff"):
        return None
    return int(ctypes.c_ulong.from_buffer_copy(value).value)


def text(session: Session, item: int, name: int) -> str | None:
    """A text; bytes that are no UTF-8 become surrogates. Raises what `octets` does."""
    value = octets(session, item, name)
    return None if value is None else value.decode("utf-8", "surrogateescape")

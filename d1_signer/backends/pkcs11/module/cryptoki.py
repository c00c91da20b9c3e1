# SPDX-License-Identifier: Apache-2.0
"""The C calls of PKCS#11, through ctypes, on the module that python-pkcs11 has loaded.

The binding promises the module a single thread, holds the GIL in `C_Finalize`, leaks the session
whose login fails, makes a third call for each signature, fails where one of many attributes or
slots cannot be read, loses bytes that are not UTF-8, and does not tell which call failed. So they
are made here, in `token` and in `session.session`. PKCS#11 v2.40 base specification, section 5.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkcs11 import _pkcs11, exceptions as sdk

from d1_signer.backends.pkcs11.returns import Ckr, check, error_of
from d1_signer.secret import Secret

CKF_OS_LOCKING_OK = 0x2
CHECK_MODULE = (
    "Check the path (module-path of the key URI, or --option module_path), the file's "
    "architecture, and the libraries that it needs."
)
_OK = 0  # a plain number: it is compared twice in each signature

_LOGGED_IN_STATES = frozenset({1, 3})  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS

_CKM_ECDSA = 0x1041
_DIGEST_LENGTH = 32
_LONGEST_SIGNATURE = 128  # 64 are expected; a module that gives more is refused by its caller
_ROOM = 8192  # for one that wants more room than it uses


def structure(name: str, **fields: Any) -> Any:
    """A C structure with these fields, in their order."""
    packed = {"_pack_": 1} if sys.platform == "win32" else {}  # PKCS#11 section 2.1
    return type(name, (ctypes.Structure,), {**packed, "_fields_": list(fields.items())})


Version = structure("CK_VERSION", major=ctypes.c_ubyte, minor=ctypes.c_ubyte)
_InitializeArguments = structure(
    "CK_C_INITIALIZE_ARGS",
    create_mutex=ctypes.c_void_p,
    destroy_mutex=ctypes.c_void_p,
    lock_mutex=ctypes.c_void_p,
    unlock_mutex=ctypes.c_void_p,
    flags=ctypes.c_ulong,
    reserved=ctypes.c_char_p,
)
_Info = structure(
    "CK_INFO",
    cryptoki_version=Version,
    manufacturer=ctypes.c_char * 32,
    flags=ctypes.c_ulong,
    description=ctypes.c_char * 32,
    library_version=Version,
)
_SessionInfo = structure(
    "CK_SESSION_INFO",
    slot=ctypes.c_ulong,
    state=ctypes.c_ulong,
    flags=ctypes.c_ulong,
    device_error=ctypes.c_ulong,
)
# The first entries of CK_FUNCTION_LIST, in the order of the specification.
_FunctionList = structure("CK_FUNCTION_LIST", version=Version, functions=ctypes.c_void_p * 60)
_Mechanism = structure(
    "CK_MECHANISM", mechanism=ctypes.c_ulong, parameter=ctypes.c_void_p, length=ctypes.c_ulong
)

_INITIALIZE, _FINALIZE, _GET_INFO = 0, 1, 2
_GET_SESSION_INFO, _LOGIN = 15, 18
_SIGN_INIT, _SIGN = 42, 43


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryInfo:
    """What a module says of itself (``CK_INFO``)."""

    manufacturer: str
    description: str
    version: tuple[int, int]
    cryptoki_version: tuple[int, int]


class Cryptoki:
    """A loaded module's function list.

    Attributes:
        address: Where it is; another list at another address is another instance of the module.
        code: Where its ``C_Initialize`` is.
    """

    def __init__(self, path: str, binding: Any) -> None:
        """Take the list that python-pkcs11's object of the module uses.

        A list of its own would not do: each that p11-kit's client gives out is a connection, to be
        initialised by itself.

        Raises:
            pkcs11.PKCS11Error: The module gives no list.
        """
        address = _list_of(binding)
        if address is None:
            self._library = ctypes.CDLL(path)  # kept: the list lives as long as it does
            pointer = ctypes.c_void_p()
            check(self._library.C_GetFunctionList(ctypes.byref(pointer)), "C_GetFunctionList")
            address = pointer.value or 0
        self.address = address
        self._arguments: dict[tuple[bool, str | None], Any] = {}
        self._functions = _FunctionList.from_address(address).functions
        number, text, at = ctypes.c_ulong, ctypes.c_char_p, ctypes.c_void_p
        self.code: int = self._functions[_INITIALIZE]
        self._initialize = self.function(_INITIALIZE, at)
        self._finalize = self.function(_FINALIZE, at)
        self._get_info = self.function(_GET_INFO, at)
        self._get_session_info = self.function(_GET_SESSION_INFO, number, at)
        self._login = self.function(_LOGIN, number, number, text, number)
        self._sign_init = self.function(_SIGN_INIT, number, at, number)
        self._sign = self.function(_SIGN, number, text, number, at, at)

    def function(self, place: int, *arguments: type) -> Callable[..., int]:
        """A function of the list; one that the module left out answers that it is not supported.

        Args:
            place: Its place in ``CK_FUNCTION_LIST``.
            *arguments: The types of its arguments.
        """
        address = self._functions[place]
        if not address:
            return lambda *_: Ckr.FUNCTION_NOT_SUPPORTED
        return ctypes.CFUNCTYPE(ctypes.c_ulong, *arguments)(address)

    def initialize(self, *, os_locking: bool, reserved: str | None) -> int:
        """Call ``C_Initialize``; returns its ``CK_RV``."""
        if not os_locking and reserved is None:
            return int(self._initialize(None))
        # Kept for ever, since some modules keep the pointer and look at it again (OpenSC#2170).
        arguments = self._arguments.setdefault(
            (os_locking, reserved),
            _InitializeArguments(
                flags=CKF_OS_LOCKING_OK if os_locking else 0,
                reserved=None if reserved is None else reserved.encode(),
            ),
        )
        return int(self._initialize(ctypes.byref(arguments)))

    def finalize(self) -> int:
        """Call ``C_Finalize``; returns its ``CK_RV``."""
        return int(self._finalize(None))

    def signer(
        self, session: int, key: int, log_in: Callable[[], None] | None
    ) -> Callable[[bytes], bytes]:
        """A function that signs under a key, for one thread at a time.

        It takes a digest of 32 bytes, returns r||s, and raises `pkcs11.PKCS11Error`. Made once, so
        that a signature is two calls and nothing else.

        Args:
            session: Its handle.
            key: The private key's handle.
            log_in: Called between the two, for a key that wants a login with each signature.
        """
        begin, sign = self._sign_init, self._sign
        mechanism = _Mechanism(mechanism=_CKM_ECDSA)
        buffer = ctypes.create_string_buffer(_LONGEST_SIGNATURE)
        length = ctypes.c_ulong()
        to_mechanism, to_length = ctypes.pointer(mechanism), ctypes.pointer(length)

        def signature(digest: bytes) -> bytes:
            length.value = _LONGEST_SIGNATURE
            code = begin(session, to_mechanism, key)
            if code != _OK:
                raise error_of(code, "C_SignInit")
            if log_in is not None:
                log_in()
            code = sign(session, digest, _DIGEST_LENGTH, buffer, to_length)
            if code == _OK:
                return buffer.raw[: length.value]
            if code == Ckr.BUFFER_TOO_SMALL:
                return roomy(digest)
            raise error_of(code, "C_Sign")

        def roomy(digest: bytes) -> bytes:
            # The operation is still active (section 5.2). Not every module tells what it wants.
            buffer = ctypes.create_string_buffer(_ROOM)
            length = ctypes.c_ulong(_ROOM)
            check(sign(session, digest, _DIGEST_LENGTH, buffer, ctypes.byref(length)), "C_Sign")
            return buffer.raw[: length.value]

        return signature

    def info(self) -> LibraryInfo:
        """Call ``C_GetInfo``."""
        info = _Info()
        check(self._get_info(ctypes.byref(info)), "C_GetInfo")
        return LibraryInfo(
            manufacturer=unpadded(info.manufacturer),
            description=unpadded(info.description),
            version=(info.library_version.major, info.library_version.minor),
            cryptoki_version=(info.cryptoki_version.major, info.cryptoki_version.minor),
        )

    def login(self, session: int, user_type: int, pin: Secret | None) -> None:
        """Call ``C_Login``; without a PIN, the token asks for it itself (PIN pad).

        Raises:
            pkcs11.PKCS11Error: The login failed; the session is still open.
        """
        if pin is None:
            code = self._login(session, user_type, None, 0)
        else:
            try:
                encoded = pin.reveal().encode()
                code = self._login(session, user_type, encoded, len(encoded))
            finally:
                encoded = b""  # an error keeps this frame, a signal handler's one too
        check(code, "C_Login")

    def logged_in(self, session: int) -> bool:
        """Whether the session's token has its user logged in, by ``C_GetSessionInfo``."""
        info = _SessionInfo()
        check(self._get_session_info(session, ctypes.byref(info)), "C_GetSessionInfo")
        return int(info.state) in _LOGGED_IN_STATES


def loaded(path: str) -> tuple[Any, Cryptoki]:
    """Load a module: python-pkcs11's object for it, and ours on the same function list.

    Raises:
        pkcs11.PKCS11Error: It cannot be loaded.
    """
    _load(path)
    # Without the binding's __init__, which would call C_Initialize(NULL): a private path, which the
    # tests pin.
    binding = _pkcs11.lib.__new__(_pkcs11.lib, path)  # type: ignore[call-arg]
    return binding, Cryptoki(path, binding)


def _load(path: str) -> None:
    """Load a module's file and see that it gives a function list.

    The binding does both with the GIL held, and takes what it is given: a library that hangs while
    it is loaded would stop every thread, and a list that is none would end the process. So does
    `ctypes.CDLL` hold it (Python 3.11); a C function that is called through ctypes does not.

    Raises:
        pkcs11.PKCS11Error: It cannot be loaded, or gives no list.
    """
    try:
        if "/" in path and not stat.S_ISREG(Path(path).stat().st_mode):
            raise sdk.PKCS11Error("it is no regular file")
    except OSError as failure:
        raise sdk.PKCS11Error(failure.strerror) from None
    system = ctypes.CDLL(None)
    load, reason = system.dlopen, system.dlerror
    load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    reason.restype = ctypes.c_char_p
    handle = load(os.fsencode(path), os.RTLD_NOW | os.RTLD_LOCAL)
    if not handle:
        raise sdk.PKCS11Error((reason() or b"").decode(errors="backslashreplace"))
    get = getattr(ctypes.CDLL(path, handle=handle), "C_GetFunctionList", None)
    if get is None:
        raise sdk.PKCS11Error("it has no C_GetFunctionList")
    get.restype = ctypes.c_ulong
    pointer = ctypes.c_void_p()
    check(get(ctypes.byref(pointer)), "C_GetFunctionList")
    if not pointer.value:
        raise sdk.PKCS11Error("C_GetFunctionList answers CKR_OK and gives no list")


def place_of_list(binding: Any) -> Any:
    """Where python-pkcs11's object holds its function list; None where it looks otherwise.

    Such an object is a C structure of three pointers, of which only the first, the list of v2.40,
    is set when the object is made without its ``__init__``. The binding shows none of them.
    """
    pointers = ctypes.c_void_p * 3
    base = _pkcs11.lib.__mro__[1]
    if base.__basicsize__ != object.__basicsize__ + ctypes.sizeof(pointers):
        return None
    place = id(binding) + object.__basicsize__
    first, *others = pointers.from_address(place)
    known = first is not None and others == [None, None]
    return ctypes.c_void_p.from_address(place) if known else None


def _list_of(binding: Any) -> int | None:
    """Address of the function list in python-pkcs11's object."""
    place = place_of_list(binding)
    return None if place is None else place.value


def unpadded(field: bytes) -> str:
    """The text of a field that is filled up, with blanks by the standard, with NUL by others.

    Bytes that are no UTF-8 become surrogates (PEP 383), as in `Pkcs11Uri`.
    """
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape").rstrip(" ")


def shown(text: str) -> str:
    """A text of `unpadded` for people and documents, with other bytes as numbers."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

# SPDX-License-Identifier: Apache-2.0
"""The few C calls of PKCS#11 that python-pkcs11 does not make as needed here, through ctypes.

`C_Initialize` with arguments (the binding promises the module a single thread), `C_Finalize`
without holding the GIL, `C_GetSlotInfo` of one slot after the other (the binding gives up at the
first that fails), `C_Login` on a session that is closed when the login fails (the binding leaks
it), `C_GetSessionInfo`, and `C_SignInit` and `C_Sign` without the binding's third call for the
length and its 15 µs. PKCS#11 v2.40 base specification, sections 5.4 to 5.6 and 5.11.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pkcs11 import _pkcs11, exceptions as sdk

CKF_OS_LOCKING_OK = 0x2
CKR_OK = 0x0
CKR_ARGUMENTS_BAD = 0x7
CKR_NEED_TO_CREATE_THREADS = 0x9
CKR_CANT_LOCK = 0xA
CKR_BUFFER_TOO_SMALL = 0x150
CKR_CRYPTOKI_NOT_INITIALIZED = 0x190
CKR_CRYPTOKI_ALREADY_INITIALIZED = 0x191

_LOGGED_IN_STATES = frozenset({1, 3})  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS

_CKM_ECDSA = 0x1041
_DIGEST_LENGTH = 32
_SLOT_LISTS = 10  # tries, where the list grows between two calls
_LONGEST_SLOT_INFO = 256  # CK_SLOT_INFO has 104 octets
_LONGEST_SIGNATURE = 128  # 64 are expected; a module that gives more is refused by its caller

# What the calls made here may answer; python-pkcs11's own table is not reachable from Python.
_ERRORS: dict[int, type[sdk.PKCS11Error]] = {
    0x02: sdk.HostMemory,
    0x03: sdk.SlotIDInvalid,
    0x05: sdk.GeneralError,
    0x06: sdk.FunctionFailed,
    0x07: sdk.ArgumentsBad,
    0x20: sdk.DataInvalid,
    0x21: sdk.DataLenRange,
    0x30: sdk.DeviceError,
    0x31: sdk.DeviceMemory,
    0x32: sdk.DeviceRemoved,
    0x50: sdk.FunctionCancelled,
    0x54: sdk.FunctionNotSupported,
    0x60: sdk.KeyHandleInvalid,
    0x63: sdk.KeyTypeInconsistent,
    0x70: sdk.MechanismInvalid,
    0x71: sdk.MechanismParamInvalid,
    0x82: sdk.ObjectHandleInvalid,
    0x90: sdk.OperationActive,
    0x91: sdk.OperationNotInitialized,
    0xA0: sdk.PinIncorrect,
    0xA1: sdk.PinInvalid,
    0xA2: sdk.PinLenRange,
    0xA3: sdk.PinExpired,
    0xA4: sdk.PinLocked,
    0xB0: sdk.SessionClosed,
    0xB3: sdk.SessionHandleInvalid,
    0xE0: sdk.TokenNotPresent,
    0xE1: sdk.TokenNotRecognised,
    0x100: sdk.UserAlreadyLoggedIn,
    0x101: sdk.UserNotLoggedIn,
    0x102: sdk.UserPinNotInitialized,
    0x104: sdk.AnotherUserAlreadyLoggedIn,
    0x105: sdk.UserTooManyTypes,
}


def _structure(name: str, **fields: Any) -> Any:
    packed = {"_pack_": 1} if sys.platform == "win32" else {}  # PKCS#11 section 2.1
    return type(name, (ctypes.Structure,), {**packed, "_fields_": list(fields.items())})


_Version = _structure("CK_VERSION", major=ctypes.c_ubyte, minor=ctypes.c_ubyte)
_InitializeArguments = _structure(
    "CK_C_INITIALIZE_ARGS",
    create_mutex=ctypes.c_void_p,
    destroy_mutex=ctypes.c_void_p,
    lock_mutex=ctypes.c_void_p,
    unlock_mutex=ctypes.c_void_p,
    flags=ctypes.c_ulong,
    reserved=ctypes.c_char_p,
)
_Info = _structure(
    "CK_INFO",
    cryptoki_version=_Version,
    manufacturer=ctypes.c_char * 32,
    flags=ctypes.c_ulong,
    description=ctypes.c_char * 32,
    library_version=_Version,
)
_SessionInfo = _structure(
    "CK_SESSION_INFO",
    slot=ctypes.c_ulong,
    state=ctypes.c_ulong,
    flags=ctypes.c_ulong,
    device_error=ctypes.c_ulong,
)
# The first entries of CK_FUNCTION_LIST, in the order of the specification.
_FunctionList = _structure("CK_FUNCTION_LIST", version=_Version, functions=ctypes.c_void_p * 44)
_Mechanism = _structure(
    "CK_MECHANISM", mechanism=ctypes.c_ulong, parameter=ctypes.c_void_p, length=ctypes.c_ulong
)

_INITIALIZE, _FINALIZE, _GET_INFO = 0, 1, 2
_GET_SLOT_LIST, _GET_SLOT_INFO = 4, 5
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
        listing: Held while the binding asks for slots; see `slots`.
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
            _check(self._library.C_GetFunctionList(ctypes.byref(pointer)))
            address = pointer.value or 0
        self.address = address
        functions = _FunctionList.from_address(address).functions
        handle, pin = ctypes.c_ulong, ctypes.c_char_p
        self.code: int = functions[_INITIALIZE]
        self._initialize = _function(functions[_INITIALIZE], ctypes.c_void_p)
        self._finalize = _function(functions[_FINALIZE], ctypes.c_void_p)
        self._get_info = _function(functions[_GET_INFO], ctypes.c_void_p)
        self._get_session_info = _function(functions[_GET_SESSION_INFO], handle, ctypes.c_void_p)
        self._login = _function(functions[_LOGIN], handle, ctypes.c_ulong, pin, ctypes.c_ulong)
        at = ctypes.c_void_p
        self._sign_init = _function(functions[_SIGN_INIT], handle, at, handle)
        self._sign = _function(functions[_SIGN], handle, pin, ctypes.c_ulong, at, at)
        self._get_slot_list = _function(functions[_GET_SLOT_LIST], ctypes.c_ubyte, at, at)
        self._get_slot_info = _function(functions[_GET_SLOT_INFO], handle, at)
        self.listing = threading.Lock()
        self._arguments: dict[tuple[bool, str | None], Any] = {}

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
            if log_in is not None and code == CKR_OK:
                log_in()
            if code == CKR_OK:
                code = sign(session, digest, _DIGEST_LENGTH, buffer, to_length)
            if code != CKR_OK:
                raise error_of(code)
            return buffer.raw[: length.value]

        return signature

    def info(self) -> LibraryInfo:
        """Call ``C_GetInfo``."""
        info = _Info()
        _check(self._get_info(ctypes.byref(info)))
        return LibraryInfo(
            manufacturer=_padded(info.manufacturer),
            description=_padded(info.description),
            version=(info.library_version.major, info.library_version.minor),
            cryptoki_version=(info.cryptoki_version.major, info.cryptoki_version.minor),
        )

    def slots(self) -> tuple[list[int], dict[int, sdk.PKCS11Error]]:
        """The slots with a token that tell about themselves, and what the others answer.

        Calls ``C_GetSlotList``, again where the list has grown meanwhile, and ``C_GetSlotInfo``.

        Raises:
            pkcs11.PKCS11Error: There is no list.
        """
        count = ctypes.c_ulong()
        code, ids, tries = CKR_BUFFER_TOO_SMALL, (ctypes.c_ulong * 0)(), _SLOT_LISTS
        while code == CKR_BUFFER_TOO_SMALL and tries:
            _check(self._get_slot_list(1, None, ctypes.byref(count)))
            ids = (ctypes.c_ulong * count.value)()
            code = self._get_slot_list(1, ids, ctypes.byref(count))
            tries -= 1
        _check(code)
        answers = {slot: self._slot_answer(slot) for slot in ids[: count.value]}
        silent = {slot: error_of(code) for slot, code in answers.items() if code != CKR_OK}
        return [slot for slot in answers if slot not in silent], silent

    def _slot_answer(self, slot: int) -> int:
        code = int(self._get_slot_info(slot, ctypes.create_string_buffer(_LONGEST_SLOT_INFO)))
        if code == CKR_CRYPTOKI_NOT_INITIALIZED:
            raise error_of(code)  # the module's own state, not the slot's
        return code

    def login(self, session: int, user_type: int, pin: str | None) -> None:
        """Call ``C_Login``; without a PIN, the token asks for it itself (PIN pad).

        Raises:
            pkcs11.PKCS11Error: The login failed; the session is still open.
        """
        if pin is None:
            code = self._login(session, user_type, None, 0)
        else:
            encoded = pin.encode()
            code = self._login(session, user_type, encoded, len(encoded))
            del encoded
        del pin  # the error below keeps this frame, and with it every name in it
        _check(code)

    def logged_in(self, session: int) -> bool:
        """Whether the session's token has its user logged in, by ``C_GetSessionInfo``."""
        info = _SessionInfo()
        _check(self._get_session_info(session, ctypes.byref(info)))
        return int(info.state) in _LOGGED_IN_STATES


def loaded(path: str) -> tuple[Any, Cryptoki]:
    """Load a module: python-pkcs11's object for it, and ours on the same function list.

    Raises:
        pkcs11.PKCS11Error: It cannot be loaded.
    """
    # Without the binding's __init__, which would call C_Initialize(NULL): a private path, which the
    # tests pin.
    binding = _pkcs11.lib.__new__(_pkcs11.lib, path)  # type: ignore[call-arg]
    return binding, Cryptoki(path, binding)


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


def handle(item: Any) -> int:
    """The handle of one of the binding's sessions or objects."""
    number: int = item.handle
    return number


def error_of(code: int) -> sdk.PKCS11Error:
    """The binding's exception for a return value."""
    if code == CKR_CRYPTOKI_NOT_INITIALIZED:
        return sdk.PKCS11Error("Cryptoki is not initialized")
    kind = _ERRORS.get(code)
    return kind() if kind else sdk.PKCS11Error(f"Unmapped error code {code:#x}")


def _check(code: int) -> None:
    if code != CKR_OK:
        raise error_of(code)


def _function(address: int, *arguments: type) -> ctypes._FuncPointer:
    return ctypes.CFUNCTYPE(ctypes.c_ulong, *arguments)(address)


def _padded(text: bytes) -> str:
    return text.decode("utf-8", "replace").rstrip(" \0")

# SPDX-License-Identifier: Apache-2.0
"""A session on a token: finding objects, reading their attributes, making a pair.

PKCS#11 v2.40 base specification, sections 5.6, 5.7 and 5.13. The caller is inside the module (see
`life.Module.run`), and a session is used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping

from pkcs11 import Attribute, ObjectClass, exceptions as sdk

from d1_signer.backends.pkcs11.failures import impossible
from d1_signer.backends.pkcs11.module.cryptoki import structure
from d1_signer.backends.pkcs11.module.token import Token
from d1_signer.backends.pkcs11.returns import Ckr, check, error_of

_OPEN_SESSION, _CLOSE_SESSION = 12, 13
_DESTROY_OBJECT, _GET_ATTRIBUTE_VALUE = 22, 24
_FIND_OBJECTS_INIT, _FIND_OBJECTS, _FIND_OBJECTS_FINAL = 26, 27, 28
_GENERATE_KEY_PAIR = 59

_CKF_RW_SESSION, _CKF_SERIAL_SESSION = 0x2, 0x4
_CKM_EC_KEY_PAIR_GEN = 0x1040
_AT_ONCE = 32  # objects that a search is asked for
_MOST = 4096  # a module that goes on telling objects after so many tells them again
_NO_OBJECT = 0  # CK_INVALID_HANDLE
_LONGEST = 1 << 16  # of an attribute; CK_UNAVAILABLE_INFORMATION, of 4 and of 8 bytes, is more
_LOOKS = 3  # at an attribute that grows between the question for its length and the answer

_ULONG, _AT = ctypes.c_ulong, ctypes.c_void_p

_Attribute = structure("CK_ATTRIBUTE", type=_ULONG, value=_AT, length=_ULONG)
_Mechanism = structure("CK_MECHANISM", mechanism=_ULONG, parameter=_AT, length=_ULONG)

_Value = bool | int | str | bytes
Template = Mapping[Attribute, _Value]


class Session:
    """An open session.

    Attributes:
        token: The token that it is on.
    """

    def __init__(self, token: Token, *, rw: bool = False) -> None:
        """Open it.

        Raises:
            pkcs11.PKCS11Error: The token gives none.
        """
        self.token = token
        self._handle = _ULONG()
        self._open = False
        begin = self._function(_OPEN_SESSION, _ULONG, _ULONG, _AT, _AT, _AT)
        flags = _CKF_SERIAL_SESSION | (_CKF_RW_SESSION if rw else 0)
        try:
            code = begin(token.slot_id, flags, None, None, ctypes.byref(self._handle))
            self._open = code == Ckr.OK
            check(code, "C_OpenSession")
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> int:
        """Its ``CK_SESSION_HANDLE``."""
        return int(self._handle.value)

    def close(self) -> None:
        """Close it; calling it again does nothing.

        Raises:
            pkcs11.PKCS11Error: It is dead already.
        """
        is_open, self._open = self._open, False
        if is_open:
            check(self._function(_CLOSE_SESSION, _ULONG)(self._handle), "C_CloseSession")

    def find(
        self, kind: ObjectClass, *, label: str | None = None, key_id: bytes | None = None
    ) -> list[int]:
        """The handles of all objects of a class with this label and id.

        Raises:
            pkcs11.PKCS11Error: They cannot be had.
            SignerError: The module tells more than it was asked for, or no handle.
        """
        wanted: dict[Attribute, int | str | bytes] = {Attribute.CLASS: kind}
        if label is not None:
            wanted[Attribute.LABEL] = label
        if key_id is not None:
            wanted[Attribute.ID] = key_id
        begin = self._function(_FIND_OBJECTS_INIT, _ULONG, _AT, _ULONG)
        end = self._function(_FIND_OBJECTS_FINAL, _ULONG)
        template, _kept = _packed(wanted)
        check(begin(self._handle, template, len(template)), "C_FindObjectsInit")
        try:
            return self._found()
        finally:
            end(self._handle)  # where it fails, so does the next call

    def _found(self) -> list[int]:
        more = self._function(_FIND_OBJECTS, _ULONG, _AT, _ULONG, _AT)
        handles, count = (_ULONG * _AT_ONCE)(), _ULONG()
        found: dict[int, None] = {}
        while len(found) < _MOST:
            check(more(self._handle, handles, _AT_ONCE, ctypes.byref(count)), "C_FindObjects")
            if count.value > _AT_ONCE:
                text = f"{count.value:#x} objects where {_AT_ONCE} were asked for"
                raise impossible("C_FindObjects", text)
            fresh = dict.fromkeys(list(handles)[: count.value])
            if _NO_OBJECT in fresh:
                raise impossible("C_FindObjects", "an object of handle 0")
            if fresh.keys() <= found.keys():
                break
            found |= fresh
        return list(found)

    def attribute(self, item: int, name: int) -> bytes:
        """Read an attribute.

        Raises:
            pkcs11.PKCS11Error: The module does not tell it.
        """
        get = self._function(_GET_ATTRIBUTE_VALUE, _ULONG, _ULONG, _AT, _ULONG)
        asked = _Attribute(type=name)
        code = int(Ckr.OK)
        for _ in range(_LOOKS):
            asked.value, asked.length = None, 0
            code = get(self._handle, item, ctypes.byref(asked), 1)
            if code not in {Ckr.OK, Ckr.BUFFER_TOO_SMALL} or asked.length > _LONGEST:
                break
            room = int(asked.length)
            buffer = ctypes.create_string_buffer(room + 1)
            asked.value = ctypes.addressof(buffer)
            code = get(self._handle, item, ctypes.byref(asked), 1)
            if code == Ckr.OK and asked.length <= room:
                return buffer.raw[: asked.length]
        # CKR_OK beside a length that says "unavailable" is not allowed (section 5.7.5).
        code = code if code != Ckr.OK else Ckr.ATTRIBUTE_TYPE_INVALID
        raise error_of(code, "C_GetAttributeValue")

    def generate_pair(self, public: Template, private: Template) -> tuple[int, int]:
        """Make an EC key pair; returns the handles of the public and of the private key.

        Raises:
            pkcs11.PKCS11Error: The token does not make it.
        """
        make = self._function(_GENERATE_KEY_PAIR, _ULONG, _AT, _AT, _ULONG, _AT, _ULONG, _AT, _AT)
        mechanism = _Mechanism(mechanism=_CKM_EC_KEY_PAIR_GEN)
        of_public, _kept = _packed(public)
        of_private, _kept_too = _packed(private)
        made = _ULONG(), _ULONG()
        code = make(
            self._handle,
            ctypes.byref(mechanism),
            of_public,
            len(of_public),
            of_private,
            len(of_private),
            ctypes.byref(made[0]),
            ctypes.byref(made[1]),
        )
        check(code, "C_GenerateKeyPair")
        return int(made[0].value), int(made[1].value)

    def destroy(self, item: int) -> None:
        """Remove an object from the token.

        Raises:
            pkcs11.PKCS11Error: It is still there.
        """
        destroy = self._function(_DESTROY_OBJECT, _ULONG, _ULONG)
        check(destroy(self._handle, item), "C_DestroyObject")

    def _function(self, place: int, *arguments: type) -> Callable[..., int]:
        return self.token.cryptoki.function(place, *arguments)


@contextlib.contextmanager
def session_on(token: Token, *, rw: bool = False) -> Iterator[Session]:
    """A session that is closed; that a dead one cannot be closed does not hide why it died."""
    session = Session(token, rw=rw)
    try:
        yield session
    finally:
        with contextlib.suppress(sdk.PKCS11Error):
            session.close()


def _packed(template: Template) -> tuple[ctypes.Array[ctypes.Structure], list[object]]:
    """An array of ``CK_ATTRIBUTE``, and what its pointers lead to: to be kept as long as it."""
    values = [_bytes_of(value) for value in template.values()]
    buffers = [ctypes.create_string_buffer(value, len(value) or 1) for value in values]
    array = (_Attribute * len(template))()
    for place, name in enumerate(template):
        array[place].type = name
        array[place].value = ctypes.addressof(buffers[place])
        array[place].length = len(values[place])
    return array, list(buffers)


def _bytes_of(value: _Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return bytes(ctypes.c_ubyte(value) if isinstance(value, bool) else _ULONG(value))

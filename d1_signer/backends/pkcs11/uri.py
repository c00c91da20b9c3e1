# SPDX-License-Identifier: Apache-2.0
"""PKCS#11 URIs, read strictly by RFC 7512. Pure code.

Every attribute of the RFC is understood; an unknown one is refused unless it has the vendor prefix
``x-`` (section 2.3), since a misspelt ``objct=`` would otherwise select another key.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from urllib.parse import quote, unquote_to_bytes

from d1_signer.errors import KeyUriError
from d1_signer.secret import Secret

# RFC 7512 section 2.3: pk11-pchar and pk11-qchar.
_UNRESERVED = r"A-Za-z0-9\-._~"
_PATH_VALUE = re.compile(rf"(?:[{_UNRESERVED}:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{{2}})*")
_QUERY_VALUE = re.compile(rf"(?:[{_UNRESERVED}:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{{2}})*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")

_TEXTS = {
    "token",
    "manufacturer",
    "serial",
    "model",
    "object",
    "type",
    "slot-manufacturer",
    "slot-description",
    "library-manufacturer",
    "library-description",
}
_PATH_NAMES = _TEXTS | {"id", "slot-id", "library-version"}
_QUERY_NAMES = {"module-path", "module-name", "pin-source", "pin-value"}
_TOKEN_NAMES = ("token", "manufacturer", "serial", "model")


class PinInUriWarning(UserWarning):
    """A key URI holds the PIN itself, which shows in process lists, histories and logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pkcs11Uri:
    """A PKCS#11 URI; an attribute that is None was not given and matches everything.

    Attributes:
        texts: Path attributes that are text, by their RFC name: ``token``, ``manufacturer``,
            ``serial``, ``model``, ``object``, ``slot-manufacturer``, ``slot-description``,
            ``library-manufacturer``, ``library-description``. Bytes that are no UTF-8, as in a
            label that was cut, are surrogates (PEP 383), so that bytes are compared.
        id: ``CKA_ID``, bytes.
        slot_id: Slot number.
        library_version: Major and minor; the minor is None where only the major was given.
        module_path: File of the PKCS#11 module.
        module_name: Name of the module, such as ``softhsm2``.
        pin_source: Secret source of the PIN.
        pin_value: The PIN itself; discouraged.
    """

    texts: dict[str, str] = field(default_factory=dict)
    id: bytes | None = None
    slot_id: int | None = None
    library_version: tuple[int, int | None] | None = None
    module_path: str | None = None
    module_name: str | None = None
    pin_source: str | None = None
    pin_value: Secret | None = None

    @classmethod
    def parse(cls, uri: str) -> Pkcs11Uri:
        """Read a URI without a fragment.

        Raises:
            KeyUriError: Not a PKCS#11 URI by RFC 7512, an unknown or repeated attribute, both a
                PIN and a source for it, or an object that is no private key.
        """
        scheme, _, rest = uri.partition(":")
        if scheme.lower() != "pkcs11":
            raise KeyUriError("The key URI does not begin with pkcs11:.")
        path_text, mark, query_text = rest.partition("?")
        path = _attributes(path_text, ";", _PATH_NAMES, _PATH_VALUE)
        query = _attributes(query_text, "&", _QUERY_NAMES, _QUERY_VALUE) if mark else {}
        if "pin-source" in query and "pin-value" in query:
            raise KeyUriError(
                "The key URI has both pin-source and pin-value.", hint="Keep pin-source only."
            )
        texts = {
            name: path[name].decode("utf-8", "surrogateescape") for name in path if name in _TEXTS
        }
        if texts.pop("type", "private") != "private":
            raise KeyUriError(
                "The key URI's type is not private.", hint="Leave type out, or write type=private."
            )
        pin = query.get("pin-value")
        if pin is not None:
            _warn_of_pin()
        values = {name: _text(name, query[name]) for name in query if name != "pin-value"}
        return cls(
            texts=texts,
            id=path.get("id"),
            slot_id=_slot_id(path.get("slot-id")),
            library_version=_version(path.get("library-version")),
            module_path=values.get("module-path"),
            module_name=values.get("module-name"),
            pin_source=values.get("pin-source"),
            pin_value=None if pin is None else Secret(_text("pin-value", pin)),
        )

    @property
    def object(self) -> str | None:
        """``CKA_LABEL`` of the key."""
        return self.texts.get("object")

    def location(self, key_id: bytes | None = None) -> str:
        """The URI without its query, with the key's id where it is known."""
        items = [f"{name}={_quoted(value)}" for name, value in self.texts.items()]
        if self.slot_id is not None:
            items.append(f"slot-id={self.slot_id}")
        if (found := self.id if self.id is not None else key_id) is not None:
            items.append(id_in_uri(found))
        return "pkcs11:" + ";".join(items)

    def token_location(self) -> str:
        """What the URI says about the token alone, for error texts."""
        items = [
            f"{name}={_quoted(self.texts[name])}" for name in _TOKEN_NAMES if name in self.texts
        ]
        if self.slot_id is not None:
            items.append(f"slot-id={self.slot_id}")
        return "pkcs11:" + ";".join(items)

    def generated(self, key_id: bytes) -> str:
        """The URI of a key that was just made with this id: as given, but without a PIN."""
        query = {
            "module-path": self.module_path,
            "module-name": self.module_name,
            "pin-source": self.pin_source,
        }
        items = [f"{name}={quote(value, safe='/:')}" for name, value in query.items() if value]
        return self.location(key_id) + ("?" + "&".join(items) if items else "")


def id_in_uri(key_id: bytes) -> str:
    """An id as it is written in a URI."""
    return "id=" + "".join(f"%{octet:02X}" for octet in key_id)


def _attributes(
    text: str, separator: str, known: set[str], value_form: re.Pattern[str]
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for item in text.split(separator) if text else []:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise KeyUriError(
                "The key URI is not made of name=value.",
                hint=f"RFC 7512: attributes are separated by {separator}, with none empty.",
            )
        vendor = name.startswith("x-")
        if name not in known and not vendor:
            raise KeyUriError(
                f"The key URI has an attribute that RFC 7512 does not know here: {name[:40]}.",
                hint=f"Known here: {', '.join(sorted(known))}.",
            )
        if not value_form.fullmatch(value):
            raise KeyUriError(
                f"The key URI's {name[:40]} has a character that must be percent-encoded.",
                hint="RFC 7512 section 2.3: write a blank as %20, a slash in the path as %2F.",
            )
        if name in found and not vendor:
            raise KeyUriError(f"The key URI has {name} twice.")
        if not vendor:
            found[name] = unquote_to_bytes(value)
    return found


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        pass
    # Outside the handler: the decoding error carries the bytes, which may be a PIN.
    raise KeyUriError(f"The key URI's {name} is not UTF-8.")


def _slot_id(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise KeyUriError("The key URI's slot-id is not a decimal number.")
    return int(value)


def _version(value: bytes | None) -> tuple[int, int | None] | None:
    if value is None:
        return None
    match = re.fullmatch(rb"([0-9]{1,3})(?:\.([0-9]{1,3}))?", value)
    if match is None:
        raise KeyUriError("The key URI's library-version is not MAJOR or MAJOR.MINOR.")
    return int(match[1]), None if match[2] is None else int(match[2])


def _quoted(value: str) -> str:
    return quote(value.encode("utf-8", "surrogateescape"), safe="")


def _warn_of_pin() -> None:
    warnings.warn(
        "The key URI holds a PIN (pin-value); name its source instead (pin-source=file:PATH).",
        PinInUriWarning,
        stacklevel=2,
    )

# SPDX-License-Identifier: Apache-2.0
"""Reading key URIs: what every scheme has in common (RFC 3986).

PKCS#11 URIs (RFC 7512) have a grammar of their own, which their backend reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_to_bytes

from d1_signer.errors import KeyUriError
from d1_signer.frames import without_locals
from d1_signer.secret import holds_key

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PIN_VALUE = re.compile(r"((?:p|%70)(?:i|%69)(?:n|%6e)(?:-|%2d)[^=;]*=)[^;&]*", re.IGNORECASE)
_USER = re.compile(r"//[^/]*@")
_PIN_ITSELF = re.compile(r"[?&;]pin-value=", re.IGNORECASE)
# PEM, a JWK, or base64 of DER: a SEQUENCE that begins with the INTEGER 0 or 1, at any alignment
# (RFC 5958 section 2, RFC 5915 section 3).
_LONGEST_SHOWN = 512
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def scheme_of(uri: str) -> str:
    """The scheme in lower case, or ``""`` where there is none."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else ""


def without_secrets(uri: str) -> str:
    """The URI as it may be shown: without query and fragment, user and PIN masked.

    Something else altogether, such as a whole key that was put where its URI belongs, is not shown.
    """
    strange = len(uri) > _LONGEST_SHOWN or not uri.isprintable() or " " in uri or holds_key(uri)
    if strange or not scheme_of(uri):
        return "(not a key URI)"
    shown = re.split(r"[?#]", uri, maxsplit=1)[0]
    return _USER.sub("//****@", _PIN_VALUE.sub(r"\1****", shown))


def holds_pin_itself(uri: str) -> bool:
    """Whether a key URI has a PIN in it, and not where it comes from."""
    return _PIN_ITSELF.search(unquote(uri)) is not None


def split_fragment(uri: str) -> tuple[str, str | None]:
    """Split the fragment off: it names the kid.

    Returns:
        The URI without its fragment, and the fragment percent-decoded (None where there is none).

    Raises:
        KeyUriError: Not a text, or the fragment is not percent-encoded UTF-8.
    """
    if not isinstance(uri, str):
        raise KeyUriError("The key URI is not a text.")
    rest, mark, fragment = uri.partition("#")
    return rest, percent_decode(fragment) if mark else None


def taken_from_query(uri: str, names: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Take those names out of a URI's query that are for every scheme.

    Returns:
        The URI without them, for its backend, and their values.

    Raises:
        KeyUriError: One stands there twice, or cannot be decoded.
    """
    rest, mark, query = uri.partition("?")
    taken: dict[str, str] = {}
    left = []
    for item in query.split("&"):
        name, _, value = item.partition("=")
        if name not in names:
            left.append(item)
        elif name in taken:
            raise KeyUriError(f"The key URI {without_secrets(uri)} has {name} twice.")
        else:
            taken[name] = percent_decode(value)
    if not taken:
        return uri, taken
    return rest + (mark + "&".join(left) if left else ""), taken


def percent_decode(text: str) -> str:
    """Decode percent-encoding strictly to UTF-8 text.

    Raises:
        KeyUriError: A stray ``%``, or bytes that are not UTF-8.
    """
    if _PERCENT.search(text):
        raise KeyUriError("The key URI has a % that is not followed by two hexadecimal digits.")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeError:  # decoding, or encoding what came from a command line as no UTF-8
        raise KeyUriError("The key URI has bytes that are not UTF-8.") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyUri:
    """A key URI of the form ``scheme://authority/path?name=value&name=value``.

    Attributes:
        scheme: In lower case.
        authority: What stands between ``//`` and the next ``/``; ``""`` where empty or absent.
        path: Percent-decoded, with its leading slash where it has one.
        query: Percent-decoded names and values.
    """

    scheme: str
    authority: str
    path: str
    query: dict[str, str] = field(default_factory=dict)

    @classmethod
    @without_locals
    def parse(cls, uri: str, *, query_names: frozenset[str] = frozenset()) -> KeyUri:
        """Read a key URI strictly.

        Args:
            uri: The URI without its fragment.
            query_names: The query names that the scheme knows.

        Raises:
            KeyUriError: No scheme, an unknown or repeated query name, broken percent-encoding.
        """
        shown = without_secrets(uri)
        scheme = scheme_of(uri)
        if not scheme:
            raise KeyUriError(
                f"The key URI has no scheme: {shown}.",
                hint="It begins with pkcs11:, awskms:, gcpkms:, hashivault: or file:.",
            )
        hierarchical, _, query_text = uri[len(scheme) + 1 :].partition("?")
        authority = ""
        if hierarchical.startswith("//"):
            authority, slash, path = hierarchical[2:].partition("/")
            hierarchical = slash + path
        query: dict[str, str] = {}
        for item in filter(None, query_text.split("&")):
            name, _, value = item.partition("=")
            name = percent_decode(name)
            if name not in query_names:
                known = ", ".join(sorted(query_names)) or "none"
                raise KeyUriError(
                    f"The key URI {shown} has a query name that its scheme does not know.",
                    hint=f"Known here: {known}.",
                )
            if name in query:
                raise KeyUriError(f"The key URI {shown} has {name} twice.")
            query[name] = percent_decode(value)
        return cls(
            scheme=scheme,
            authority=percent_decode(authority),
            path=percent_decode(hierarchical),
            query=query,
        )

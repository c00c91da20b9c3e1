# SPDX-License-Identifier: Apache-2.0
"""JOSE building blocks: base64url, canonical JSON, the JWS signing input and its compact form.

Pure functions at the bottom of the package; both the key side (JWK, thumbprint) and the token side
(JWT) stand on them.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping

_BASE64URL = re.compile(rb"[A-Za-z0-9_-]*", re.ASCII)


def b64url_encode(data: bytes) -> bytes:
    """Encode to base64url without padding (RFC 7515 section 2).

    Args:
        data: Bytes of any length.

    Returns:
        ASCII bytes from the alphabet ``A-Z a-z 0-9 - _``, no ``=``.
    """
    return urlsafe_b64encode(data).rstrip(b"=")


def b64url_decode(text: str | bytes) -> bytes:
    """Decode base64url strictly: no padding, no white space, no non-zero trailing bits.

    Args:
        text: The encoded form, as RFC 7515 section 2 writes it.

    Returns:
        The decoded bytes.

    Raises:
        ValueError: ``text`` is not the one canonical encoding of any byte string.
    """
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    if not _BASE64URL.fullmatch(raw) or len(raw) % 4 == 1:
        msg = "not base64url"
        raise ValueError(msg)
    data = urlsafe_b64decode(raw + b"=" * (-len(raw) % 4))
    if b64url_encode(data) != raw:
        msg = "base64url with stray trailing bits"
        raise ValueError(msg)
    return data


def compact_json(value: Mapping[str, object]) -> bytes:
    """Serialise to JSON without white space, in UTF-8, members in the order given.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot say (RFC 8259 section 6).
        TypeError: A value has no JSON form.
    """
    return json.dumps(
        dict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    ).encode()


def signing_input(protected: bytes, payload: bytes) -> bytes:
    """Build the JWS signing input (RFC 7515 section 5.1, step 8).

    Args:
        protected: The protected header, already base64url-encoded.
        payload: The payload's own bytes, not yet encoded.

    Returns:
        ``protected || "." || base64url(payload)``, in ASCII.
    """
    return protected + b"." + b64url_encode(payload)


def compact(signing_input: bytes, signature: bytes) -> str:
    """Join a signing input and a signature to the JWS compact form (RFC 7515 section 7.1).

    Args:
        signing_input: What was signed.
        signature: The signature's bytes; for ES256 64 bytes, r||s (RFC 7518 section 3.4).
    """
    return (signing_input + b"." + b64url_encode(signature)).decode("ascii")

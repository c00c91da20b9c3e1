# SPDX-License-Identifier: Apache-2.0
"""The secrets that the suite knows, and the forms in which each could show."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

# Shorter values occur by chance in ports, times and lengths.
_SHORTEST = 8
# Different bytes: zeros in hexadecimal stand in many a number.
_LEAST_VARIETY = 4
# Characters of base64 that are the same for all keys on P-256.
_HEADER_OF_PKCS8 = 48
_HEADER_OF_SEC1 = 12

_LEAST_SCALAR = 1 << 128

FOR_ALL_TESTS: set[str] = set()


def known(value: str) -> str:
    """Have all tests watch for a secret that stands in their source; returns it."""
    FOR_ALL_TESTS.update(forms(value))
    return value


def forms(value: object) -> Iterator[str]:
    """As it is, quoted, escaped and in base64; none that is too short or plain to be a find."""
    return (form for form in _forms(value) if len(form) >= _SHORTEST)


def _forms(value: object) -> Iterator[str]:
    raw = value if isinstance(value, bytes) else str(value).encode(errors="replace")
    if len(raw) < _SHORTEST or len(set(raw)) < _LEAST_VARIETY:
        return
    text = raw.decode(errors="replace")
    yield text
    # The signature alone makes an assertion out of claims that may be known.
    if text.count(".") == 2:
        yield text.rpartition(".")[2]
    yield repr(raw)[2:-1]
    yield quote(raw, safe="")
    yield json.dumps(text)[1:-1]
    for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw)):
        yield encoded.rstrip(b"=").decode()


def forms_of_key(key: object) -> Iterator[str]:
    """The scalar of a P-256 key as a number and as bytes, and the lines of its PEM."""
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return
    scalar = key.private_numbers().private_value
    if scalar < _LEAST_SCALAR:
        return  # the key of a test vector
    raw = scalar.to_bytes((key.key_size + 7) // 8)
    yield from (str(scalar), f"{scalar:x}", raw.hex(), *forms(raw))
    for style in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        der = key.private_bytes(Encoding.DER, style, NoEncryption())
        yield from (repr(der)[2:-1], der.hex())
        # What follows the header in the first line of the PEM, which is 64 characters long.
        first = base64.b64encode(der).decode()[:64]
        yield first[_HEADER_OF_PKCS8 if style is PrivateFormat.PKCS8 else _HEADER_OF_SEC1 :]

# SPDX-License-Identifier: Apache-2.0
"""JSON Web Tokens signed with ES256, built by hand (RFC 7519, RFC 7515, RFC 7518). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from d1_signer import jose
from d1_signer.es256 import ALGORITHM


@lru_cache(maxsize=64)
def protected_header(kid: str) -> bytes:
    """The JOSE header of an assertion, base64url-encoded; one per kid, so it is kept.

    Args:
        kid: Key identifier by which D1 selects the public key.

    Returns:
        ``BASE64URL({"alg":"ES256","kid":…,"typ":"JWT"})`` in ASCII.
    """
    header = {"alg": ALGORITHM, "kid": kid, "typ": "JWT"}
    return jose.b64url_encode(jose.compact_json(header))


def signing_input(kid: str, claims: Mapping[str, object]) -> bytes:
    """The bytes that are signed (RFC 7515 section 5.1).

    Args:
        kid: Key identifier.
        claims: JSON-ready claims (RFC 7519 section 4).
    """
    return jose.signing_input(protected_header(kid), jose.compact_json(claims))

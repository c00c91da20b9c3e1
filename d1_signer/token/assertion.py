# SPDX-License-Identifier: Apache-2.0
"""One assertion: claims, signing input, signature, compact form."""

from __future__ import annotations

import secrets
import time

from d1_signer import jose
from d1_signer.events import Use
from d1_signer.secret import Secret
from d1_signer.signing.signer import Signer
from d1_signer.signing.steps import Step
from d1_signer.token import jwt
from d1_signer.token.d1 import MAX_ASSERTION_LIFETIME, AssertionProfile

PURPOSE = "d1-assertion"


def new_jti() -> str:
    """A ``jti`` that no other assertion has."""
    return secrets.token_urlsafe(16)


def sign_assertion(
    signer: Signer,
    profile: AssertionProfile,
    *,
    jti: str | None = None,
    correlation_id: str | None = None,
    clock_offset: float = 0.0,
    timeout: float | None = None,
) -> Secret:
    """Sign a new assertion; each call has a ``jti`` and moments of its own.

    Args:
        signer: Signs, and names the ``kid``.
        profile: What the assertion says.
        jti: Its ``jti``; None: a random one, see `new_jti`.
        correlation_id: Of the request that it is for, which the audit trail keeps with it.
        clock_offset: Seconds by which D1's clock is ahead of it.
        timeout: Seconds to wait for the signature at most; None: the signer's own limit.

    Returns:
        The JWT in compact form. It grants a token to whoever holds it, so it is masked.

    Raises:
        SignerError: The key cannot sign; see `Signer.sign`.
    """
    jti = jti or new_jti()
    now = time.time()
    claims = profile.claims(now=now + clock_offset, jti=jti)
    # However far ahead D1's clock is said to be: no assertion outlives 15 minutes on ours.
    claims["exp"] = min(profile.expiry(now + clock_offset), int(now) + MAX_ASSERTION_LIFETIME)
    unsigned = jwt.signing_input(signer.kid, claims)
    references = [("iss", profile.issuer_id), ("jti", jti)]
    if correlation_id is not None:
        references.append(("correlation_id", correlation_id))
    use = Use(purpose=PURPOSE, references=tuple(references))
    with Step(f"a signature of kid {signer.kid}"):
        signature = signer.sign(unsigned, timeout=timeout, use=use)
    return Secret(jose.compact(unsigned, signature))

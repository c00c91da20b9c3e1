# SPDX-License-Identifier: Apache-2.0
"""From a URI to a key: `open_signer` and `generate_key`.

Plain use::

    from d1_signer import open_signer

    hsm = "pkcs11:token=bank;object=d1?module-path=/usr/lib/softhsm/libsofthsm2.so"
    with open_signer(f"{hsm}&pin-source=file:/etc/d1/pin") as signer:
        signature = signer.sign(b"message")           # 64 bytes, r||s
        signer.public_key.verify(signature, b"message")

A secret never stands in the URI: it comes from ``file:PATH``, ``env:NAME``, or a callable::

    open_signer(hsm, pin_source=lambda: vault.read("d1-pin"))

A backend of your own is a module with ``open_backend(uri, **options)`` that returns a `Backend`,
announced under the entry-point group ``d1_signer.backends`` with the URI scheme as its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from d1_signer.attestation import Statement
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import KeyUriError
from d1_signer.events import Observer, Trail
from d1_signer.frames import without_locals
from d1_signer.signing.backend import GeneratedKey
from d1_signer.signing.key_uri import (
    scheme_of,
    split_fragment,
    taken_from_query,
    without_secrets,
)
from d1_signer.signing.recording import checked_trail, recorded
from d1_signer.signing.registry import call_backend, load_backend_module, plug_in_of
from d1_signer.signing.signer import Signer, checked_kid
from d1_signer.signing.steps import Step


@without_locals
def open_signer(
    uri: str,
    *,
    kid: str | None = None,
    verify: bool = True,
    expected_thumbprint: str | None = None,
    custody_policy: CustodyPolicy | None = None,
    attestation: Statement | str | None = None,
    attestation_anchors: str | None = None,
    observers: Sequence[Observer] = (),
    trail: Trail | None = None,
    **options: Any,
) -> Signer:
    """Open the key that a URI names.

    Args:
        uri: ``pkcs11:`` (RFC 7512), ``awskms:``, ``gcpkms:``, ``hashivault:``, ``file:``, or the
            scheme of an installed plug-in. A fragment names the kid.
        kid: Key identifier; wins over the fragment. Without either: the RFC 7638 thumbprint.
        verify: Verify each signature before it is returned.
        expected_thumbprint: RFC 7638 thumbprint that the key must have.
        custody_policy: What the key's custody must be shown to be; None: what ``D1_CUSTODY_POLICY``
            says, if it is set.
        attestation: A device's statement about the key, verified now: a `Statement`, or
            ``FORMAT:PATH[,PATH…]``; wins over ``attestation=`` in the URI's query.
        attestation_anchors: File of keys that statements may rest on, beside the published ones;
            wins over ``attestation-anchors=``.
        observers: Told of each signature.
        trail: Asked before each use of the key, see `AuditTrail`; stays the caller's.
        **options: The backend's own options; see its ``open_backend``.

    Returns:
        A signer, ready to sign. The caller closes it.

    Raises:
        KeyUriError: The URI cannot be read, or nothing serves its scheme.
        MissingExtraError: The backend's optional dependency is not installed.
        ConfigurationError: An option that the backend does not know.
        InvalidInputError: The kid is empty, longer than 256 characters or not printable.
        SignerError: The key cannot be opened.
        AuditUnavailable: The trail cannot record it.
    """
    rest, fragment = split_fragment(uri)
    wanted = fragment if kid is None else kid
    rest, query = taken_from_query(rest, ("attestation", "attestation-anchors"))
    module = load_backend_module(rest)
    checked_trail(trail)
    if wanted is not None:  # before a PIN is read, which is a login for nothing then
        checked_kid(wanted)
    shown = without_secrets(uri)
    with Step(f"the key {shown}") as step, recorded(trail, "open", {"key": shown}) as found:
        backend = call_backend(module, "open_backend", rest, options)
        try:
            signer = Signer(
                backend,
                kid=wanted,
                verify=verify,
                expected_thumbprint=expected_thumbprint,
                custody_policy=custody_policy,
                attestation=attestation or query.get("attestation"),
                attestation_anchors=attestation_anchors or query.get("attestation-anchors"),
                observers=observers,
                trail=trail,
            )
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                backend.close()
            raise
        found["thumbprint"] = signer.public_key.thumbprint()
        step.facts |= {"kid": signer.kid, "backend": backend.name, "plug_in": plug_in_of(backend)}
    return signer


@without_locals
def generate_key(uri: str, *, trail: Trail | None = None, **options: Any) -> GeneratedKey:
    """Make a new P-256 signing key where the URI says; an existing key is never overwritten.

    Args:
        uri: As for `open_signer`, naming a key that does not exist yet.
        trail: Asked before the key is made, see `AuditTrail`; stays the caller's.
        **options: The backend's own options; see its ``generate_key``.

    Raises:
        KeyExistsError: A key of that name exists.
        KeyUriError: The URI cannot be read, or its backend makes no keys.
        SignerError: The key cannot be made.
    """
    rest, _ = split_fragment(uri)
    module = load_backend_module(rest)
    if not hasattr(module, "generate_key"):
        raise KeyUriError(f"The scheme {scheme_of(uri)}: does not make keys.")
    checked_trail(trail)
    shown = without_secrets(uri)
    with Step(f"a new key {shown}"), recorded(trail, "generate-key", {"key": shown}) as found:
        generated: GeneratedKey = call_backend(module, "generate_key", rest, options)
        found["thumbprint"] = generated.public_key.thumbprint()
    return generated

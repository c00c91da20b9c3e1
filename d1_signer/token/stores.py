# SPDX-License-Identifier: Apache-2.0
"""Where a fleet of processes shares its token: the protocol, and the sealing of what is stored.

Without a store each fetcher keeps its token in its own memory. `RedisTokenStore` is one in Redis
or Valkey. A store sees ciphertext only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from d1_signer import jose
from d1_signer.errors import ConfigurationError
from d1_signer.secret import Secret

KEY_LENGTH = 32
MAX_SEALED = 64 * 1024
"""Bytes of a sealed token; what is longer is none of ours."""

VERSION = 2
"""Of what is stored: another one is kept under other names."""

_NONCE_LENGTH = 12


class Lease(Protocol):
    """The right to renew for the fleet, until released or run out."""

    def release(self) -> None:
        """Give it back; does nothing where it ran out. May raise `StoreUnavailable`."""
        ...


class TokenStore(Protocol):
    """Keeps one sealed token per name, and one lease per name. Safe in threads and after fork.

    A method that does not answer within a second is left behind in its thread; it counts as away,
    as does one that raises.
    """

    def load(self, name: str) -> tuple[bytes, float] | None:
        """What was saved, and the seconds for which it will be kept; None where there is none."""
        ...

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        """Keep ``sealed`` for ``life`` seconds, in the place of what was there."""
        ...

    def lease(self, name: str, *, life: float) -> Lease | None:
        """Take the lease for ``life`` seconds at most; None where another holds it."""
        ...


@runtime_checkable
class Abortable(Protocol):
    """A store that can end its calls under way, so that no thread is left behind in them."""

    def abort(self) -> None:
        """End them; returns at once."""
        ...


MEMBER = 16
"""Characters that name a process of the fleet, which a lease begins with."""


@runtime_checkable
class Register(Protocol):
    """A store that also keeps what each process of the fleet tells of itself."""

    def announce(self, name: str, sealed: bytes, *, life: float) -> None:
        """Keep ``sealed`` for this process, for ``life`` seconds."""
        ...

    def withdraw(self, name: str) -> None:
        """Keep nothing of this process any more."""
        ...

    def members(self, name: str) -> list[bytes]:
        """What was announced and is still kept."""
        ...

    def holder(self, name: str) -> tuple[str, float] | None:
        """Who holds the lease, and the seconds for which it is kept (or inf); None for nobody."""
        ...

    @property
    def member(self) -> str:
        """The name of this process, of `MEMBER` characters."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedToken:
    """A token as the fleet shares it.

    Attributes:
        value: The access token. Secret.
        scope: Its scopes.
        requested_at: Start of the request, seconds since the epoch.
        expires_at: Seconds since the epoch.
        generation: Grows with each token of the fleet.
    """

    value: str = field(repr=False)
    scope: str
    requested_at: float
    expires_at: float
    generation: int = 0


class Sealer:
    """Seals tokens with AES-256-GCM, bound to issuer, environment, scope and generation."""

    def __init__(self, key: Secret | None, *, issuer_id: str, base_url: str) -> None:
        """Take the fleet's key.

        Args:
            key: 32 random bytes, in hexadecimal.
            issuer_id: Whose tokens.
            base_url: Of which D1.

        Raises:
            ConfigurationError: The key is missing or not 32 bytes.
        """
        if key is None or len(key.reveal()) != 2 * KEY_LENGTH:
            raise ConfigurationError(
                "A shared token store needs a store_key of 32 bytes.",
                hint="Make one with os.urandom(32), and give the same to all of the fleet.",
            )
        self._cipher = AESGCM(bytes.fromhex(key.reveal()))
        self._binding = {"v": VERSION, "iss": issuer_id, "env": base_url}

    def seal(self, token: SharedToken) -> bytes:
        """Encrypt a token; scope and generation stay readable and are authenticated."""
        secret = {
            "value": token.value,
            "requested_at": token.requested_at,
            "expires_at": token.expires_at,
        }
        nonce = os.urandom(_NONCE_LENGTH)
        bound = self._bound(token.scope, token.generation)
        box = self._cipher.encrypt(nonce, jose.compact_json(secret), bound)
        return jose.compact_json(
            {
                "v": VERSION,
                "scope": token.scope,
                "generation": token.generation,
                "box": jose.b64url_encode(nonce + box).decode("ascii"),
            }
        )

    def open(self, sealed: bytes) -> SharedToken | None:
        """Decrypt a token; None for anything that this key did not seal for this binding."""
        try:
            envelope = json.loads(sealed)
            scope, generation = envelope["scope"], envelope["generation"]
            box = jose.b64url_decode(envelope["box"])
            bound = self._bound(scope, generation)
            content = json.loads(
                self._cipher.decrypt(box[:_NONCE_LENGTH], box[_NONCE_LENGTH:], bound)
            )
            return SharedToken(
                value=content["value"],
                scope=scope,
                requested_at=content["requested_at"],
                expires_at=content["expires_at"],
                generation=generation,
            )
        except (InvalidTag, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def seal_member(self, facts: Mapping[str, object]) -> bytes:
        """Encrypt what a process tells of itself."""
        nonce = os.urandom(_NONCE_LENGTH)
        return nonce + self._cipher.encrypt(nonce, jose.compact_json(facts), self._of_members())

    def open_member(self, sealed: bytes) -> dict[str, Any] | None:
        """Decrypt that; None for what this key did not seal for this binding."""
        nonce, box = sealed[:_NONCE_LENGTH], sealed[_NONCE_LENGTH:]
        try:
            facts = json.loads(self._cipher.decrypt(nonce, box, self._of_members()))
        except (InvalidTag, ValueError, RecursionError):
            return None
        return facts if isinstance(facts, dict) else None

    def _of_members(self) -> bytes:
        return jose.compact_json({**self._binding, "of": "members"})

    def _bound(self, scope: str, generation: int) -> bytes:
        return jose.compact_json({**self._binding, "scope": scope, "generation": generation})

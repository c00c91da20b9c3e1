# SPDX-License-Identifier: Apache-2.0
"""The access token, and the pure rules for how long it serves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn, final

from d1_signer.secret import Secret
from d1_signer.token.attempt import Attempt
from d1_signer.token.d1 import MAX_TOKEN_LIFETIME

_RENEW_AT = 2 / 3
_JITTER = 0.1
_MAX_MARGIN = 10.0


@final
@dataclass(frozen=True, init=False, eq=False)
class AccessToken:
    """An access token of D1 (RFC 6749 section 1.4). Shows its value to nobody who prints it.

    Attributes:
        value: What goes behind ``Bearer`` in the Authorization header. Secret.
        expires_at: Seconds since the epoch.
        scope: Scopes with blanks between them, such as ``d1-api:account:full``; may be empty.
        token_type: ``"Bearer"``.
    """

    # The value is no field: asdict(), orjson, pydantic and their like show those.
    __slots__ = ("_value", "expires_at", "scope", "token_type")

    expires_at: float
    scope: str
    token_type: str

    def __init__(
        self,
        *,
        value: str,
        expires_at: float,
        scope: str = "",
        token_type: str = "Bearer",  # noqa: S107 (a type, RFC 6750)
    ) -> None:
        keep = object.__setattr__  # it is frozen
        keep(self, "_value", Secret(value))
        keep(self, "expires_at", expires_at)
        keep(self, "scope", scope)
        keep(self, "token_type", token_type)

    @property
    def value(self) -> str:
        """What goes behind ``Bearer`` in the Authorization header. Secret."""
        secret: Secret = getattr(self, "_value")  # noqa: B009 (an annotation would make it a field)
        return secret.reveal()

    def _parts(self) -> tuple[str, float, str, str]:
        return self.value, self.expires_at, self.scope, self.token_type

    def __eq__(self, other: object) -> bool:
        return self._parts() == other._parts() if isinstance(other, AccessToken) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._parts())

    def __reduce__(self) -> NoReturn:
        msg = "an AccessToken cannot be pickled"
        raise TypeError(msg)


class State(StrEnum):
    """What a held token is good for."""

    FRESH = "fresh"  # hand it out
    STALE = "stale"  # hand it out, and renew it in the background
    EXPIRED = "expired"  # wait for another one


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class HeldToken:
    """A token with its moments on the clock of the one who holds it.

    Attributes:
        token: The token.
        renew_at: From here on it is stale.
        unusable_at: From here on it is expired; a little ahead of D1's own expiry.
        requested_at: Start of the request.
        dies_at: D1's own expiry.
        shared: Whether it came from the fleet's store.
        attempt: What it was obtained with; None for one of the fleet's store.
    """

    token: AccessToken
    renew_at: float
    unusable_at: float
    requested_at: float
    dies_at: float
    shared: bool = False
    attempt: Attempt | None = None

    def state(self, now: float) -> State:
        """What the token is good for at a moment of the same clock."""
        if now < self.renew_at:
            return State.FRESH
        return State.STALE if now < self.unusable_at else State.EXPIRED

    def ends_at(self, now: float, wall: float) -> float:
        """Its end in seconds since the epoch, as the wall clock tells them now; it may be set."""
        return min(self.token.expires_at, wall + self.dies_at - now)

    def left(self, now: float, wall: float) -> float:
        """Seconds for which it is handed out from a moment on, by either clock; 0: no more."""
        return max(0.0, min(self.unusable_at - now, self.token.expires_at - wall))


def hold(
    *,
    value: str,
    scope: str,
    expires_in: float,
    requested_at: float,
    requested_at_wall: float,
    chance: float,
    shared: bool = False,
    attempt: Attempt | None = None,
) -> HeldToken:
    """Decide when a new token is renewed and when it is no longer handed out.

    Args:
        value: The token's value.
        scope: Its scopes.
        expires_in: Seconds that D1 said remain. They are counted from the start of the request:
            D1 counted from a later moment, so this errs on the safe side. More than 15 minutes
            counts as 15.
        requested_at: Start of the request on the holder's clock.
        requested_at_wall: The same moment in seconds since the epoch.
        chance: Random number from 0 to 1; spreads the renewals of a fleet.
        shared: Whether it came from the fleet's store.
        attempt: What it was obtained with.
    """
    life = min(expires_in, MAX_TOKEN_LIFETIME)
    margin = min(_MAX_MARGIN, life / 10)
    spread = 1 + _JITTER * (2 * chance - 1)
    return HeldToken(
        token=AccessToken(value=value, expires_at=requested_at_wall + life, scope=scope),
        renew_at=requested_at + life * _RENEW_AT * spread,
        unusable_at=requested_at + life - margin,
        requested_at=requested_at,
        dies_at=requested_at + life,
        shared=shared,
        attempt=attempt,
    )

# SPDX-License-Identifier: Apache-2.0
"""Verification of JWT assertions (RFC 7523 section 3) by joserfc.

Nothing of this package's own JOSE code is used here: a mistake that signing and verifying shared
would go unnoticed.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from d1_signer.errors import InvalidInputError, InvalidKeyError
from d1_signer.sandbox.strict_json import read_object

MAX_LIFETIME = 15 * 60
"""Seconds that ``exp`` may lie ahead (D1's limit)."""

MAX_AGE = 24 * 3600
"""Seconds that ``iat`` and ``nbf`` may lie back; RFC 7523 section 3 leaves it to the server."""

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_COORDINATE = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 bytes, always padded: RFC 7518 section 6.2.1.2
_HEADER = frozenset({"alg", "typ", "kid"})
_MALFORMED = (JoseError, ValueError, TypeError, AttributeError, KeyError, RecursionError)


class Ledger:
    """Values with an expiry; expired ones are dropped as it grows.

    The time is an argument throughout, seconds since the epoch.
    """

    def __init__(self) -> None:
        self._expiries: dict[str, float] = {}
        self._sweep_at = 1024

    def add(self, value: str, *, expires_at: float, now: float) -> None:
        """Remember `value` until `expires_at`."""
        if len(self._expiries) >= self._sweep_at:
            self._expiries = {v: end for v, end in self._expiries.items() if end > now}
            # Twice what is left: a sweep is paid for by as many additions.
            self._sweep_at = max(1024, 2 * len(self._expiries))
        self._expiries[value] = expires_at

    def holds(self, value: str, *, now: float) -> bool:
        """Whether `value` is remembered and has not expired."""
        return self._expiries.get(value, now) > now


class KeyRegister:
    """The public keys that were given at onboarding, by kid."""

    def __init__(self) -> None:
        self._keys: dict[str, ECKey] = {}

    def add(self, kid: str, jwk: Mapping[str, str]) -> None:
        """Register a public P-256 key; a key under the same kid is replaced.

        Raises:
            InvalidInputError: The kid is empty or no string, or differs from the JWK's; or the JWK
                is no mapping.
            InvalidKeyError: Not a public P-256 signature key.
        """
        _check_kid(kid)
        if not isinstance(jwk, Mapping):
            raise InvalidInputError(
                "The key to register is not a JWK.", hint="Register what PublicKey.jwk() gives."
            )
        if jwk.get("kid", kid) != kid:
            raise InvalidInputError("The JWK has another kid than the one it is registered under.")
        _check_jwk(jwk)
        try:
            self._keys[kid] = ECKey.import_key({n: jwk[n] for n in ("kty", "crv", "x", "y")})
        except (JoseError, ValueError):
            raise InvalidKeyError("The JWK's point is not on the curve P-256.") from None

    def remove(self, kid: str) -> None:
        """Forget the key, as at the end of a rotation; an unknown kid does no harm."""
        _check_kid(kid)
        self._keys.pop(kid, None)

    def get(self, kid: str) -> ECKey | None:
        """The key, None where the kid is unknown."""
        return self._keys.get(kid)


def _check_kid(kid: str) -> None:
    if not isinstance(kid, str) or not kid:
        raise InvalidInputError("A kid is a string that is not empty.")


def _check_jwk(jwk: Mapping[str, str]) -> None:
    if "d" in jwk:
        raise InvalidKeyError(
            "The JWK has a private member; D1 is given public keys only.",
            hint="Register what PublicKey.jwk() or `d1-signer public-key --format jwk` gives.",
        )
    if jwk.get("kty") != "EC" or jwk.get("crv") != "P-256":
        raise InvalidKeyError("The JWK is not a key on P-256 (kty EC, crv P-256).")
    if not all(_COORDINATE.fullmatch(str(jwk.get(name))) for name in ("x", "y")):
        raise InvalidKeyError("The JWK's coordinates are not base64url of 32 bytes each.")
    if jwk.get("alg", "ES256") != "ES256" or jwk.get("use", "sig") != "sig":
        raise InvalidKeyError("The JWK is meant for another use than ES256 signatures.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was read, and why it is refused.

    Attributes:
        header: The decoded header, empty where unreadable.
        claims: The decoded claims, empty where unreadable; not to be trusted where refused.
        refusal: One sentence for the client, without anything of the assertion; empty where it is
            accepted.
    """

    header: Mapping[str, object]
    claims: Mapping[str, object]
    refusal: str = ""


class _Refused(Exception):
    pass


class AssertionVerifier:
    """Judges assertions as D1 is documented to.

    Args:
        issuer_id: What ``iss`` and ``sub`` must be.
        audience: What ``aud`` must be or contain where it is present: the token endpoint's URL.
        keys: The registered keys.
        leeway: Seconds that ``iat`` and ``nbf`` may lie in the future.
    """

    def __init__(
        self, *, issuer_id: str, audience: str, keys: KeyRegister, leeway: float = 5.0
    ) -> None:
        self._issuer_id = issuer_id
        self._audience = audience
        self._keys = keys
        self._leeway = leeway
        self._seen = Ledger()

    def verify(self, assertion: str, *, now: float) -> Verdict:
        """Judge one assertion; an accepted one is remembered by its ``jti`` until it expires.

        Args:
            assertion: The compact JWT.
            now: Seconds since the epoch.
        """
        header: Mapping[str, object] = {}
        claims: dict[str, Any] = {}
        try:
            signature = _extract(assertion)
            header = _header(assertion)
            claims = _claims(signature.payload)
            key = self._key_of(header)
            good = jws.validate_compact(signature, key, algorithms=["ES256"])
            _require(good, "The signature of the assertion does not verify with the kid's key.")
            self._check_parties(claims)
            self._check_times(claims, now)
            self._check_replay(claims, now)
        except _Refused as refused:
            return Verdict(header=header, claims=claims, refusal=str(refused))
        return Verdict(header=header, claims=claims)

    def _key_of(self, header: Mapping[str, object]) -> ECKey:
        _require(header.get("alg") == "ES256", "The algorithm of the assertion is not ES256.")
        _require(header.get("typ") == "JWT", "The typ of the assertion is not JWT.")
        # Whatever else a header may bring (jku, jwk, crit, b64) has no place in D1's assertions.
        _require(set(header) <= _HEADER, "The header of the assertion has other parameters.")
        kid = header.get("kid")
        _require(isinstance(kid, str) and bool(kid), "The assertion names no kid.")
        key = self._keys.get(str(kid))
        if key is None:
            raise _Refused("The kid of the assertion is unknown.")
        return key

    def _check_parties(self, claims: dict[str, Any]) -> None:
        for name in ("iss", "sub"):
            _require(claims.get(name) == self._issuer_id, f"The {name} is not a known issuer.")
        if "aud" in claims:
            audience = claims["aud"]
            listed = audience if isinstance(audience, list) else [audience]
            texts = all(isinstance(one, str) for one in listed)
            _require(
                texts and self._audience in listed, "The aud is not the URL of this token endpoint."
            )

    def _check_times(self, claims: dict[str, Any], now: float) -> None:
        expiry = claims.get("exp")
        if type(expiry) is not int:
            raise _Refused("The exp is not an integer.")
        _require(expiry > now, "The assertion has expired.")
        _require(expiry <= now + MAX_LIFETIME, "The exp is more than 15 minutes ahead.")
        for name in ("iat", "nbf"):
            if name in claims:
                moment = claims[name]
                if type(moment) not in (int, float):
                    raise _Refused(f"The {name} is not a number.")
                _require(moment <= now + self._leeway, f"The {name} lies in the future.")
                _require(moment >= now - MAX_AGE, f"The {name} lies more than a day back.")
                _require(moment < expiry, f"The {name} is not before the exp.")

    def _check_replay(self, claims: dict[str, Any], now: float) -> None:
        if "jti" not in claims:
            return
        identifier = claims["jti"]
        if not isinstance(identifier, str) or not identifier:
            raise _Refused("The jti is not a string.")
        _require(not self._seen.holds(identifier, now=now), "The jti was used before.")
        self._seen.add(identifier, expires_at=claims["exp"], now=now)


def _require(condition: bool, refusal: str) -> None:  # noqa: FBT001
    if not condition:
        raise _Refused(refusal)


def _extract(assertion: str) -> jws.CompactSignature:
    # The alphabet is checked apart: no padding, no blanks, whatever joserfc's release makes of it.
    _require(_COMPACT.fullmatch(assertion) is not None, "The assertion is not a compact JWT.")
    try:
        return jws.extract_compact(assertion.encode())
    except _MALFORMED:
        raise _Refused("The header of the assertion cannot be read.") from None


def _header(assertion: str) -> dict[str, Any]:
    """The protected header; joserfc takes other encodings, and the last of two members."""
    segment = assertion.partition(".")[0]
    try:
        return read_object(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except ValueError:
        raise _Refused("The header of the assertion is not a JSON object.") from None


def _claims(text: bytes) -> dict[str, Any]:
    try:
        return read_object(text)
    except ValueError:
        raise _Refused("The claims of the assertion are not a JSON object.") from None

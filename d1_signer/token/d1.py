# SPDX-License-Identifier: Apache-2.0
"""Facts of the Thales D1 API: environments, limits, and the assertion's claims. Pure.

Sources: the OpenAPI document of the D1 OAuth API, and the D1 developer pages "Get OAuth 2.0 access
token" and "Set up TLS mutual authentication".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, final
from urllib.parse import SplitResult, urlsplit

from d1_signer.errors import ConfigurationError, InvalidInputError
from d1_signer.frames import without_locals
from d1_signer.transport.hosts import is_loopback

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"
"""RFC 7523 section 2.1."""

TOKEN_PATH = "/oauth2/token"  # noqa: S105 (a path)
BANKING_PATH = "/banking"

MAX_ASSERTION_LIFETIME = 900
"""Seconds: D1 refuses an ``exp`` more than 15 minutes ahead."""

DEFAULT_ASSERTION_LIFETIME = 300
"""Seconds: leaves ten minutes for a clock that runs ahead of D1's, five for one behind."""

MAX_TOKEN_LIFETIME = 900
"""Seconds: an access token is valid for 15 minutes at most."""

ISSUED_AT_MARGIN = 5
"""Seconds that ``iat`` is set back, for D1 refuses one in its future and clocks differ a little."""

# D1's clock may be a little behind.
_LONGEST_ASSERTION_LIFETIME = MAX_ASSERTION_LIFETIME - ISSUED_AT_MARGIN

_CORRELATION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_THALES_HOSTS = frozenset(
    {
        "api.d1.thalescloud.io",
        "api.d1-stg.thalescloud.io",
        "develop-api.d1-dev.thalescloud.io",
    }
)


@final
@dataclass(frozen=True, slots=True)
class Environment:
    """One D1 environment: Thales' `PRODUCTION`, `STAGING`, `DEVELOP`, or one at another URL.

    Attributes:
        base_url: Base URL of the authorization API, without a trailing slash. https; plain http is
            taken for a loopback address only.

    Raises:
        ConfigurationError: The URL is not of that form.
    """

    base_url: str

    PRODUCTION: ClassVar[Environment]
    STAGING: ClassVar[Environment]
    DEVELOP: ClassVar[Environment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", _checked_url(self.base_url))

    @classmethod
    @without_locals
    def of(cls, value: Environment | str) -> Environment:
        """Take an environment, the name of one of Thales' (in any case), or a URL.

        Raises:
            ConfigurationError: None of these.
        """
        if isinstance(value, Environment):
            return value
        named = {
            "production": cls.PRODUCTION,
            "staging": cls.STAGING,
            "develop": cls.DEVELOP,
        }
        return (named.get(value.lower()) if isinstance(value, str) else None) or cls(value)

    @property
    def token_endpoint(self) -> str:
        """URL of the token endpoint."""
        return self.base_url + TOKEN_PATH

    @property
    def banking_url(self) -> str:
        """Base URL of the banking API: the same host, ``/banking``."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc}{BANKING_PATH}"

    @property
    def is_thales(self) -> bool:
        """Whether the host is one of Thales' three, whose every call needs mutual TLS."""
        host = urlsplit(self.base_url).hostname or ""
        return host.removesuffix(".") in _THALES_HOSTS

    def serves(self, url: str) -> bool:
        """Whether a URL is on this environment's own scheme, host and port."""
        try:
            return origin(url) == origin(self.base_url)
        except ValueError:
            return False


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL, defaults filled in (RFC 6454 section 4).

    Raises:
        ValueError: The URL has no usable host or port, or characters about which parsers differ:
            the host that is compared here must be the host that is connected to.
    """
    if not isinstance(url, str) or _AMBIGUOUS.search(url):
        msg = "characters that a URL cannot have"
        raise ValueError(msg)
    parts = urlsplit(url)
    if not parts.hostname:
        msg = "no host"
        raise ValueError(msg)
    default = {"https": 443, "http": 80}.get(parts.scheme, 0)
    port = default if parts.port is None else parts.port
    return parts.scheme, parts.hostname.removesuffix("."), port


def _checked_url(url: str) -> str:
    if not isinstance(url, str) or "://" not in url:
        raise _bad_url("it is neither a name of Thales' environments nor a URL")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad_url("it cannot be read") from None
    host = parts.hostname or ""
    refusals = (
        (port == 0, "nothing listens on port 0"),
        (re.search(r"[^\x21-\x7e]", url), "it has characters that a URL cannot have"),
        ("@" in parts.netloc, "it holds a user name or a password"),
        ("?" in url or "#" in url, "it has a query or a fragment"),
        (not _HOST.fullmatch(_host_of(parts)), "it has no valid host"),
        (parts.scheme not in {"https", "http"}, "it does not begin with https://"),
        (
            parts.scheme == "http" and not is_loopback(host),
            "plain http is for a loopback address only",
        ),
        (
            parts.path.rstrip("/").lower().endswith(TOKEN_PATH),
            f"it ends in {TOKEN_PATH}, which is added to it",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise _bad_url(reason)
    return url.rstrip("/")


def _host_of(parts: SplitResult) -> str:
    return re.sub(r":\d*$", "", parts.netloc)


def _bad_url(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"The environment is refused: {reason}.",
        hint="Give production, staging, develop, or the https URL before /oauth2/token.",
    )


# `dataclass` writes it, so there is nothing to decorate above.
Environment.__init__ = without_locals(Environment.__init__)  # type: ignore[method-assign]

Environment.PRODUCTION = Environment("https://api.d1.thalescloud.io/authz/v1")
Environment.STAGING = Environment("https://api.d1-stg.thalescloud.io/authz/v1")
Environment.DEVELOP = Environment("https://develop-api.d1-dev.thalescloud.io/authz/v1")


class Audience(Enum):
    """What ``aud`` says when the caller says nothing."""

    TOKEN_ENDPOINT = "the token endpoint's URL"  # RFC 7523 section 3  # noqa: S105

    @staticmethod
    def of(audience: str | Audience | None, environment: Environment) -> str | None:
        """The claim for an environment; None leaves it out."""
        return environment.token_endpoint if isinstance(audience, Audience) else audience


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class AssertionProfile:
    """What an issuer's assertions say, apart from the moment.

    Attributes:
        issuer_id: The issuerId that D1 gave at onboarding (the aggregatorId for an aggregator):
            ``iss`` and ``sub``.
        audience: ``aud``; None leaves it out.
        lifetime: Seconds from now to ``exp``, 1 to 900; more than 895 count as 895, so that D1's
            clock may be a little behind.
        issued_at: Whether to send ``iat``.
        jwt_id: Whether to send ``jti``.

    Raises:
        InvalidInputError: A value is out of range.
    """

    issuer_id: str
    audience: str | None
    lifetime: int = DEFAULT_ASSERTION_LIFETIME
    issued_at: bool = True
    jwt_id: bool = True

    def __post_init__(self) -> None:
        if not _is_text(self.issuer_id):
            raise InvalidInputError(
                "The issuer id is empty or not printable text, or has blanks at an end.",
                hint="Give the issuerId that D1 assigned at onboarding.",
            )
        if self.audience is not None and not _is_text(self.audience):
            raise InvalidInputError(
                "The audience is empty or not printable text, or has blanks at an end."
            )
        whole = isinstance(self.lifetime, int) and not isinstance(self.lifetime, bool)
        if not whole or not 1 <= self.lifetime <= MAX_ASSERTION_LIFETIME:
            raise InvalidInputError(
                "The assertion's lifetime is not a whole number of seconds from 1 to 900.",
                hint="D1 refuses an assertion that lives longer than 15 minutes.",
            )

    def expiry(self, now: float) -> int:
        """``exp`` of an assertion that is made at a moment; both in seconds since the epoch."""
        return int(now) + min(self.lifetime, _LONGEST_ASSERTION_LIFETIME)

    def claims(self, *, now: float, jti: str) -> dict[str, object]:
        """Build the claims of one assertion (RFC 7523 section 3).

        Args:
            now: Seconds since the epoch.
            jti: An identifier never used before.

        Returns:
            ``iss``, ``sub``, ``exp``, and as the profile says ``aud``, ``iat``, ``jti``.
        """
        claims: dict[str, object] = {"iss": self.issuer_id, "sub": self.issuer_id}
        if self.audience is not None:
            claims["aud"] = self.audience
        if self.issued_at:
            claims["iat"] = int(now) - ISSUED_AT_MARGIN
        claims["exp"] = self.expiry(now)
        if self.jwt_id:
            claims["jti"] = jti
        return claims


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value != "" and value == value.strip()


def checked_correlation_id(value: str) -> str:
    """Return an ``x-correlation-id`` that D1 accepts: 1 to 64 of ``A-Z a-z 0-9 _ -``.

    Raises:
        InvalidInputError: Another form. D1 logs it in clear: no personal data in it.
    """
    if not isinstance(value, str) or not _CORRELATION_ID.fullmatch(value):
        raise InvalidInputError(
            "The correlation id is not 1 to 64 letters, digits, hyphens or underscores."
        )
    return value

# SPDX-License-Identifier: Apache-2.0
"""How a token fetcher is, at one moment: for health checks, dashboards and people. No secret."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.signing.member import MemberHealth
from d1_signer.token.access_token import State
from d1_signer.token.attempt import Attempt


@dataclass(frozen=True, kw_only=True, slots=True)
class Success:
    """A renewal that ended with a token.

    Attributes:
        at: When, in seconds since the epoch.
        shared: Whether the token came from the fleet's store.
        attempt: What it was obtained with: ``kid``, ``jti``, ``correlation_id`` and others; None
            for one of the store.
    """

    at: float
    shared: bool
    attempt: Attempt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A renewal that ended without one.

    Attributes:
        at: When, in seconds since the epoch.
        code: Code of the error.
        message: Its text.
        hint: What to do.
        retryable: Whether waiting may help.
        correlation_id: Of the last request, which stands in D1's log; None where none was sent.
    """

    at: float
    code: str
    message: str
    hint: str
    retryable: bool
    correlation_id: str | None


class StoreState(StrEnum):
    """What the last call of the fleet's store has shown."""

    NONE = "none"  # no store is used
    UNUSED = "unused"  # not asked yet
    WORKING = "working"
    UNREADABLE = "unreadable"  # what it holds was sealed with another key
    AWAY = "away"


class LeaseState(StrEnum):
    """Who renewed for the fleet, when it was looked at last."""

    NONE = "none"  # nobody, as far as is known
    OURS = "ours"  # this process renews now
    ANOTHERS = "anothers"  # another process renewed, and this one waited for its token
    KEPT = "kept"  # ours, and the store could not be told that it is given back


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsStatus:
    """The file of settings that a fetcher follows.

    Attributes:
        file: Its path.
        digest: Of the settings that are used: the same wherever the same are used.
        taken_at: Since when, in seconds since the epoch.
        error: Code of why the file cannot be used now; None where it is what is used.
        message: The same as text.
        keys_away: Keys of it that could not be opened so far.
    """

    file: str
    digest: str
    taken_at: float
    error: str | None
    message: str | None
    keys_away: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateStatus:
    """The client certificate that serves new connections.

    Attributes:
        fingerprint: SHA-256 of it, in hexadecimal.
        not_after: Its end, in seconds since the epoch.
    """

    fingerprint: str
    not_after: float

    @classmethod
    def of(cls, certificate: x509.Certificate | None) -> Self | None:
        """What is told of a certificate; None for none."""
        if certificate is None:
            return None
        return cls(
            fingerprint=certificate.fingerprint(SHA256()).hex(),
            not_after=certificate.not_valid_after_utc.timestamp(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FetcherStatus:
    """How a `d1_signer.TokenFetcher` is; moments are in seconds since the epoch.

    Attributes:
        at: When this was looked at.
        environment: Base URL of D1.
        issuer_id: Who asks.
        token: What the held token is good for; ``expired`` where there is none.
        expires_at: End of the held token; None where there is none.
        next_renewal_at: The earliest moment at which a call begins a renewal; None where one is
            under way.
        renewing: Whether one is under way.
        failures: Renewals that failed since the last success.
        last_success: The last renewal that ended with a token; None where there was none.
        last_failure: The last one that ended without, whatever came after it.
        members: The signers, in order.
        store: The fleet's store.
        store_error: What is wrong with it, and what to do; None where nothing is known to be.
        lease: The right to renew for the fleet.
        settings: The file of settings; None where the fetcher was made without one.
        client_certificate: None where there is none, or the caller's own context has it.
        closed: Whether the fetcher is closed.
    """

    at: float
    environment: str
    issuer_id: str
    token: State
    expires_at: float | None
    next_renewal_at: float | None
    renewing: bool
    failures: int
    last_success: Success | None
    last_failure: Failure | None
    members: tuple[MemberHealth, ...]
    store: StoreState
    store_error: str | None
    lease: LeaseState
    settings: SettingsStatus | None
    client_certificate: CertificateStatus | None
    closed: bool

    @property
    def healthy(self) -> bool:
        """Whether calls get a token without waiting, or none has been asked for so far.

        A fetcher whose renewals fail is healthy until its last token ends: look at ``failures``
        for a warning before that.
        """
        if self.closed:
            return False
        return self.token is not State.EXPIRED or not self.failures

    def to_dict(self) -> dict[str, object]:
        """The status as JSON-ready values, ``healthy`` among them."""
        return {"healthy": self.healthy, **asdict(self)}

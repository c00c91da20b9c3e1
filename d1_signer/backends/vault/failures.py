# SPDX-License-Identifier: Apache-2.0
"""What Vault's answers mean: the table of docs/cloud/vault.md; and the failures on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from d1_signer.backends.remote import Failures, Service
from d1_signer.errors import (
    AccessDeniedError,
    D1SignerError,
    InvalidKeyError,
    KeyDisabledError,
    KeyNotFoundError,
    LoginError,
    SignerError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.transport.failures import TlsFailure, failure_of, is_untrusted
from d1_signer.transport.foreign import quoted

_TLS = "TLS failed: check the CA file (VAULT_CACERT) and the name in the address."
# In this order: a class before the classes it derives from.
_FAILURES: Failures = (
    ((SSLError,), SignerUnavailable, _TLS),
    ((NewConnectionError,), SignerUnavailable, "Check VAULT_ADDR and the network."),
    ((ConnectTimeoutError, ReadTimeoutError), SignerTimeout, "Check that Vault can be reached."),
    ((HTTPError, OSError), SignerUnavailable, "Check VAULT_ADDR and the network."),
    ((ValueError,), SignerError, "Check the settings; a token is plain ASCII text."),
)


def service_at(endpoint: str) -> Service:
    """Vault, as error texts name the one at an endpoint."""
    return Service(
        name=f"Vault at {endpoint}",
        packages="d1-signer and urllib3",
        altered_hint="Something on the way to Vault alters answers, or it is not Vault.",
        failures=_FAILURES,
    )


class Phase(StrEnum):
    """What a request is for; in ``details["phase"]``."""

    CREDENTIALS = "credentials"
    LOOK_UP = "look-up"
    SIGNATURE = "signature"
    GENERATION = "generation"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a request is for, and how a sentence says so."""

    doing: str
    phase: Phase


TO_SIGN = Purpose("to sign", Phase.SIGNATURE)
FOR_THE_KEY = Purpose("to describe the key", Phase.LOOK_UP)
FOR_THE_CLUSTER = Purpose("for its cluster", Phase.LOOK_UP)
TO_MAKE = Purpose("to make a key", Phase.GENERATION)
TO_LOG_IN = Purpose("to log in", Phase.CREDENTIALS)
TO_UNWRAP = Purpose("to unwrap the secret id", Phase.CREDENTIALS)
TO_RENEW = Purpose("to renew the token", Phase.CREDENTIALS)


class Again(Enum):
    """Whether a request may be sent again."""

    NEVER = "the answer stays the same"
    UNSEEN = "it was not dealt with"
    HARMLESS = "it may have been dealt with: what counts attempts is not sent again"


class Refused(StrEnum):
    """What an answer to a login judges; in ``details["refused"]``."""

    SECRET = "secret"  # noqa: S105 (a word)
    ROLE = "role"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Meaning:
    """A line of the table.

    Attributes:
        status: HTTP status; 0 for any.
        text: Stands in Vault's message, in lower case; empty for any.
        error: Our error.
        hint: What to do.
        again: Whether we ask again within the time limit.
        refused: What it judges; None where that is not sure. Only a secret (id, or the token that
            wraps it) that is judged is never sent again.
    """

    status: int
    text: str
    error: type[D1SignerError]
    hint: str
    again: Again = Again.NEVER
    refused: Refused | None = None


_LOCATION = "Check the key's name, its mount and the namespace."
_WITHOUT = "Set VAULT_TOKEN, run vault login, or name a token source or a login."
_STATE = "Look at the state of Vault: sealed, a standby, failing over."
_REFUSED_ID = "Check the AppRole's secret id: wrong, used up, expired, or for other addresses."
_ROLE_ID = "Check the AppRole's role id, and auth-mount."
_ADDRESS = "Log in from an address that the role and the secret id are bound to."
_APP_ROLE = "Check the AppRole's secret id (wrong, used up, expired) and its role id."
_WRAPPED = (
    "The wrapped secret id was unwrapped before or has expired: if nobody of yours did it, treat "
    "it as stolen. Wrap a new one."
)
_MINIMUM = "The version is below the key's min_encryption_version."
_ARCHIVED = "The version is archived: it is below the key's min_decryption_version."
_SOFT = "The key is soft-deleted: restore it (transit/keys/NAME/soft-delete-restore)."
_GRANT = "Grant the external key to this mount: sys/external-keys/configs/…/grants/MOUNT."

# The first that fits counts.
MEANINGS: tuple[Meaning, ...] = (
    Meaning(400, "missing client token", LoginError, _WITHOUT),
    Meaning(400, "wrapping token", LoginError, _WRAPPED, refused=Refused.SECRET),
    Meaning(400, "cidr", LoginError, _ADDRESS, refused=Refused.ADDRESS),
    Meaning(
        400, "invalid role name", LoginError, "Check the role of the login.", refused=Refused.ROLE
    ),
    Meaning(400, "invalid role or secret id", LoginError, _APP_ROLE, refused=Refused.SECRET),
    Meaning(400, "invalid role id", LoginError, _ROLE_ID, refused=Refused.ROLE),
    Meaning(400, "secret id", LoginError, _REFUSED_ID, refused=Refused.SECRET),
    Meaning(400, "not found", KeyNotFoundError, _LOCATION),
    Meaning(400, "does not support signing", InvalidKeyError, "Use a key of type ecdsa-p256."),
    Meaning(400, "", SignerError, "See Vault's own words; its server log has more."),
    Meaning(401, "", LoginError, "What stands before Vault asks for credentials of its own."),
    Meaning(403, "invalid token", LoginError, "The token has expired or was revoked."),
    Meaning(403, "", AccessDeniedError, "Check the token: expired? And its policy on keys, sign."),
    Meaning(404, "", KeyNotFoundError, _LOCATION),
    Meaning(405, "", SignerError, "Check that the mount is a Transit engine."),
    Meaning(412, "", SignerUnavailable, "A standby lags behind; try again.", Again.UNSEEN),
    Meaning(429, "", SignerThrottled, "Raise the rate limit quota of Vault.", Again.UNSEEN),
    Meaning(472, "", SignerUnavailable, _STATE, Again.UNSEEN),
    Meaning(473, "", SignerUnavailable, _STATE, Again.UNSEEN),
    Meaning(500, "minimum encryption key version", KeyDisabledError, _MINIMUM),
    Meaning(500, "no such key version", KeyDisabledError, _ARCHIVED),
    Meaning(500, "soft-deleted", KeyDisabledError, _SOFT),
    Meaning(500, "higher than the latest", KeyNotFoundError, "Name a version that exists."),
    Meaning(500, "missing grant", AccessDeniedError, _GRANT),
    Meaning(500, "local node not active", SignerUnavailable, _STATE, Again.UNSEEN),
    Meaning(500, "", SignerUnavailable, "See Vault's server log.", Again.HARMLESS),
    Meaning(501, "", SignerUnavailable, "Vault is not initialized: bao operator init."),
    Meaning(502, "", SignerUnavailable, _STATE, Again.HARMLESS),
    Meaning(503, "", SignerUnavailable, _STATE, Again.UNSEEN),
    Meaning(504, "", SignerUnavailable, _STATE, Again.HARMLESS),
    Meaning(0, "", SignerError, "See the status in the documentation of Vault's API."),
)

_REDIRECTS = range(300, 400)
_TEMPORARY = 307
# Headers by which a gateway names a request; Vault's own refusals name none.
_NUMBER = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_REQUEST_ID = ("X-Request-Id", "X-Correlation-Id", "X-Vault-Request-Id")


@dataclass(frozen=True, slots=True)
class OnTheWay:
    """What is known of a request that has no answer.

    Attributes:
        again: Whether it may be sent again.
        silent: Nothing was answered in time.
        about_certificate: The server refuses our client certificate, or misses one.
        without_tls: What answers speaks no TLS.
    """

    again: Again
    silent: bool = False
    about_certificate: bool = False
    without_tls: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer that can be used.

    Attributes:
        error: What to raise.
        again: Whether it may be sent again.
        after: Seconds that Vault asks to wait before.
        silent: Nothing was answered in time.
    """

    error: D1SignerError
    again: Again
    after: float = 0.0
    silent: bool = False

    @classmethod
    def on_the_way(cls, error: D1SignerError, known: OnTheWay) -> Failure:
        """The failure of a request that has no answer, with the error that tells it."""
        if known.about_certificate:
            error.retryable = False
            error.hint = (
                "The server refuses the client certificate or misses one: see VAULT_CLIENT_CERT "
                "and VAULT_CLIENT_KEY."
            )
        if known.without_tls:
            error.retryable = False
            error.hint = "What answers there speaks no TLS: check https and the port in VAULT_ADDR."
        return cls(error, known.again, silent=known.silent)


def on_the_way(error: Exception) -> OnTheWay:
    """What an exception says of a request that has no answer."""
    if is_untrusted(error) or not isinstance(error, HTTPError | OSError):
        return OnTheWay(Again.NEVER)
    failure = failure_of(error)
    if failure.refused is not None and not failure.refused.passes:
        return OnTheWay(Again.NEVER)
    if failure.tls is TlsFailure.REFUSED_CERTIFICATE:
        return OnTheWay(Again.NEVER, about_certificate=True)
    if failure.tls is TlsFailure.NO_TLS:
        return OnTheWay(Again.NEVER, without_tls=True)
    unseen = isinstance(error, NewConnectionError | ConnectTimeoutError)
    again = Again.UNSEEN if unseen else Again.HARMLESS
    return OnTheWay(again, silent=isinstance(error, ReadTimeoutError))


def refused(
    service: Service,
    purpose: Purpose,
    status: int,
    told: object,
    *,
    headers: Mapping[str, str],
    sent: list[str],
) -> Failure:
    """The failure for a status other than success.

    Args:
        service: The one that answered.
        purpose: What it was asked.
        status: HTTP status.
        told: The JSON of the answer, or None.
        headers: Its headers.
        sent: The secrets of the request.
    """
    details: dict[str, str | int | float] = {"status": status}
    number = next((headers[name] for name in _REQUEST_ID if name in headers), "")
    if _NUMBER.fullmatch(number):
        details["request_id"] = quoted(number, sent)[1:-1]
    if status in _REDIRECTS:
        where = quoted(headers.get("Location", "nowhere"), sent)
        return Failure(
            SignerUnavailable(
                f"{service.name} redirects to {where}; this is not followed, since the token would "
                "go there.",
                hint="Name the active node or its load balancer in VAULT_ADDR.",
                details=details,
            ),
            # A standby says so for as long as it believes in a leader that is gone.
            Again.UNSEEN if status == _TEMPORARY else Again.NEVER,
        )
    errors = told.get("errors") if isinstance(told, dict) else None
    message = " ".join(map(str, errors)) if isinstance(errors, list) else ""
    meaning = meaning_of(status, message)
    if meaning.refused is not None:
        details["refused"] = str(meaning.refused)
    kind = meaning.error
    if purpose.phase is Phase.CREDENTIALS and not issubclass(kind, SignerUnavailable):
        kind = LoginError
    text = quoted(message, sent) if message else ""
    error = service.refusal(purpose.doing, f"status {status}", text, (kind, meaning.hint), details)
    after = headers.get("Retry-After", "")
    seconds = float(after[:6]) if after.isascii() and after.isdecimal() else 0.0
    return Failure(error, meaning.again, seconds)


def meaning_of(status: int, message: str) -> Meaning:
    """The line of the table for an answer."""
    said = message.lower()
    for meaning in MEANINGS:
        if meaning.status == status and meaning.text in said:
            return meaning
    # Of a gateway, or of a release that this table does not know.
    same = 500 if 500 <= status <= 599 else 0  # noqa: PLR2004 (the class of statuses)
    return next(meaning for meaning in reversed(MEANINGS) if meaning.status == same)

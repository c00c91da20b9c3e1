# SPDX-License-Identifier: Apache-2.0
"""Every error that d1_signer raises.

The tree (``code`` in brackets; *retryable* where trying again later can help)::

    D1SignerError
    ├── InvalidInputError [invalid_input]             an argument of a wrong type or range
    ├── ConfigurationError [configuration]            a missing, contradictory or malformed setting
    │   ├── KeyUriError [key_uri]                     a key URI that cannot be read
    │   ├── MissingExtraError [missing_extra]         an optional dependency is not installed
    │   └── SecretSourceError [secret_source]         a PIN, passphrase or key file cannot be read
    ├── AuditError [audit]                            what an audit trail holds cannot be used
    │   └── AuditUnavailable [audit_unavailable]      no record can be written; retryable
    ├── SignerError [signer]
    │   ├── InvalidSignatureError [invalid_signature] malformed, or not by this key
    │   ├── InvalidKeyError [invalid_key]             not a P-256 signing key
    │   ├── KeyNotFoundError [key_not_found]          no key, or no token, fits the selection
    │   ├── AmbiguousKeyError [ambiguous_key]         more than one key, or token, fits
    │   ├── KeyExistsError [key_exists]               key generation would overwrite a key
    │   ├── KeyDisabledError [key_disabled]           the key exists and may not be used now
    │   ├── KeyMismatchError [key_mismatch]           the key is not the one that was pinned
    │   ├── LoginError [login]                        the PIN or the credentials were refused
    │   ├── AccessDeniedError [access_denied]         known to the service, not allowed to sign
    │   ├── IntegrityError [integrity]                an answer was altered; retryable
    │   ├── SignerUnavailable [signer_unavailable]    does not answer; retryable
    │   │   ├── SignerTimeout [signer_timeout]        no answer in time; retryable
    │   │   └── SignerThrottled [signer_throttled]    asked to slow down; retryable
    │   ├── SignerClosedError [signer_closed]         used after close()
    │   └── CustodyError [custody]                    the key does not meet the custody policy
    │       └── AttestationError [attestation]        a statement about a key is not verified
    └── TokenError [token]
        ├── TokenRefusedError [token_refused]         D1 refused the assertion
        ├── TlsError [tls]                            TLS trust between D1 and us is missing
        ├── TokenResponseError [token_response]       D1's answer cannot be used
        ├── TokenUnavailable [token_unavailable]      D1 is out of reach or failing; retryable
        │   └── TokenTimeout [token_timeout]          no token within the deadline; retryable
        ├── StoreUnavailable [store_unavailable]      the shared store is away; retryable
        └── FetcherClosedError [fetcher_closed]       used after close()

Nothing else escapes from a public call: errors of an SDK, of requests or of the operating system
are translated, and a cause is chained only where it cannot carry a secret.
"""

from __future__ import annotations

from typing import ClassVar, Self, TypeVar


class D1SignerError(Exception):
    """Root of all errors of this package.

    Attributes:
        code: Stable machine-readable name of the kind of error; see the tree in this module.
        retryable: True where the same call may succeed later without a change by an operator.
        hint: One sentence for the operator that says what to do; may be empty.
        details: What a machine may want beside the code (an SDK's own error code, a request id, an
            HTTP status). Values are strings or numbers and never secret.
    """

    code: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        retryable: bool | None = None,
        details: dict[str, str | int | float] | None = None,
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.retryable = self.default_retryable if retryable is None else retryable
        self.details = dict(details or {})

    @property
    def message(self) -> str:
        """The text without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def fresh(self) -> Self:
        """Return an equal error with no traceback of its own.

        One failure is given to many waiting threads; raising one object in several threads would
        make their tracebacks grow into each other.
        """
        twin = _rebuilt(type(self), self.args, {**vars(self), "details": dict(self.details)})
        twin.__cause__ = self.__cause__
        twin.__suppress_context__ = True
        return twin

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from their arguments alone, which fails for keyword-only ones: a
        # process pool would hang on such an answer of its worker.
        return _rebuilt, (type(self), self.args, vars(self))

    def to_dict(self) -> dict[str, object]:
        """The error for machines: ``code``, ``message``, ``hint``, ``retryable``, ``details``."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            "details": dict(self.details),
        }


_E = TypeVar("_E", bound=D1SignerError)


def _rebuilt(kind: type[_E], args: tuple[object, ...], state: dict[str, object]) -> _E:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


class InvalidInputError(D1SignerError, ValueError):
    """An argument has a wrong type, length or range; also a ``ValueError``."""

    code = "invalid_input"


class ConfigurationError(D1SignerError):
    """A setting is missing, contradictory or malformed."""

    code = "configuration"


class KeyUriError(ConfigurationError):
    """A key URI cannot be read."""

    code = "key_uri"


class MissingExtraError(ConfigurationError):
    """An optional dependency is needed and not installed."""

    code = "missing_extra"

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """The error for a package that an extra of this distribution brings."""
        return cls(
            f"The package {package} is not installed.",
            hint=f'Install it with: pip install "d1-signer[{extra}]".',
        )


class SecretSourceError(ConfigurationError):
    """A PIN, a passphrase or a private file cannot be read, or may not be used as it is."""

    code = "secret_source"


class AuditError(D1SignerError):
    """An audit trail, a record, a checkpoint or a proof cannot be read or does not fit."""

    code = "audit"


class AuditUnavailable(AuditError):
    """The audit trail cannot take a record now, so that what it is about was not done."""

    code = "audit_unavailable"
    default_retryable = True


class SignerError(D1SignerError):
    """The key side failed."""

    code = "signer"


class InvalidSignatureError(SignerError):
    """A signature is malformed, out of range, or was not made by the key over that message."""

    code = "invalid_signature"


class InvalidKeyError(SignerError):
    """A key is not an ECDSA key on P-256 that may sign."""

    code = "invalid_key"


class KeyNotFoundError(SignerError):
    """No key, or no token that holds it, fits the selection."""

    code = "key_not_found"


class AmbiguousKeyError(SignerError):
    """More than one key, or more than one token, fits the selection."""

    code = "ambiguous_key"


class KeyExistsError(SignerError):
    """A key of that name exists already and is not overwritten."""

    code = "key_exists"


class KeyDisabledError(SignerError):
    """The key exists and may not be used now: disabled, pending deletion, destroyed."""

    code = "key_disabled"


class KeyMismatchError(SignerError):
    """The key that answered is not the key that was pinned at opening."""

    code = "key_mismatch"


class LoginError(SignerError):
    """The PIN or the credentials were refused, or may not be tried again."""

    code = "login"


class AccessDeniedError(SignerError):
    """The caller is known to the service and is not allowed to do this."""

    code = "access_denied"


class IntegrityError(SignerError):
    """A checksum or an echoed name shows that a request or an answer was altered."""

    code = "integrity"
    default_retryable = True


class SignerUnavailable(SignerError):
    """The device or the service does not answer, or answers that it cannot work now."""

    code = "signer_unavailable"
    default_retryable = True


class SignerTimeout(SignerUnavailable):
    """No signature within the deadline."""

    code = "signer_timeout"


class SignerThrottled(SignerUnavailable):
    """The service asks the caller to slow down."""

    code = "signer_throttled"


class SignerClosedError(SignerError):
    """A signer was used after ``close()``."""

    code = "signer_closed"


class CustodyError(SignerError):
    """The evidence about the key does not meet the custody policy."""

    code = "custody"


class AttestationError(CustodyError):
    """A device's signed statement about a key does not prove what it should."""

    code = "attestation"


class TokenError(D1SignerError):
    """The token side failed."""

    code = "token"


class TokenRefusedError(TokenError):
    """D1, or what stands before it, refused the assertion (HTTP 4xx, or 200 with an ``error``).

    Attributes:
        status: HTTP status code.
        error: The OAuth error code of RFC 6749 section 5.2, or ``""`` where the body had none.
    """

    code = "token_refused"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        error: str = "",
        hint: str = "",
        details: dict[str, str | int | float] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, details=details)
        self.status = status
        self.error = error


class TlsError(TokenError):
    """The server's certificate is not trusted, or the server refuses ours."""

    code = "tls"


class TokenResponseError(TokenError):
    """D1's answer is not a usable token response."""

    code = "token_response"


class TokenUnavailable(TokenError):
    """D1's token endpoint cannot be reached, or answers 408, 421, 425, 429 or 5xx."""

    code = "token_unavailable"
    default_retryable = True


class TokenTimeout(TokenUnavailable):
    """No token within the deadline of the call."""

    code = "token_timeout"


class StoreUnavailable(TokenError):
    """The fleet's token store does not answer; the fetcher goes on without it."""

    code = "store_unavailable"
    default_retryable = True


class FetcherClosedError(TokenError):
    """A token fetcher was used after ``close()``."""

    code = "fetcher_closed"

# SPDX-License-Identifier: Apache-2.0
"""Access tokens for Cloud KMS, from the application default credentials.

Each search begins anew: so files that were replaced are read again.
"""

from __future__ import annotations

import os
from typing import Any

import google.auth
from google.auth import exceptions as auth
from google.auth.credentials import Credentials, TokenState, with_scopes_if_required
from google.auth.transport.requests import Request
from google.oauth2 import service_account

from d1_signer.backends.remote import Details, Service
from d1_signer.backends.renewal import Ask, Renewed
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    LoginError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.secret import shown_path
from d1_signer.transport.failures import is_untrusted
from d1_signer.transport.foreign import quoted

# All that Cloud KMS asks for.
_SCOPES = ("https://www.googleapis.com/auth/cloudkms",)
# Seconds for each wait for a source of tokens; google-auth's own are two minutes.
_LONGEST_WAIT = 5.0
_SERVER_ERROR = 500
_ADC = "GOOGLE_APPLICATION_CREDENTIALS"
_CHECK = f"Check the application default credentials of this process ({_ADC})."


class Token:
    """An access token, and until when it is good; shown by none of them."""

    __slots__ = ("_source", "headers")

    def __init__(self, source: Credentials) -> None:
        """Take what ``source`` holds now."""
        headers: dict[str, str] = {}
        source.apply(headers)  # type: ignore[no-untyped-call]
        self.headers = tuple(headers.items())
        self._source = source

    def kind(self) -> str:
        """The kind of source that it came from."""
        return type(self._source).__module__

    def state(self) -> TokenState:
        """Fresh, stale (it ends soon), or no longer good."""
        state: TokenState = self._source.token_state
        return state

    def secrets(self) -> tuple[str, ...]:
        """What no text may repeat."""
        return tuple(value.removeprefix("Bearer ") for _, value in self.headers)

    def __repr__(self) -> str:
        return "<Token ****>"


class GcpCredentials(Renewed[Token]):
    """The access tokens of one key's calls."""

    what = "Google Cloud credentials"

    def __init__(self, universe: str, target: str) -> None:
        """Look for nothing yet.

        Args:
            universe: The cloud's domain.
            target: What is called, ``HOST:PORT``.
        """
        super().__init__()
        self._universe = universe
        self._target = target

    def find(self, ask: Ask) -> Token:
        """See `Renewed`; only the kind of source that was found first is taken later on."""
        found: Token = GCP_CREDENTIALS.ask("for an access token", self._find, ask)
        held = self.held()
        if held is not None and held.kind() != found.kind():
            raise LoginError(
                f"The {self.what} came from {held.kind()}, which gives none now; those from "
                f"{found.kind()} are not taken instead.",
                hint=_CHECK,
                retryable=True,
                details={"phase": "credentials"},
            )
        return found

    def _find(self, _: Ask) -> Token:
        # Without scopes: with them, it would ask another API for the name of the project.
        source: Any = google.auth.default()[0]
        source = with_scopes_if_required(  # type: ignore[no-untyped-call]
            source, None, default_scopes=_SCOPES
        )
        if isinstance(source, service_account.Credentials):
            # It signs its own access tokens, as the SDK has it: no server is asked.
            source = source.with_always_use_jwt_access(  # type: ignore[no-untyped-call]
                always_use_jwt_access=True
            )
        if hasattr(source, "with_gdch_audience"):
            source = source.with_gdch_audience(f"https://{self._target}/")
        if source.universe_domain != self._universe:
            raise ConfigurationError(
                f"The {self.what} are of another cloud than {self._universe}: "
                f"{quoted(str(source.universe_domain))}.",
                hint="Name the cloud as universe_domain; GOOGLE_CLOUD_UNIVERSE_DOMAIN is not used.",
                details={"phase": "credentials"},
            )
        request = _Bounded()
        try:
            source.refresh(request)
        except auth.GoogleAuthError:
            if request.status < _SERVER_ERROR:
                raise
            # google-auth does not tell it apart everywhere from a refusal.
            text = f"it answers with status {request.status}"
            raise auth.TransportError(text) from None  # type: ignore[no-untyped-call]
        return Token(source)

    def is_ageing(self, held: Token) -> bool:
        """See `Renewed`."""
        return held.state() is not TokenState.FRESH

    def is_over(self, held: Token) -> bool:
        """See `Renewed`."""
        return held.state() is TokenState.INVALID

    def are_same(self, held: Token, other: Token) -> bool:
        """See `Renewed`."""
        return held.headers == other.headers

    def not_in_time(self) -> SignerTimeout:
        """See `Renewed`."""
        return SignerTimeout(
            "The search for Google Cloud credentials brought nothing within the deadline.",
            hint="Look at what google-auth asks for them: the metadata server, a token endpoint, "
            "an executable.",
            details={"phase": "credentials"},
        )


class _Bounded(Request):
    """google-auth's way to speak HTTP, which waits less.

    Attributes:
        status: HTTP status of the last answer.
    """

    status = 0

    def __call__(self, url: str, *args: Any, **options: Any) -> Any:
        """See `google.auth.transport.Request`."""
        asked = options.pop("timeout", None) or _LONGEST_WAIT
        options["timeout"] = min(asked, _LONGEST_WAIT)
        answer: Any = super().__call__(url, *args, **options)  # type: ignore[no-untyped-call]
        self.status = answer.status
        return answer


def _refused(error: Exception, doing: str) -> D1SignerError:
    name = type(error).__name__
    details: Details = {"phase": "credentials", "sdk_error": name}
    kind: type[D1SignerError] = LoginError
    hint, retryable = _CHECK, False
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, OSError) and error.filename:
        text = f"{shown_path(error.filename)}: {error.strerror}"
    elif isinstance(error, auth.TransportError | OSError):
        kind, retryable = SignerUnavailable, not is_untrusted(error)
        hint = "Check that what gives the access tokens is reached, and that it is trusted."
    elif isinstance(error, auth.DefaultCredentialsError):
        # An instance's metadata may be away for a moment; google-auth does not tell that.
        named = os.environ.get(_ADC) or os.environ.get("NO_GCE_CHECK", "").lower() == "true"
        retryable = not named
    elif isinstance(error, auth.GoogleAuthError):
        retryable = bool(error.retryable)
        kind = SignerUnavailable if retryable else LoginError
    # It may quote the exchange: what is long in it is masked.
    told = f" {quoted(text)}" if text else ""
    return kind(
        f"No {GcpCredentials.what}: google-auth could not be asked {doing}: {name}{told}.",
        hint=hint,
        retryable=retryable,
        details=details,
    )


GCP_CREDENTIALS = Service(
    name="The source of Google Cloud credentials",
    packages="google-auth",
    altered_hint=_CHECK,
    failures=(),
    refused=_refused,
)

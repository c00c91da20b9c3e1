# SPDX-License-Identifier: Apache-2.0
"""A client of Vault's HTTP API, as much of it as signing needs.

Redirects are not followed: the request holds a token, and the other host may not be trusted with
it. Proxies and ``.netrc`` of the environment are not used. TLS is verified always.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from d1_signer.backends.remote import Failures, Meaning, Service
from d1_signer.errors import (
    AccessDeniedError,
    ConfigurationError,
    D1SignerError,
    KeyDisabledError,
    KeyNotFoundError,
    LoginError,
    SignerError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.secret import Secret
from d1_signer.transport.exchange import Answer, Http
from d1_signer.transport.hosts import check_endpoint
from d1_signer.transport.tls import verifying_context

# In this order: a class before the classes it derives from.
_FAILURES: Failures = (
    ((SSLError,), SignerUnavailable, "TLS failed: check VAULT_CACERT and the name in VAULT_ADDR."),
    ((ConnectTimeoutError, ReadTimeoutError), SignerTimeout, "Check that Vault can be reached."),
    ((HTTPError, OSError), SignerUnavailable, "Check VAULT_ADDR and the network."),
    ((ValueError,), SignerError, "Check the settings; a token is plain ASCII text."),
)

VAULT = Service(
    name="Vault",
    packages="d1-signer and urllib3",
    altered_hint="Something between this process and Vault alters answers, or it is not Vault.",
    failures=_FAILURES,
)

_OK = range(200, 300)
_REDIRECTS = range(300, 400)
# A standby that lags behind (412, 472, 473), sealed, in maintenance, or broken.
_PASSING = frozenset({412, 472, 473, 500, 502, 503, 504})

_LOCATION = "Check the key's name, its mount and the namespace."
# What a status means, by a text in its message where only that tells the causes apart.
_TEXTS: dict[int, tuple[tuple[str, type[D1SignerError], str], ...]] = {
    400: (
        ("not found", KeyNotFoundError, _LOCATION),
        ("invalid role", LoginError, "Check the AppRole's role id."),
        ("secret id", LoginError, "Check the AppRole's secret id: wrong, used up or expired."),
    ),
    403: (
        ("invalid token", LoginError, "The token has expired or was revoked."),
        ("", AccessDeniedError, "Check the token, and its policy on keys/NAME and sign/NAME."),
    ),
    404: (("", KeyNotFoundError, _LOCATION),),
    429: (("", SignerThrottled, "Raise the rate limit quota, or reuse tokens longer."),),
    500: (("minimum", KeyDisabledError, "The version is below the key's min_encryption_version."),),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where Vault is: the options of `open_backend`, put together."""

    address: str
    namespace: str | None
    ca_file: str | None
    connect_timeout: float
    read_timeout: float


def read_settings(
    address: str | None,
    namespace: str | None,
    ca_file: str | None,
    *,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
) -> Settings:
    """Fill in from the environment what is None, as Vault's command line does.

    Raises:
        ConfigurationError: The address is not https, nor http on loopback.
    """
    address = address or os.environ.get("VAULT_ADDR") or "https://127.0.0.1:8200"
    check_endpoint(address, "address of Vault")
    return Settings(
        address=address,
        namespace=namespace or os.environ.get("VAULT_NAMESPACE"),
        ca_file=ca_file or os.environ.get("VAULT_CACERT"),
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )


class HttpClient:
    """Sends requests to one Vault server. Thread-safe; one for each process."""

    def __init__(self, settings: Settings) -> None:
        """Prepare connections; none is opened yet."""
        self._namespace = settings.namespace
        self._base = f"{settings.address.rstrip('/')}/v1/"
        self._http = Http(
            "Vault",
            _ssl_context(settings.ca_file),
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )

    def request(
        self,
        doing: str,
        method: str,
        path: str,
        *,
        until: float,
        token: Secret | None = None,
        fields: Mapping[str, object] | None = None,
        secrets: Mapping[str, Secret] | None = None,
    ) -> dict[str, Any]:
        """Send one request; again, once, where a kept connection turned out to be closed.

        Args:
            doing: What is asked for, such as ``"to sign"``.
            method: HTTP method.
            path: Path below ``/v1/``.
            until: Moment on ``time.monotonic()`` by which to answer or raise.
            token: Sent as ``X-Vault-Token``.
            fields: Members of the JSON body.
            secrets: More members of it, which no error may show.

        Returns:
            The answer's JSON object; empty for an answer without a body.
        """

        def send() -> Answer:
            # The secrets are in the frames below this one, which `ask` leaves behind.
            return self._http.exchange(
                method,
                self._base + path,
                headers=_headers(self._namespace, token),
                body=_body(fields, secrets),
                until=until,
            )

        answer = VAULT.ask(doing, _again, send)
        try:
            told = json.loads(answer.body) if answer.body else {}
        except ValueError:
            told = None
        if answer.status not in _OK:
            raise _refused(answer.status, told, doing, answer.headers.get("Location", ""))
        if not isinstance(told, dict):
            raise VAULT.altered(f"answered {doing} without JSON.")
        return told

    def close(self) -> None:
        """Close the connections that are kept."""
        self._http.close()


def _again(send: Callable[[], Answer]) -> Answer:
    try:
        return send()
    except ProtocolError:  # as where a kept connection turned out to be closed
        return send()


def _body(
    fields: Mapping[str, object] | None, secrets: Mapping[str, Secret] | None
) -> bytes | None:
    if fields is None and secrets is None:
        return None
    revealed = {name: secret.reveal() for name, secret in (secrets or {}).items()}
    return json.dumps({**(fields or {}), **revealed}).encode()


def _headers(namespace: str | None, token: Secret | None) -> dict[str, str]:
    # X-Vault-Request is what a Vault Agent may ask for, against request forgery.
    headers = {"X-Vault-Request": "true", "Content-Type": "application/json"}
    if namespace:
        headers["X-Vault-Namespace"] = namespace
    if token is not None:
        headers["X-Vault-Token"] = token.reveal()
    return headers


def _ssl_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return verifying_context(ca_file)
    except (OSError, ssl.SSLError):
        raise ConfigurationError(
            f"The CA file for Vault cannot be read: {ca_file}.",
            hint="It holds certificates in PEM; see VAULT_CACERT.",
        ) from None


def _refused(status: int, told: object, doing: str, location: str) -> D1SignerError:
    if status in _REDIRECTS:
        host = urlsplit(location).hostname or "nowhere"
        return SignerUnavailable(
            f"Vault redirects to {host}; this is not followed, since the token would go there.",
            hint="Name the active node or its load balancer in VAULT_ADDR.",
            details={"status": status},
        )
    errors = told.get("errors") if isinstance(told, dict) else None
    message = " ".join(" ".join(map(str, errors)).split()) if isinstance(errors, list) else ""
    meaning = _meaning(status, message.lower())
    return VAULT.refusal(doing, f"status {status}", message, meaning, {"status": status})


def _meaning(status: int, message: str) -> Meaning:
    for text, kind, hint in _TEXTS.get(status, ()):
        if text in message:
            return kind, hint
    if status in _PASSING:
        return SignerUnavailable, "Look at the state of Vault: sealed, a standby, failing over."
    return SignerError, "See the status in the documentation of Vault's API."

# SPDX-License-Identifier: Apache-2.0
"""A client of Vault's HTTP API, as much of it as signing needs.

Redirects are not followed: the request holds a token, and the other host may not be trusted with
it. Proxies and ``.netrc`` of the environment are not used. TLS is verified always.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d1_signer.backends.vault.failures import (
    Again,
    Failure,
    OnTheWay,
    Purpose,
    on_the_way,
    refused,
    service_at,
)
from d1_signer.backends.vault.settings import Settings
from d1_signer.errors import ConfigurationError, D1SignerError, SignerTimeout
from d1_signer.secret import Secret
from d1_signer.transport.exchange import Answer, Http

_OK = range(200, 300)
_BAD_REQUEST = 400
# Seconds before a request is sent again; the last for all that follow. A leader that was lost is
# replaced within a few seconds.
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)


class Told(dict[str, Any]):
    """The JSON object of an answer; it may hold a token."""

    def __repr__(self) -> str:
        return "<an answer of Vault>"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    purpose: Purpose
    method: str
    path: str
    until: float
    token: Secret | None
    fields: Mapping[str, object] | None
    secrets: Mapping[str, Secret]
    namespaced: bool

    def headers(self, namespace: str | None) -> dict[str, str]:
        # X-Vault-Request is what a Vault Agent may ask for, against request forgery.
        headers = {"X-Vault-Request": "true", "Content-Type": "application/json"}
        if namespace and self.namespaced:
            headers["X-Vault-Namespace"] = namespace
        if self.token is not None:
            headers["X-Vault-Token"] = self.token.reveal()
        return headers

    def body(self) -> bytes | None:
        if self.fields is None and not self.secrets:
            return None
        revealed = {name: secret.reveal() for name, secret in self.secrets.items()}
        return json.dumps({**(self.fields or {}), **revealed}).encode()

    def sent(self) -> list[str]:
        token = [] if self.token is None else [self.token]
        return [secret.reveal() for secret in [*token, *self.secrets.values()]]


class HttpClient:
    """Sends requests to one Vault server. Thread-safe; one for each process.

    Attributes:
        settings: Where it is.
        service: Its name and its failures.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepare connections; none is opened yet."""
        self.settings = settings
        self.service = service_at(settings.endpoint)
        path = settings.socket_path
        self._base = f"{'http://localhost' if path else settings.address.rstrip('/')}/v1/"
        self._http = Http(
            self.service.name,
            settings.context(),
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            proxy=settings.proxy,
            socket_path=path,
        )

    def request(
        self,
        purpose: Purpose,
        method: str,
        path: str,
        *,
        until: float,
        token: Secret | None = None,
        fields: Mapping[str, object] | None = None,
        secrets: Mapping[str, Secret] | None = None,
        counted: bool = False,
        namespaced: bool = True,
    ) -> Told:
        """Send a request; again, until the time is over, where what failed may pass.

        That is what Vault's own client does (connections that break, 412, 429 and 5xx), which
        gives up after three attempts.

        Args:
            purpose: What is asked for.
            method: HTTP method.
            path: Path below ``/v1/``.
            until: Moment on ``time.monotonic()`` by which to answer or raise.
            token: Sent as ``X-Vault-Token``.
            fields: Members of the JSON body.
            secrets: More members of it, which no error may show.
            counted: Vault counts attempts: nothing is sent again that it may have dealt with.
            namespaced: Whether the path is one of the namespace, where there is one.

        Returns:
            The answer's JSON object; empty for an answer without a body.
        """
        call = _Call(
            purpose=purpose,
            method=method,
            path=path,
            until=until,
            token=token,
            fields=fields,
            secrets=secrets or {},
            namespaced=namespaced,
        )
        if counted:
            self._http.forget()  # a kept connection that is dead would leave it open what happened
        attempts, silences = 0, 0
        while True:
            told = self._told(call)
            if isinstance(told, Told):
                return told
            attempts += 1
            silences += told.silent
            told.error.details.setdefault("attempts", attempts)
            pause = _pause(attempts, told)
            # A second silence says that it is not the connection.
            final = told.again is Again.NEVER or silences > 1
            if final or (counted and told.again is not Again.UNSEEN):
                raise told.error
            now = time.monotonic()
            if now >= until:
                raise _too_late(told.error)
            if now + pause >= until:
                raise told.error  # which says more than that the time is over
            time.sleep(pause)
            if time.monotonic() >= until:
                raise told.error

    def _told(self, call: _Call) -> Told | Failure:
        """The answer, or why there is none; whatever holds a secret is over when this returns."""
        went_wrong = [OnTheWay(Again.NEVER)]

        def send() -> Answer:
            # The secrets are in the frames below this one, which `ask` leaves behind.
            try:
                return self._http.exchange(
                    call.method,
                    self._base + call.path,
                    headers=call.headers(self.settings.namespace),
                    body=call.body(),
                    until=call.until,
                )
            except Exception as error:
                went_wrong.append(on_the_way(error))
                raise

        try:
            answer = self.service.ask(call.purpose.doing, send)
        except D1SignerError as error:
            return Failure.on_the_way(self.named(error, call.purpose), went_wrong[-1])
        told = _object(answer.body)
        if answer.status in _OK and told is not None:
            return told
        if answer.status in _OK:
            altered = self.service.altered(f"gave no JSON when asked {call.purpose.doing}.")
            return Failure(self.named(altered, call.purpose), Again.NEVER)
        if told is None and self._wants_tls(answer):
            wanted = ConfigurationError(
                f"{self.service.name} speaks TLS, and was asked in plain http.",
                hint="Write https:// in VAULT_ADDR.",
            )
            return Failure(self.named(wanted, call.purpose), Again.NEVER)
        failure = refused(
            self.service,
            call.purpose,
            answer.status,
            told,
            headers=answer.headers,
            sent=call.sent(),
        )
        self.named(failure.error, call.purpose)
        return failure

    def _wants_tls(self, answer: Answer) -> bool:
        """Whether it says so in words of its own: Go's server, which Vault's is, and gateways."""
        plain = self.settings.address.startswith("http:")
        return plain and answer.status == _BAD_REQUEST and b"HTTPS" in answer.body

    def altered(self, purpose: Purpose, what: str) -> D1SignerError:
        """The error for an answer that is not one to what was asked; ``what`` follows the name."""
        return self.named(self.service.altered(what), purpose)

    def named(self, error: D1SignerError, purpose: Purpose) -> D1SignerError:
        """The error, with the phase and the endpoint in its details where they are not yet."""
        error.details.setdefault("phase", str(purpose.phase))
        error.details.setdefault("endpoint", self.settings.endpoint)
        return error

    @contextlib.contextmanager
    def naming(self, purpose: Purpose) -> Iterator[None]:
        """Whatever error comes out, `named`."""
        try:
            yield
        except D1SignerError as error:
            self.named(error, purpose)
            raise

    def close(self) -> None:
        """Close the connections that are kept."""
        self._http.close()


def _too_late(error: D1SignerError) -> SignerTimeout:
    """That the time is over, in the words of what was met last, which say more."""
    return SignerTimeout(error.message, hint=error.hint, details=error.details)


def _pause(attempts: int, failure: Failure) -> float:
    if attempts == 1 and failure.again is Again.HARMLESS and "status" not in failure.error.details:
        return 0.0  # most often a kept connection that the other side had closed
    pause = _PAUSES[min(attempts, len(_PAUSES)) - 1] * random.uniform(0.75, 1.25)  # noqa: S311
    return max(pause, failure.after)


def _object(body: bytes) -> Told | None:
    try:
        value = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return None
    return Told(value) if isinstance(value, dict) else None

# SPDX-License-Identifier: Apache-2.0
"""Where Vault's tokens come from, what to do when one is refused, and requests with them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from d1_signer.backends.vault.http import VAULT, HttpClient, Settings
from d1_signer.errors import AccessDeniedError, LoginError
from d1_signer.secret import Secret, SecretSource, read_secret
from d1_signer.transport.deadlines import no_time_left, within
from d1_signer.transport.processes import PerProcess

# A token is replaced when this share of its life is over, so that none expires on its way.
_USABLE_SHARE = 0.9
# Seconds between two logins on a refusal: a policy that lacks a line must not become a login storm.
_LOGIN_INTERVAL = 10.0


class Tokens(Protocol):
    """Gives the token for a request."""

    def current(self, http: HttpClient, until: float) -> Secret:
        """The token to send."""
        ...

    def after_refusal(self, http: HttpClient, until: float, refused: Secret) -> Secret | None:
        """Another token than the one that was refused, or None where there is none."""
        ...


class GivenTokens:
    """A token that somebody else renews: an operator, or a Vault Agent that writes a file."""

    def __init__(self, source: SecretSource | None) -> None:
        """Read from ``source``; None: ``VAULT_TOKEN``, else ``~/.vault-token``, as Vault's CLI."""
        self._source = source
        self._token: Secret | None = None

    def for_this_process(self) -> GivenTokens:
        """The same, its token read."""
        if self._token is None:
            self._token = self._read()
        return self

    def current(self, http: HttpClient, until: float) -> Secret:  # noqa: ARG002 (see the protocol)
        """The token as it was read last."""
        return self._token or within(until, self._read)

    def after_refusal(
        self,
        http: HttpClient,  # noqa: ARG002 (see the protocol)
        until: float,
        refused: Secret,
    ) -> Secret | None:
        """The token as its source gives it now, where that is another one."""
        token = self._token = within(until, self._read)
        return token if token.reveal() != refused.reveal() else None

    def _read(self) -> Secret:
        if self._source is not None:
            return read_secret(self._source, what="Vault token")
        if os.environ.get("VAULT_TOKEN"):
            return read_secret("env:VAULT_TOKEN", what="Vault token")
        file = Path.home() / ".vault-token"
        if not file.exists():
            raise LoginError(
                "There is no Vault token.",
                hint="Set VAULT_TOKEN, run vault login, or name a token source or an AppRole.",
            )
        return read_secret(f"file:{file}", what="Vault token")


@dataclass
class _Held:
    """The token of the last login; a forked child goes on with its parent's."""

    token: Secret | None = None
    usable_until: float = 0.0
    logged_in_at: float = float("-inf")


@dataclass
class AppRoleTokens:
    """Tokens by AppRole login, made anew before they expire.

    Attributes:
        role_id: The role id, which is no secret.
        secret_id: Where the secret id comes from, read at each login.
        mount: Where the auth method is mounted.
    """

    role_id: str
    secret_id: SecretSource = field(repr=False)
    mount: str
    _held: _Held = field(default_factory=_Held)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def for_this_process(self) -> AppRoleTokens:
        """The same with a lock of its own: the parent's may have been held when it forked."""
        return AppRoleTokens(self.role_id, self.secret_id, self.mount, self._held)

    def current(self, http: HttpClient, until: float) -> Secret:
        """The token of the last login, or of a new one where its life is nearly over."""
        held = self._held
        if held.token is not None and time.monotonic() < held.usable_until:
            return held.token
        with self._alone(until):
            held = self._held
            if held.token is not None and time.monotonic() < held.usable_until:
                return held.token
            return self._login(http, until)

    def after_refusal(self, http: HttpClient, until: float, refused: Secret) -> Secret | None:
        """The token of a new login, unless the last one was a moment ago."""
        with self._alone(until):
            held = self._held
            if held.token is not None and held.token is not refused:
                return held.token
            if time.monotonic() - held.logged_in_at < _LOGIN_INTERVAL:
                return None
            return self._login(http, until)

    @contextlib.contextmanager
    def _alone(self, until: float) -> Iterator[None]:
        # Threads that wait for one login would otherwise each begin their own in turn, where the
        # server hangs, and wait for all of them.
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise no_time_left()
        try:
            yield
        finally:
            self._lock.release()

    def _login(self, http: HttpClient, until: float) -> Secret:
        started = time.monotonic()
        secret_id = within(until, lambda: read_secret(self.secret_id, what="AppRole secret id"))
        auth = http.request(
            "to log in",
            "POST",
            f"auth/{self.mount}/login",
            until=until,
            fields={"role_id": self.role_id},
            secrets={"secret_id": secret_id},
        ).pop("auth", None)
        token = auth.pop("client_token", None) if isinstance(auth, dict) else None
        if not isinstance(token, str) or not token:
            raise VAULT.altered("answered a login without a token.")
        life = auth.get("lease_duration")
        # 0 is a token that does not expire.
        seconds = life * _USABLE_SHARE if isinstance(life, int) and life > 0 else float("inf")
        secret = Secret(token)
        self._held = _Held(secret, started + seconds, started)
        return secret


class Client:
    """A server and the token for it; one for each process."""

    def __init__(self, http: HttpClient, tokens: Tokens) -> None:
        self.http = http
        self._tokens = tokens

    def ask(
        self,
        doing: str,
        method: str,
        path: str,
        *,
        until: float,
        fields: dict[str, object] | None = None,
    ) -> dict[str, Any]:
        """Send a request; again, once, where its token was refused and another one is there."""
        token = self._tokens.current(self.http, until)
        try:
            return self.http.request(doing, method, path, until=until, token=token, fields=fields)
        except (AccessDeniedError, LoginError) as error:
            refusal = error
        token_now = self._tokens.after_refusal(self.http, until, token)
        if token_now is None:
            raise refusal
        return self.http.request(doing, method, path, until=until, token=token_now, fields=fields)

    def close(self) -> None:
        """Close the connections that are kept."""
        self.http.close()


def clients(settings: Settings, tokens: GivenTokens | AppRoleTokens) -> PerProcess[Client]:
    """The client of each process; a child's goes on with the token of its parent's login."""
    latest = tokens

    def make() -> Client:
        nonlocal latest
        latest = latest.for_this_process()
        return Client(HttpClient(settings), latest)

    made = PerProcess(make)
    made.get()  # before any time limit begins, since a person may type the token
    return made

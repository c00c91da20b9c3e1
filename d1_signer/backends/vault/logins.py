# SPDX-License-Identifier: Apache-2.0
"""Logins: by AppRole, by JWT or Kubernetes service account, by client certificate."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from d1_signer.backends.vault.failures import TO_LOG_IN, TO_UNWRAP, Refused
from d1_signer.backends.vault.held import Held
from d1_signer.backends.vault.http import HttpClient, Told
from d1_signer.backends.vault.secret_ids import known
from d1_signer.errors import LoginError, SecretSourceError
from d1_signer.secret import Secret, SecretSource, read_public_file, read_secret
from d1_signer.transport.deadlines import within

# Seconds for which a login is left alone whose secret was not judged: the role may be locked, by
# somebody else's wrong secret ids, or be made or changed a little later.
_DENIED_REST = 30.0
_TOKEN = re.compile(r"(hvs|hvb|hvr|s|b|r)\.[A-Za-z0-9_.-]{20,}", re.ASCII)
_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_AGAIN = (
    "It was good for a login of this process before, so it may be used up: each signer and each "
    "process needs one of its own, or one for more uses (secret_id_num_uses)."
)


@dataclass(kw_only=True)
class Login:
    """A login of some method.

    Attributes:
        mount: Where the method is mounted.
        fields: What is sent and is no secret: the role.
        name: The member of the secret; empty where the client certificate is all.
        what: What is refused, for error texts.
        source: Where the secret comes from, read at each login.
        trusted_owner: Who may own its file.
        counted: Vault counts failed attempts, and a secret may be good for one.
        hint: What to check where it is refused without a reason that the table knows.
    """

    mount: str
    fields: dict[str, object]
    name: str
    what: str
    source: SecretSource | None = field(repr=False)
    trusted_owner: int | None = None
    counted: bool = False
    hint: str
    interval: float = 10.0
    _typed: Secret | None = field(default=None, repr=False)
    _denied_at: tuple[bytes, float] | None = None

    def prepare(self, vault: str) -> None:
        """Ask for what a person types; see `Source`."""
        if self.source == "prompt" and self._typed is None:
            self._typed = read_secret("prompt", what=self.what, of=vault)

    def obtain(self, http: HttpClient, until: float) -> Held:
        """Log in; see `Source`.

        Raises:
            LoginError: Refused, now or before.
        """
        secret = within(until, self._read)
        if self.name == "secret_id":
            secret = self._unwrapped(http, secret, until)
        digest = known.digest(*self._place(http), repr(self.fields), secret.reveal())
        if not self.counted:
            return self._log_in(http, secret, digest, until)
        with known.alone(digest, until):
            return self._log_in(http, secret, digest, until)

    def _log_in(self, http: HttpClient, secret: Secret, digest: bytes, until: float) -> Held:
        self._check_may_try(digest)
        began = time.monotonic()
        try:
            held = Held.of(self._ask(http, secret, until), began)
        except LoginError as error:
            refusal = error
        else:
            if held is None:
                raise http.altered(TO_LOG_IN, "answered a login without a token.")
            if self.counted:
                known.good.add(digest)
            return held
        refused = refusal.details.get("refused")
        if self.counted and refused == Refused.SECRET:
            known.refused.add(digest)
            if digest in known.good:
                refusal.hint = f"{refusal.hint} {_AGAIN}"
        else:
            self._denied_at = (digest, time.monotonic())
        if refused is None:
            refusal.hint = self.hint
        raise refusal

    def _place(self, http: HttpClient) -> tuple[str, ...]:
        """Which Vault it is, and the method's place there."""
        return (http.settings.endpoint.lower(), http.settings.namespace or "", self.mount)

    def _ask(self, http: HttpClient, secret: Secret, until: float) -> Told:
        return http.request(
            TO_LOG_IN,
            "POST",
            f"auth/{self.mount}/login",
            until=until,
            fields=self.fields,
            secrets={self.name: secret} if self.name else None,
            counted=self.counted,
        )

    def _check_may_try(self, digest: bytes) -> None:
        if digest in known.refused:
            again = f" {_AGAIN}" if digest in known.good else ""
            raise LoginError(
                f"Vault refused the {self.what} before; it is not sent again.",
                hint=f"{self.hint} Once its source gives another one, that is sent.{again}",
            )
        if self._denied_at is not None and self._denied_at[0] == digest:
            rest = self._denied_at[1] + _DENIED_REST - time.monotonic()
            if rest > 0:
                raise LoginError(
                    f"Vault denied the login a moment ago; the next try is in {rest:.0f} s.",
                    hint=self.hint,
                    retryable=True,
                )

    def _read(self) -> Secret:
        if self._typed is not None:
            return self._typed
        if self.source is None:
            return self._without_source()
        return read_secret(self.source, what=self.what, trusted_owner=self.trusted_owner)

    def _without_source(self) -> Secret:
        if not self.name:
            # The certificate is shown by the connection; here it only tells one from another.
            return Secret("-")
        return _service_account_token()

    def _unwrapped(self, http: HttpClient, secret: Secret, until: float) -> Secret:
        """The secret id, where the source gives a token that wraps it (response wrapping)."""
        if not _TOKEN.fullmatch(secret.reveal()):
            return secret
        digest = known.digest("wrapping", *self._place(http), secret.reveal())
        with known.alone(digest, until):
            inner = known.unwrapped.get(digest)
            if inner is None:
                self._check_may_try(digest)
                inner = self._unwrap(http, secret, digest, until)
                known.keep(digest, inner)
            return inner

    def _unwrap(self, http: HttpClient, wrapping: Secret, digest: bytes, until: float) -> Secret:
        try:
            path = _wrapped_at(http, wrapping, until)
            inner = _inside(http, wrapping, until) if self._is_ours(path) else None
        except LoginError as error:
            if error.details.get("refused") == Refused.SECRET:
                known.refused.add(digest)
            else:  # of a gateway, or while Vault is not ready: it may still be good
                self._denied_at = (digest, time.monotonic())
            raise
        if inner is None:
            raise LoginError(
                "What the wrapping token holds was not wrapped as an AppRole's secret id.",
                hint="Somebody may have put it there: treat the secret id as stolen, and wrap "
                "a new one.",
            )
        return inner

    def _is_ours(self, path: object) -> bool:
        role = rf"(.*/)?auth/{re.escape(self.mount)}/role/[^/]+/(custom-)?secret-id"
        return isinstance(path, str) and re.fullmatch(role, path) is not None


def _wrapped_at(http: HttpClient, wrapping: Secret, until: float) -> object:
    """The path whose answer was wrapped."""
    path, secrets_sent = "sys/wrapping/lookup", {"token": wrapping}
    told = http.request(TO_UNWRAP, "POST", path, until=until, secrets=secrets_sent)
    data = told.get("data")
    return data.get("creation_path") if isinstance(data, dict) else None


def _inside(http: HttpClient, wrapping: Secret, until: float) -> Secret | None:
    told = http.request(
        TO_UNWRAP, "POST", "sys/wrapping/unwrap", until=until, token=wrapping, counted=True
    )
    data = told.get("data")
    secret_id = data.get("secret_id") if isinstance(data, dict) else None
    return Secret(secret_id) if isinstance(secret_id, str) and secret_id else None


def _service_account_token() -> Secret:
    # Not `read_secret`: the kubelet chooses the mode, 0644 where a pod names no user or group, and
    # nobody can change it. The file is mounted into this pod alone.
    try:
        return Secret(read_public_file(_SERVICE_ACCOUNT).decode("ascii").strip())
    except (OSError, ValueError):
        pass
    raise SecretSourceError(
        f"The service account's token cannot be read: {_SERVICE_ACCOUNT}.",
        hint="Let the pod have one (automountServiceAccountToken), or name jwt_source.",
    )


def app_role(
    role_id: str, source: SecretSource, mount: str, trusted_owner: int | None = None
) -> Login:
    """By AppRole; its source may give a token that wraps the secret id."""
    return Login(
        mount=mount,
        fields={"role_id": role_id},
        name="secret_id",
        what="AppRole secret id",
        source=source,
        trusted_owner=trusted_owner,
        counted=True,
        hint="Check the AppRole's secret id (wrong, used up, expired, locked) and its role id.",
    )


def jwt(
    role: str | None,
    source: SecretSource | None,
    mount: str,
    trusted_owner: int | None = None,
    *,
    what: str = "JWT",
) -> Login:
    """By a JWT: of an issuer that Vault trusts, or of a Kubernetes service account."""
    return Login(
        mount=mount,
        fields={} if role is None else {"role": role},
        name="jwt",
        what=what,
        source=source,
        trusted_owner=trusted_owner,
        hint=f"Check the {what} (expired, another audience) and what the role is bound to.",
    )


def certificate(role: str | None, mount: str) -> Login:
    """By the client certificate of the connection."""
    return Login(
        mount=mount,
        fields={} if role is None else {"name": role},
        name="",
        what="client certificate",
        source=None,
        hint="Check the client certificate, and the role's certificate and allowed names.",
    )

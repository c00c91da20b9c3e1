# SPDX-License-Identifier: Apache-2.0
"""Which credentials a signer has, from options and URI: exactly one kind, and nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from d1_signer.backends.vault import logins
from d1_signer.backends.vault.held import GivenToken, Source
from d1_signer.backends.vault.settings import Settings
from d1_signer.errors import ConfigurationError
from d1_signer.secret import SecretSource

NAMES = (
    "token_source",
    "auth",
    "auth_mount",
    "role_id",
    "secret_id_source",
    "role",
    "jwt_source",
    "trusted_owner",
)
"""The options, whose names in a URI have hyphens."""

MOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
"""The path at which an engine or a login is mounted."""


@dataclass(frozen=True, slots=True)
class _Kind:
    needed: frozenset[str]
    possible: frozenset[str]


_KINDS = {
    "token": _Kind(frozenset(), frozenset({"token_source"})),
    "approle": _Kind(frozenset({"role_id", "secret_id_source"}), frozenset({"auth_mount"})),
    "jwt": _Kind(frozenset({"jwt_source"}), frozenset({"role", "auth_mount"})),
    "kubernetes": _Kind(frozenset({"role"}), frozenset({"jwt_source", "auth_mount"})),
    "cert": _Kind(frozenset(), frozenset({"role", "auth_mount"})),
}


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """The options of `open_backend` that say who asks."""

    token_source: SecretSource | None = None
    auth: str | None = None
    auth_mount: str | None = None
    role_id: str | None = None
    secret_id_source: SecretSource | None = None
    role: str | None = None
    jwt_source: SecretSource | None = None
    trusted_owner: int | None = None

    def completed(self, query: Mapping[str, str]) -> Credentials:
        """With what a URI says; an option that is not None wins.

        Raises:
            ConfigurationError: The trusted owner is not a number.
        """
        chosen: dict[str, object] = {}
        for name in NAMES:
            value = getattr(self, name)
            chosen[name] = query.get(name.replace("_", "-")) if value is None else value
        owner = chosen["trusted_owner"]
        if isinstance(owner, str) and owner.isascii() and owner.isdigit() and len(owner) <= 10:  # noqa: PLR2004
            chosen["trusted_owner"] = int(owner)
        elif owner is not None and (not isinstance(owner, int) or isinstance(owner, bool)):
            raise ConfigurationError("trusted_owner is not the number of a user (uid).")
        return Credentials(**chosen)  # type: ignore[arg-type]  # texts of a URI, as options are

    def source(self, settings: Settings) -> Source:
        """What gives the tokens.

        Raises:
            ConfigurationError: Something is missing, or given and not used.
        """
        kind = self._kind()
        mount = self.auth_mount or kind
        if not MOUNT.fullmatch(mount):
            raise ConfigurationError("auth_mount is not the path of an auth method.")
        if kind == "cert" and not settings.client_certificate:
            raise ConfigurationError(
                "A login by certificate needs one, and an address with TLS.",
                hint="Give client_cert and client_key, or VAULT_CLIENT_CERT, VAULT_CLIENT_KEY.",
            )
        owner = self.trusted_owner
        if kind == "approle" and self.role_id is not None and self.secret_id_source is not None:
            return logins.app_role(self.role_id, self.secret_id_source, mount, owner)
        if kind == "cert":
            return logins.certificate(self.role, mount)
        if kind in {"jwt", "kubernetes"}:
            what = "JWT" if kind == "jwt" else "service account's token"
            return logins.jwt(self.role, self.jwt_source, mount, owner, what=what)
        return GivenToken(self.token_source, owner)

    def _kind(self) -> str:
        given = {
            name
            for name in NAMES
            if getattr(self, name) is not None and name not in {"auth", "trusted_owner"}
        }
        kind = self.auth
        if kind is None:
            kind = "jwt" if "jwt_source" in given else "token"
            if given & {"role_id", "secret_id_source"}:
                kind = "approle"
        known = _KINDS.get(kind)
        if known is None:
            raise ConfigurationError(
                "auth is no kind of login that is known here.", hint=f"Known: {', '.join(_KINDS)}."
            )
        missing, unused = known.needed - given, given - known.needed - known.possible
        if missing or unused:
            wrong = [f"{name} is missing" for name in sorted(missing)]
            wrong += [f"{name} is not used" for name in sorted(unused)]
            raise ConfigurationError(
                f"Vault's credentials are not clear: for auth={kind}, {', '.join(wrong)}.",
                hint=f"It takes {', '.join(sorted(known.needed | known.possible))}.",
            )
        return kind

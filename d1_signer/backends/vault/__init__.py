# SPDX-License-Identifier: Apache-2.0
"""Keys in the Transit engine of HashiCorp Vault and OpenBao: ``hashivault://KEY``.

The server is named by ``VAULT_ADDR``, ``VAULT_NAMESPACE`` and ``VAULT_CACERT``; the token comes
from ``VAULT_TOKEN`` or ``~/.vault-token``, as for Vault's own command line, or by AppRole. Its
policy needs, for a key ``d1`` in ``transit``::

    path "transit/keys/d1"           { capabilities = ["read"] }
    path "transit/sign/d1/sha2-256"  { capabilities = ["update"] }

and for `generate_key` only, ``update`` on ``transit/keys/d1``.

The version of the key is pinned when it is opened. Rotating the key changes nothing for a running
signer, which goes on with its version: D1 knows only the key that was registered.
"""

from __future__ import annotations

import contextlib
import re
from base64 import b64encode, urlsafe_b64decode
from typing import Any
from urllib.parse import quote

from d1_signer.backends.remote import RemoteBackend, client_for, facts_of
from d1_signer.backends.vault.http import VAULT, read_settings
from d1_signer.backends.vault.tokens import AppRoleTokens, Client, GivenTokens, clients
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import (
    ConfigurationError,
    InvalidKeyError,
    KeyDisabledError,
    KeyExistsError,
    KeyMismatchError,
    KeyNotFoundError,
    KeyUriError,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.processes import PerProcess

_KEY_TYPE = "ecdsa-p256"
_TIME_TO_GENERATE = 60.0  # seconds
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_SIGNATURE = re.compile(r"vault:v([1-9][0-9]*):([A-Za-z0-9_-]{86})")
_QUERY = frozenset(
    {"mount", "version", "token-source", "role-id", "secret-id-source", "auth-mount"}
)
_FACTS = (
    "type",
    "exportable",
    "allow_plaintext_backup",
    "deletion_allowed",
    "imported_key",
    "latest_version",
    "min_encryption_version",
)


class VaultBackend(RemoteBackend[Client]):
    """A version of a Transit key; see `open_backend`."""

    name = "hashivault"
    encoding = SignatureEncoding.RAW

    def __init__(
        self,
        key: str,
        clients: PerProcess[Client],
        timeout: float,
        *,
        mount: str,
        version: int | None,
    ) -> None:
        """Read the key, and pin its version (None: the latest); see `RemoteBackend`."""
        self._mount = mount
        self._asked_version = version
        self._path = f"{mount}/sign/{quote(key)}/sha2-256"
        super().__init__(key, clients, timeout)

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        described = _described(client, self._mount, self._key, until)
        self._version = _usable_version(described, self._key, self._asked_version)
        return f"{self._key} version={self._version}", _public_key(described, self._version)

    @property
    def version(self) -> int:
        """The version of the key that signs."""
        return self._version

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes with one request; the answer is r||s."""
        client, until = self._begin(deadline)
        fields: dict[str, object] = {
            "input": b64encode(digest).decode(),
            "prehashed": True,
            "marshaling_algorithm": "jws",
            "key_version": self._version,
        }
        told = client.ask("to sign", "POST", self._path, until=until, fields=fields)
        data = told.get("data")
        signature = data.get("signature") if isinstance(data, dict) else None
        match = _SIGNATURE.fullmatch(signature) if isinstance(signature, str) else None
        if match is None:
            raise VAULT.altered("answered without a signature of 64 bytes in base64url.")
        if int(match.group(1)) != self._version:
            raise KeyMismatchError(
                f"Vault signed with version {match.group(1)} of {self._key}; version "
                f"{self._version} was pinned at opening. The signature was not used.",
                hint="Register the new version with D1 first, then open the signer anew.",
            )
        return urlsafe_b64decode(match.group(2) + "==")

    def custody(self) -> Evidence:
        """Report what Vault says of the key now: it can be made exportable later on."""
        client, until = self._begin(None)
        described = _described(client, self._mount, self._key, until)
        if _public_key(described, self._version) != self._public_key:
            raise KeyMismatchError(
                f"Version {self._version} of {self._key} is another key than at opening.",
                hint="The key was deleted and made anew; register the new one with D1.",
            )
        exportable, backup = (
            described.get(name) for name in ("exportable", "allow_plaintext_backup")
        )
        facts = [
            *facts_of("Vault Transit key", {name: described.get(name) for name in _FACTS}),
            *facts_of("d1_signer", {"mount": self._mount, "version": self._version}),
        ]
        known = isinstance(exportable, bool) and isinstance(backup, bool)
        return Evidence(
            location=f"hashivault://{self._key}",
            exportable=bool(exportable or backup) if known else None,
            generated_in_place=not described.get("imported_key"),
            # Transit signs in the memory of the server's process, whatever seals its storage.
            hardware=False,
            facts=tuple(facts),
        )


def open_backend(
    uri: str,
    *,
    address: str | None = None,
    namespace: str | None = None,
    ca_file: str | None = None,
    token_source: SecretSource | None = None,
    role_id: str | None = None,
    secret_id_source: SecretSource | None = None,
    auth_mount: str | None = None,
    timeout: float = 10.0,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
) -> VaultBackend:
    """Open a Transit key: one request, which reads it.

    Args:
        uri: ``hashivault://KEY``, optionally ``?mount=`` (``transit``), ``version=`` (the latest at
            opening), ``token-source=``, ``role-id=``, ``secret-id-source=``, ``auth-mount=``.
        address: URL of the server; None: ``VAULT_ADDR``, else ``https://127.0.0.1:8200``. Plain
            http for a loopback address only.
        namespace: Namespace; None: ``VAULT_NAMESPACE``.
        ca_file: PEM file of the authorities to trust; None: ``VAULT_CACERT``, else the system's.
        token_source: Where the token comes from; None: ``VAULT_TOKEN``, else ``~/.vault-token``.
            Read again when a token is refused, so that an agent may renew it.
        role_id: Role id of an AppRole, used instead of a token.
        secret_id_source: Where its secret id comes from; read at each login.
        auth_mount: Where the AppRole method is mounted; None: ``approle``.
        timeout: Seconds for one call with all its requests.
        connect_timeout: Seconds for each attempt to connect.
        read_timeout: Seconds for each wait for bytes.

    Raises:
        KeyUriError: The URI is not of this form.
        ConfigurationError: Settings that cannot be used.
        KeyNotFoundError: No such key, or no such version.
        AccessDeniedError: The token's policy lacks a path.
        LoginError: No token, or it or the AppRole is refused.
        InvalidKeyError: Not an ecdsa-p256 key.
        KeyDisabledError: The version is below the key's ``min_encryption_version``.
        SignerUnavailable: Vault cannot be reached, is sealed, or throttles; retryable.
    """
    parsed, mount, key = _read_uri(uri)
    version = parsed.query.get("version")
    if version is not None and not _VERSION.fullmatch(version):
        raise KeyUriError("The version in the hashivault: URI is not a number.")
    settings = read_settings(
        address,
        namespace,
        ca_file,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )
    tokens = _tokens(parsed, token_source, role_id, secret_id_source, auth_mount)
    number = None if version is None else int(version)
    return VaultBackend(key, clients(settings, tokens), timeout, mount=mount, version=number)


def generate_key(
    uri: str,
    *,
    address: str | None = None,
    namespace: str | None = None,
    ca_file: str | None = None,
    token_source: SecretSource | None = None,
    role_id: str | None = None,
    secret_id_source: SecretSource | None = None,
    auth_mount: str | None = None,
) -> GeneratedKey:
    """Make an ecdsa-p256 key that is not exportable.

    ``uri`` is that of `open_backend` without a version, and so are the options.

    Raises:
        KeyExistsError: The key exists.
        KeyUriError: The URI names a version, or is not of this form.
        SignerError: As for `open_backend`.
    """
    parsed, mount, key = _read_uri(uri)
    if "version" in parsed.query:
        raise KeyUriError("A new key is named without a version.", hint="It begins with 1.")
    settings = read_settings(address, namespace, ca_file, read_timeout=10.0)
    tokens = _tokens(parsed, token_source, role_id, secret_id_source, auth_mount)
    with client_for(clients(settings, tokens), _TIME_TO_GENERATE) as (client, until):
        path = f"{mount}/keys/{quote(key)}"
        # Vault answers the making of a key that exists as if it had made it.
        with contextlib.suppress(KeyNotFoundError):
            client.ask("to look for the key", "GET", path, until=until)
            raise KeyExistsError(f"The Transit key {key} exists.", hint="Choose another name.")
        fields: dict[str, object] = {
            "type": _KEY_TYPE,
            "exportable": False,
            "allow_plaintext_backup": False,
        }
        client.ask("to make a key", "POST", path, until=until, fields=fields)
        public_key = _public_key(_described(client, mount, key, until), 1)
    return GeneratedKey(uri=f"{uri}{'&' if '?' in uri else '?'}version=1", public_key=public_key)


def _read_uri(uri: str) -> tuple[KeyUri, str, str]:
    parsed = KeyUri.parse(uri, query_names=_QUERY)
    mount = parsed.query.get("mount", "transit")
    if parsed.path not in {"", "/"} or not _NAME.fullmatch(parsed.authority):
        raise KeyUriError("The hashivault: URI names no key.", hint="Write hashivault://KEY.")
    if not _MOUNT.fullmatch(mount):
        raise KeyUriError("The mount in the hashivault: URI is not a path.")
    return parsed, mount, parsed.authority


def _tokens(
    parsed: KeyUri,
    token_source: SecretSource | None,
    role_id: str | None,
    secret_id_source: SecretSource | None,
    auth_mount: str | None,
) -> GivenTokens | AppRoleTokens:
    token_source = token_source or parsed.query.get("token-source")
    role_id = role_id or parsed.query.get("role-id")
    secret_id_source = secret_id_source or parsed.query.get("secret-id-source")
    mount = auth_mount or parsed.query.get("auth-mount", "approle")
    if role_id is None and secret_id_source is None:
        return GivenTokens(token_source)
    if role_id is None or secret_id_source is None or token_source is not None:
        raise ConfigurationError(
            "Vault's credentials are not clear.",
            hint="Give a token source, or both a role id and a secret id source.",
        )
    if not _MOUNT.fullmatch(mount):
        raise ConfigurationError("The mount of the AppRole method is not a path.")
    return AppRoleTokens(role_id, secret_id_source, mount)


def _described(client: Client, mount: str, key: str, until: float) -> dict[str, Any]:
    told = client.ask("for the key", "GET", f"{mount}/keys/{quote(key)}", until=until)
    data = told.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("keys"), dict):
        raise VAULT.altered("described the key without its versions.")
    if data.get("type") != _KEY_TYPE:
        raise InvalidKeyError(
            f"The Transit key {key} is of type {data.get('type')}.",
            hint=f"D1 takes ES256 only: use a key of type {_KEY_TYPE}.",
        )
    return data


def _usable_version(described: dict[str, Any], key: str, asked: int | None) -> int:
    version = described.get("latest_version") if asked is None else asked
    if not isinstance(version, int) or str(version) not in described["keys"]:
        raise KeyNotFoundError(
            f"The Transit key {key} has no version {version}.",
            hint=f"It has: {', '.join(sorted(described['keys'], key=int)) or 'none'}.",
        )
    least = described.get("min_encryption_version")
    if isinstance(least, int) and version < least:
        raise KeyDisabledError(
            f"Version {version} of {key} may not sign: min_encryption_version is {least}.",
            hint="Lower it, or name a newer version that D1 knows.",
        )
    return version


def _public_key(described: dict[str, Any], version: int) -> PublicKey:
    entry = described["keys"].get(str(version))
    pem = entry.get("public_key") if isinstance(entry, dict) else None
    if not isinstance(pem, str):
        raise VAULT.altered(f"described the key without the public key of version {version}.")
    return PublicKey.from_pem(pem)

# SPDX-License-Identifier: Apache-2.0
"""Keys in the Transit engine of HashiCorp Vault and OpenBao: ``hashivault://KEY``.

The server is named as for Vault's and OpenBao's own command lines; the token is given, or comes
from a login: AppRole, JWT, Kubernetes, certificate. Its policy needs, for a key ``d1`` in
``transit``::

    path "transit/keys/d1"           { capabilities = ["read"] }
    path "transit/sign/d1/sha2-256"  { capabilities = ["update"] }

and for `generate_key` only, ``update`` on ``transit/keys/d1``.

The version of the key is pinned when it is opened. Rotating the key changes nothing for a running
signer, which goes on with its version: D1 knows only the key that was registered.
"""

from __future__ import annotations

import contextlib
import re
from urllib.parse import quote, unquote

from d1_signer.backends.remote import client_for
from d1_signer.backends.vault.backend import VaultBackend, described
from d1_signer.backends.vault.credentials import MOUNT, NAMES, Credentials
from d1_signer.backends.vault.failures import FOR_THE_KEY, TO_MAKE
from d1_signer.backends.vault.keys import KEY_TYPE
from d1_signer.backends.vault.settings import read_settings
from d1_signer.backends.vault.tokens import clients
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    KeyExistsError,
    KeyNotFoundError,
    KeyUriError,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource, read_public_file, shown_path
from d1_signer.signing.backend import GeneratedKey
from d1_signer.signing.key_uri import KeyUri
from d1_signer.transport.proxies import Proxy, optional_proxy

__all__ = ["VaultBackend", "generate_key", "open_backend"]

_TIME_TO_GENERATE = 60.0  # seconds
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_QUERY = frozenset(
    {
        *("mount", "version", "public-key", "ca-file", "proxy", "proxy-credentials-source"),
        *(name.replace("_", "-") for name in NAMES),
    }
)


def open_backend(
    uri: str,
    *,
    address: str | None = None,
    namespace: str | None = None,
    ca_file: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    token_source: SecretSource | None = None,
    auth: str | None = None,
    auth_mount: str | None = None,
    role_id: str | None = None,
    secret_id_source: SecretSource | None = None,
    role: str | None = None,
    jwt_source: SecretSource | None = None,
    trusted_owner: int | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
    public_key: PublicKey | str | None = None,
    timeout: float = 10.0,
    connect_timeout: float = 2.0,
    read_timeout: float = 5.0,
) -> VaultBackend:
    """Open a Transit key: one request, which reads it, after the login where there is one.

    A variable ``BAO_…`` is read before ``VAULT_…``.

    Args:
        uri: ``hashivault://KEY``, optionally ``?mount=`` (``transit``), ``version=`` (the latest at
            opening), ``public-key=file:PATH``, ``ca-file=``, ``proxy=``,
            ``proxy-credentials-source=``, and the options from `token_source` to
            `trusted_owner`, with hyphens.
        address: URL of the server, agent or proxy; None: ``VAULT_AGENT_ADDR``, else ``VAULT_ADDR``,
            else ``https://127.0.0.1:8200``. Plain http for a loopback address only; or
            ``unix:///PATH``.
        namespace: Namespace; None: ``VAULT_NAMESPACE``.
        ca_file: PEM file of the authorities to trust; None: ``VAULT_CACERT``,
            ``VAULT_CACERT_BYTES``, ``VAULT_CAPATH``, else the system's.
        client_cert: PEM file of a client certificate; None: ``VAULT_CLIENT_CERT``.
        client_key: PEM file of its key; None: ``VAULT_CLIENT_KEY``.
        token_source: Where the token comes from; None: ``VAULT_TOKEN``, else ``~/.vault-token``;
            ``none``: an agent or a proxy adds it. Read again when a token is refused, so that an
            agent may renew it.
        auth: Kind of login: ``approle``, ``jwt``, ``kubernetes``, ``cert``, or ``token`` for none;
            None: what the other options fit.
        auth_mount: Where the auth method is mounted; None: under its own name.
        role_id: Role id of an AppRole.
        secret_id_source: Where its secret id comes from, or a token that wraps it; read at each
            login.
        role: Role of a login by JWT, Kubernetes or certificate.
        jwt_source: Where the JWT comes from; None, for Kubernetes: the pod's service account.
        trusted_owner: A user (uid) whose files of secrets are taken, such as an agent's.
        proxy: ``http://HOST:PORT`` of a proxy through which Vault is reached over https.
        proxy_credentials_source: Source of its ``USER:PASSWORD``, for Basic authentication.
        public_key: The public key, or its PEM, of a key that Vault keeps in an HSM or KMS
            (``external-key``, ``managed_key``): there it does not tell.
        timeout: Seconds for one call with all its requests.
        connect_timeout: Seconds for each attempt to connect.
        read_timeout: Seconds for each wait for bytes.

    Raises:
        KeyUriError: The URI is not of this form.
        ConfigurationError: Settings that cannot be used.
        SecretSourceError: A file of a secret, or the client certificate, cannot be used.
        KeyNotFoundError: No such key, or no such version.
        AccessDeniedError: The token's policy lacks a path.
        LoginError: No token, or it or the login is refused.
        InvalidKeyError: Another kind of key, or its public key is missing.
        KeyDisabledError: The version may not sign, or the key is soft-deleted.
        SignerUnavailable: Vault cannot be reached, is sealed, or throttles; retryable.
    """
    parsed, mount, key = _read_uri(uri)
    version = parsed.query.get("version")
    if version is not None and not _VERSION.fullmatch(version):
        raise KeyUriError("The version in the hashivault: URI is not a number.")
    credentials = Credentials(
        token_source=token_source,
        auth=auth,
        auth_mount=auth_mount,
        role_id=role_id,
        secret_id_source=secret_id_source,
        role=role,
        jwt_source=jwt_source,
        trusted_owner=trusted_owner,
    ).completed(parsed.query)
    settings = read_settings(
        address,
        namespace,
        ca_file or parsed.query.get("ca-file"),
        client_cert,
        client_key,
        trusted_owner=credentials.trusted_owner,
        proxy=_proxy(parsed, proxy, proxy_credentials_source),
        timeout=timeout,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )
    return VaultBackend(
        key,
        clients(settings, credentials.source(settings)),
        timeout,
        mount=mount,
        version=None if version is None else int(version),
        public_key=_public_key(public_key, parsed),
    )


def generate_key(
    uri: str,
    *,
    address: str | None = None,
    namespace: str | None = None,
    ca_file: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    token_source: SecretSource | None = None,
    auth: str | None = None,
    auth_mount: str | None = None,
    role_id: str | None = None,
    secret_id_source: SecretSource | None = None,
    role: str | None = None,
    jwt_source: SecretSource | None = None,
    trusted_owner: int | None = None,
    proxy: str | None = None,
    proxy_credentials_source: SecretSource | None = None,
) -> GeneratedKey:
    """Make an ecdsa-p256 key that is not exportable.

    ``uri`` is that of `open_backend` without a version, and so are the options.

    Raises:
        KeyExistsError: The key exists.
        KeyUriError: The URI names a version, or is not of this form.
        SignerError: As for `open_backend`.
    """
    parsed, mount, key = _read_uri(uri)
    if not {"version", "public-key"}.isdisjoint(parsed.query):
        raise KeyUriError("A new key is named without a version.", hint="It begins with 1.")
    credentials = Credentials(
        token_source=token_source,
        auth=auth,
        auth_mount=auth_mount,
        role_id=role_id,
        secret_id_source=secret_id_source,
        role=role,
        jwt_source=jwt_source,
        trusted_owner=trusted_owner,
    ).completed(parsed.query)
    settings = read_settings(
        address,
        namespace,
        ca_file or parsed.query.get("ca-file"),
        client_cert,
        client_key,
        trusted_owner=credentials.trusted_owner,
        proxy=_proxy(parsed, proxy, proxy_credentials_source),
        read_timeout=10.0,
    )
    made = clients(settings, credentials.source(settings))
    with client_for(made, _TIME_TO_GENERATE) as (client, until):
        path = f"{mount}/keys/{quote(key)}"
        # Vault answers the making of a key that exists as if it had made it.
        with contextlib.suppress(KeyNotFoundError):
            client.ask(FOR_THE_KEY, "GET", path, until=until)
            raise KeyExistsError(f"The Transit key {key} exists.", hint="Choose another name.")
        fields: dict[str, object] = {
            "type": KEY_TYPE,
            "exportable": False,
            "allow_plaintext_backup": False,
        }
        client.ask(TO_MAKE, "POST", path, until=until, fields=fields)
        new = described(client, path, key, until).public_key(1, None)
    return GeneratedKey(uri=f"{uri}{'&' if '?' in uri else '?'}version=1", public_key=new)


def _proxy(parsed: KeyUri, url: str | None, source: SecretSource | None) -> Proxy | None:
    return optional_proxy(
        url or parsed.query.get("proxy"), source or parsed.query.get("proxy-credentials-source")
    )


def _read_uri(uri: str) -> tuple[KeyUri, str, str]:
    parsed = KeyUri.parse(uri, query_names=_QUERY)
    mount = parsed.query.get("mount", "transit")
    if parsed.path not in {"", "/"} or not _NAME.fullmatch(parsed.authority):
        raise KeyUriError("The hashivault: URI names no key.", hint="Write hashivault://KEY.")
    if not MOUNT.fullmatch(mount):
        raise KeyUriError("The mount in the hashivault: URI is not a path.")
    return parsed, mount, parsed.authority


def _public_key(given: PublicKey | str | None, parsed: KeyUri) -> PublicKey | None:
    source = parsed.query.get("public-key")
    if isinstance(given, PublicKey):
        return given
    if given is not None:
        return PublicKey.from_pem(given)
    if source is None:
        return None
    path = source.removeprefix("file:").removeprefix("//")
    try:
        if not source.startswith("file:"):
            raise KeyUriError("public-key in the hashivault: URI is not file:PATH.")
        return PublicKey.from_pem(read_public_file(unquote(path)))
    except (OSError, ValueError) as error:
        if isinstance(error, D1SignerError):
            raise
    raise ConfigurationError(
        f"The file of the public key cannot be read: {shown_path(path)}.",
        hint="It is a regular file, and holds the public key in PEM.",
    )

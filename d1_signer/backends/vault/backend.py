# SPDX-License-Identifier: Apache-2.0
"""A version of a Transit key that signs."""

from __future__ import annotations

import re
import time
from base64 import b64decode, b64encode, urlsafe_b64decode
from urllib.parse import quote

from d1_signer.backends.remote import RemoteBackend, facts_of
from d1_signer.backends.vault.failures import FOR_THE_CLUSTER, FOR_THE_KEY, TO_SIGN
from d1_signer.backends.vault.http import Told
from d1_signer.backends.vault.keys import ELSEWHERE, Described
from d1_signer.backends.vault.tokens import Client
from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.errors import D1SignerError, KeyMismatchError
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.transport.foreign import quoted
from d1_signer.transport.processes import PerProcess

_VERSION = r"vault:v([1-9][0-9]{0,8}):"
_RAW = re.compile(_VERSION + r"([A-Za-z0-9_-]{86})")
_DER = re.compile(_VERSION + r"([A-Za-z0-9+/]{10,104}={0,2})")
# Any server of the cluster may answer, also one that is not its leader.
_HEALTH = "sys/health?standbyok=true&perfstandbyok=true"
_PATIENCE = 1.0  # seconds: the key was described a moment ago, so that it is there or not told
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
        public_key: PublicKey | None = None,
    ) -> None:
        """Read the key, and pin its version (None: the latest); see `RemoteBackend`."""
        self._mount = mount
        self._asked_version = version
        self._given = public_key
        self._described_at = f"{mount}/keys/{quote(key)}"
        self._signs_at = f"{mount}/sign/{quote(key)}/sha2-256"
        super().__init__(key, clients, timeout)

    def _open(self, client: Client, until: float) -> tuple[str, PublicKey]:
        told = described(client, self._described_at, self._key, until)
        with client.http.naming(FOR_THE_KEY):
            self._version = told.usable_version(self._asked_version)
            self.encoding = told.encoding
            public_key = told.public_key(self._version, self._given)
        return f"{self._key} version={self._version}", public_key

    @property
    def version(self) -> int:
        """The version of the key that signs."""
        return self._version

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest of 32 bytes with one request; the answer is in the encoding declared."""
        client, until = self._begin(deadline)
        raw = self.encoding is SignatureEncoding.RAW
        fields: dict[str, object] = {
            "input": b64encode(digest).decode(),
            "prehashed": True,
            "marshaling_algorithm": "jws" if raw else "asn1",
            "key_version": self._version,
        }
        told = client.ask(TO_SIGN, "POST", self._signs_at, until=until, fields=fields)
        data = told.get("data")
        signature = data.get("signature") if isinstance(data, dict) else None
        match = (_RAW if raw else _DER).fullmatch(signature) if isinstance(signature, str) else None
        if match is None:
            what = "64 bytes in base64url" if raw else "DER in base64"
            raise client.http.altered(TO_SIGN, f"answered without a signature of {what}.")
        if int(match.group(1)) != self._version:
            mismatch = KeyMismatchError(
                f"Vault signed with version {match.group(1)} of {self._key}; version "
                f"{self._version} was pinned at opening. The signature was not used.",
                hint="Register the new version with D1 first, then open the signer anew.",
            )
            raise client.http.named(mismatch, TO_SIGN)
        # Both take padding that is too long.
        return (urlsafe_b64decode if raw else b64decode)(match.group(2) + "==")

    def custody(self) -> Evidence:
        """Report what Vault says of the key now: it can be made exportable later on."""
        client, until = self._begin(None)
        told = described(client, self._described_at, self._key, until)
        if told.public_key(self._version, self._given) != self._public_key:
            raise KeyMismatchError(
                f"Version {self._version} of {self._key} is another key than at opening.",
                hint="The key was deleted and made anew; register the new one with D1.",
            )
        facts = [
            *facts_of("Vault Transit key", {name: told.data.get(name) for name in _FACTS}),
            *facts_of("d1_signer", {"mount": self._mount, "version": self._version}),
            *_server(client, until),
        ]
        location = f"hashivault://{self._key}"
        if told.type in ELSEWHERE:
            # Vault only passes on to an HSM or KMS, and does not say what that says of the key.
            where = told.versions.get(self._version)
            if isinstance(where, str):
                facts += facts_of("Vault Transit key", {"external_key_ref": quoted(where)[1:-1]})
            return Evidence(
                location=location,
                exportable=None,
                generated_in_place=None,
                hardware=None,
                facts=tuple(facts),
            )
        exportable, backup = (
            told.data.get(name) for name in ("exportable", "allow_plaintext_backup")
        )
        known = isinstance(exportable, bool) and isinstance(backup, bool)
        imported = told.data.get("imported_key")
        # Both can be switched on later, and never off again: what is off was never on.
        leaves = bool(exportable or backup) if known else None
        return Evidence(
            location=location,
            exportable=leaves,
            generated_in_place=not imported,
            # Transit signs in the memory of the server's process, whatever seals its storage.
            hardware=False,
            facts=tuple(facts),
            never_exportable=False if imported or leaves else (None if leaves is None else True),
        )


def described(client: Client, path: str, key: str, until: float) -> Described:
    """Ask for a key.

    Args:
        client: The client of this process.
        path: Path of the key's description.
        key: The key, for error texts.
        until: Moment on ``time.monotonic()``.
    """
    told = client.ask(FOR_THE_KEY, "GET", path, until=until)
    with client.http.naming(FOR_THE_KEY):
        return Described.read(
            key, told.get("data"), lambda what: client.http.altered(FOR_THE_KEY, what)
        )


def _server(client: Client, until: float) -> list[Fact]:
    """Which Vault it is; its cluster is told without a token, and to nobody in some places."""
    http, settings = client.http, client.http.settings
    told: dict[str, object] = {"address": settings.endpoint, "namespace": settings.namespace}
    try:
        health = http.request(
            FOR_THE_CLUSTER,
            "GET",
            _HEALTH,
            until=min(until, time.monotonic() + _PATIENCE),
            namespaced=False,
        )
    except D1SignerError:
        health = Told()
    cluster, version = health.get("cluster_id"), health.get("version")
    of_cluster = {
        "cluster id": quoted(cluster)[1:-1] if isinstance(cluster, str) else None,
        "server version": quoted(version)[1:-1] if isinstance(version, str) else None,
    }
    return [*facts_of("d1_signer", told), *facts_of("Vault sys/health", of_cluster)]

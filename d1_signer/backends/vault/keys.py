# SPDX-License-Identifier: Apache-2.0
"""What Transit says of a key: which version signs, how, and with which public key. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d1_signer.errors import (
    D1SignerError,
    InvalidKeyError,
    KeyDisabledError,
    KeyMismatchError,
    KeyNotFoundError,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.transport.foreign import quoted

KEY_TYPE = "ecdsa-p256"
# An HSM or KMS behind OpenBao, and behind Vault Enterprise: their description has no public key,
# and they answer DER whatever marshalling is asked for.
ELSEWHERE = frozenset({"external-key", "managed_key"})

Altered = Callable[[str], D1SignerError]


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A key as Transit describes it.

    Attributes:
        name: Its name.
        type: Its type.
        data: The whole description.
        versions: What is told of each version that may be used.
        altered: Makes the error for a description that is not one.
    """

    name: str
    type: str
    data: dict[str, Any]
    versions: dict[int, object]
    altered: Altered

    @classmethod
    def read(cls, name: str, data: object, altered: Altered) -> Described:
        """Read the description of a key.

        Raises:
            IntegrityError: It is none.
            InvalidKeyError: Another type of key.
            KeyDisabledError: It is soft-deleted.
        """
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(kind, str):
            raise altered("described the key without its type.")
        if kind != KEY_TYPE and kind not in ELSEWHERE:
            raise InvalidKeyError(
                f"The Transit key {name} is of type {quoted(kind)}.",
                hint=f"D1 takes ES256 only: use a key of type {KEY_TYPE}.",
            )
        if data.get("soft_deleted") is True:
            raise KeyDisabledError(
                f"The Transit key {name} is soft-deleted.",
                hint="Restore it: transit/keys/NAME/soft-delete-restore.",
            )
        latest = data.get("latest_version")
        if not _is_version(latest):
            raise altered("described the key without its latest version.")
        told = data.get("keys")
        if told is None and kind in ELSEWHERE:
            told = {str(latest): None}
        if not isinstance(told, dict) or not all(_is_version_text(text) for text in told):
            raise altered("described the key without its versions.")
        versions = {int(text): entry for text, entry in told.items()}
        return cls(name=name, type=kind, data=data, versions=versions, altered=altered)

    @property
    def encoding(self) -> SignatureEncoding:
        """How it answers signatures."""
        return SignatureEncoding.DER if self.type in ELSEWHERE else SignatureEncoding.RAW

    def usable_version(self, asked: int | None) -> int:
        """The version that signs: the one that is asked for, else the latest.

        Raises:
            KeyNotFoundError: It does not exist.
            KeyDisabledError: It is archived, trimmed, or may not sign.
        """
        latest: int = self.data["latest_version"]
        version = latest if asked is None else asked
        if version not in self.versions:
            known = ", ".join(map(str, sorted(self.versions))) or "none"
            if 0 < version < latest:
                raise KeyDisabledError(
                    f"Version {version} of {self.name} is archived or trimmed, and may not sign.",
                    hint=f"Lower its min_decryption_version, or move to one of: {known}.",
                )
            raise KeyNotFoundError(
                f"The Transit key {self.name} has no version {version}.", hint=f"It has: {known}."
            )
        least = self.data.get("min_encryption_version")
        if isinstance(least, int) and version < least:
            raise KeyDisabledError(
                f"Version {version} of {self.name} may not sign: min_encryption_version is "
                f"{least}.",
                hint="Lower it, or name a newer version that D1 knows.",
            )
        return version

    def public_key(self, version: int, given: PublicKey | None) -> PublicKey:
        """The public key of a version: as it is described, or given for a key that is elsewhere.

        Raises:
            InvalidKeyError: It is elsewhere, and none is given.
            KeyMismatchError: Another one is given than is described.
            IntegrityError: It is not described.
        """
        if self.type in ELSEWHERE:
            if given is None:
                raise InvalidKeyError(
                    f"Vault does not tell the public key of {self.name}, of type {self.type}.",
                    hint="Give it: public_key=, or public-key=file:PATH in the URI, in PEM as the "
                    "HSM exports it.",
                )
            return given
        entry = self.versions.get(version)
        pem = entry.get("public_key") if isinstance(entry, dict) else None
        try:
            described = PublicKey.from_pem(pem) if isinstance(pem, str) else None
        except D1SignerError:
            described = None
        if described is None:
            raise self.altered(f"described version {version} without a public key on P-256.")
        if given is not None and given != described:
            raise KeyMismatchError(
                f"Version {version} of {self.name} is another key than public_key.",
                hint="Leave public_key out: Vault tells it for a key of this type.",
            )
        return described


def _is_version(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_version_text(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdigit() and 0 < len(text) <= 9  # noqa: PLR2004

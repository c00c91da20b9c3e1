# SPDX-License-Identifier: Apache-2.0
"""The settings of one D1 environment, from one TOML file, for a service and the command line.

A name is the one of the command's flag, with underscores. What is in the file is no secret: a PIN,
a passphrase or a password is named by its source, and one that is given itself is refused and not
repeated.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from d1_signer import jose
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.frames import without_locals
from d1_signer.secret import read_public_file, shown_path, unreadable
from d1_signer.token.renewal import Limits
from d1_signer.token.values import FIELDS, StoreSettings, read_table, refuse

_SHOWN_DIGITS = 16
_NO_TOML = (
    'Texts stand in quotes: environment = "production". Write the whole file beside it, then move '
    "it to its place."
)
_SAYS_TWICE = re.compile(r"\A(Cannot (overwrite|mutate|declare|redefine)|Duplicate) ")
_TWICE = "A name or a table stands in it twice, the second one there: leave one of them out."
_POSITION = re.compile(r"\((at [a-z0-9 ,]+)\)\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What one file says; the names are the file's.

    Attributes:
        environment: Which D1.
        issuer_id: The issuerId that D1 assigned.
        key: Key URIs, first the active one.
        kid: Key identifier of a single key.
        option: Options of the keys' backends, as text.
        timeout: Seconds for opening a key, and for the signature of a handshake.
        client_cert: Path of the client certificate.
        client_key: Path of its key, or its key URI.
        client_key_passphrase_source: Where the key file's passphrase comes from.
        ca_file: Path of the authorities for D1's certificate.
        proxy: URL of a proxy.
        proxy_credentials_source: Where its ``USER:PASSWORD`` comes from.
        proxy_adds_certificate: Whether it adds the client certificate.
        audience: The claim ``aud``.
        no_audience: Whether that claim is left out.
        request_format: How assertions are sent.
        custody_policy: What each key must be shown to be, in words.
        audit_trail: Folder of the audit trail.
        audit_origin: Whose trail it is.
        audit_key: Key URI of the key that seals it.
        limits: Time limits of a renewal.
        store: Where the fleet shares its token.
        digest: The same for the same settings, however the file is written.
    """

    environment: str | None = None
    issuer_id: str | None = None
    key: tuple[str, ...] = ()
    kid: str | None = None
    option: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    client_cert: str | None = None
    client_key: str | None = None
    client_key_passphrase_source: str | None = None
    ca_file: str | None = None
    proxy: str | None = None
    proxy_credentials_source: str | None = None
    proxy_adds_certificate: bool = False
    audience: str | None = None
    no_audience: bool = False
    request_format: Literal["form", "json"] = "form"
    custody_policy: str | None = None
    audit_trail: str | None = None
    audit_origin: str | None = None
    audit_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    store: StoreSettings | None = None
    digest: str = field(default="", compare=False)

    @classmethod
    @without_locals
    def read(cls, file: str | os.PathLike[str], *, complete: bool = False) -> Self:
        """Read a file.

        Args:
            file: Its path.
            complete: Whether it is to make a fetcher, see `require_complete`.

        Raises:
            ConfigurationError: It cannot be read, is no TOML, has a name that is not known, a value
                that cannot be used, or a secret in it; or is not complete.
        """
        shown = shown_path(os.fspath(file))
        document = _document(os.fspath(file), shown)
        try:
            given = read_table(document, FIELDS, "")
            settings = cls(**given, digest=_digest(cls(**given)))
            if complete:
                settings.require_complete()
        except D1SignerError as error:
            raise ConfigurationError(
                f"The settings {shown} cannot be used: {error.message}", hint=error.hint
            ) from None
        return settings

    def require_complete(self) -> None:
        """Refuse settings that do not make a fetcher, which flags or variables may complete.

        Raises:
            ConfigurationError: Something is missing, or does not fit together.
        """
        for name in ("environment", "issuer_id", "key"):
            if not getattr(self, name):
                refuse(name, "is missing", "It has no default.")
        for name, needed in _PAIRS:
            if getattr(self, name) is not None and getattr(self, needed) is None:
                refuse(name, f"is given without {needed}")
        if self.no_audience and self.audience is not None:
            refuse("audience", "is given, and no_audience too")
        if self.kid is not None and len(self.key) > 1:
            refuse("kid", "is given for several keys", "End each key URI with #KID instead.")


_PAIRS = (
    ("client_cert", "client_key"),
    ("client_key", "client_cert"),
    ("client_key_passphrase_source", "client_key"),
    ("proxy_credentials_source", "proxy"),
    ("audit_origin", "audit_trail"),
    ("audit_key", "audit_trail"),
)


def _document(path: str, shown: str) -> dict[str, Any]:
    def check(status: os.stat_result) -> None:
        # Whoever may write it chooses which libraries are loaded, and whom we trust.
        if status.st_mode & stat.S_IWOTH:
            raise ConfigurationError(
                f"The settings {shown} can be written by every user.",
                hint="Run chmod o-w on the file.",
            )

    try:
        content = read_public_file(path, check)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The settings {shown} cannot be read: {unreadable(error)}.",
            hint="Check the path, and that this process's user may read it.",
        ) from None
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        hint = "Save it as UTF-8."
        where = ": it is not UTF-8"
    except (ValueError, RecursionError) as error:
        # Its text may repeat what stands there.
        found = _POSITION.search(str(error))
        where = f": {found[1]}" if found else ""
        hint = _TWICE if _SAYS_TWICE.search(str(error)) else _NO_TOML
    raise ConfigurationError(f"The settings {shown} are no TOML{where}.", hint=hint)


def _digest(settings: Settings) -> str:
    """That of what is not as it is without being named, in whatever form it was given."""
    said = {name: value for name, value in asdict(settings).items() if value != _UNSAID.get(name)}
    return hashlib.sha256(jose.compact_json(_sorted(said))).hexdigest()[:_SHOWN_DIGITS]


def _sorted(value: object) -> Any:
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return value


_UNSAID = asdict(Settings())

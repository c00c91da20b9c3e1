# SPDX-License-Identifier: Apache-2.0
"""The audit trail of a run: its settings, and the one trail that all its keys are given."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._callbacks import checked_keys
from d1_signer.cli._config import policy_in
from d1_signer.cli._output import Command, setting
from d1_signer.cli._paths import FOLDER, KEY_URI
from d1_signer.errors import ConfigurationError

if TYPE_CHECKING:
    from d1_signer.audit.trail import AuditTrail
    from d1_signer.signing.signer import Signer

_SETTINGS = "d1_signer.trail.settings"
_OPEN = "d1_signer.trail.open"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrailSettings:
    """Where a run records its uses of keys.

    Attributes:
        folder: The trail's folder; None: nothing is recorded.
        origin: Whose records these are.
        key: URI of the key that seals; None: nothing is sealed.
    """

    folder: str | None
    origin: str | None
    key: str | None

    def required_folder(self) -> Path:
        """The folder.

        Raises:
            ConfigurationError: None is given.
        """
        if self.folder is None:
            raise ConfigurationError(
                "No audit trail is given.",
                hint="Give its folder, or set D1_AUDIT_TRAIL.",
            )
        return Path(self.folder)

    def signer(self) -> Signer | None:
        """The signer of checkpoints, which is closed with the command; None where none is given."""
        if self.key is None:
            return None
        from d1_signer.signing.opening import open_signer
        from d1_signer.signing.options import KeyOptions

        context = click.get_current_context()
        options = KeyOptions().for_opening(self.key)
        signer = open_signer(self.key, custody_policy=policy_in(context), **options)
        return context.with_resource(signer)

    def name(self) -> str:
        """The origin; this host's name where none is given."""
        import socket

        return self.origin or re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"

    def open(self) -> AuditTrail | None:
        """The trail, which is closed with the command; None where none is given.

        Raises:
            ConfigurationError: Something of a trail is given, and not its folder.
            AuditUnavailable: The folder cannot be made.
        """
        if self.folder is None:
            if self.origin or self.key:
                raise ConfigurationError(
                    "An origin or a key of an audit trail is given, and no trail.",
                    hint="Set D1_AUDIT_TRAIL to its folder, or leave D1_AUDIT_ORIGIN and "
                    "D1_AUDIT_KEY out.",
                )
            return None
        from d1_signer.audit.trail import AuditTrail

        trail = AuditTrail(
            self.folder,
            origin=self.name(),
            checkpoint_signer=self.signer(),
        )
        return click.get_current_context().with_resource(trail)


def with_trail(command: Command) -> Command:
    """Give a command the settings of the audit trail; `current_trail` opens it."""

    @setting(
        "--audit-trail",
        "D1_AUDIT_TRAIL",
        "Folder of the audit trail.",
        metavar="FOLDER",
        type=FOLDER,
    )
    @setting(
        "--audit-origin",
        "D1_AUDIT_ORIGIN",
        "Whose audit trail it is, such as bank.example/d1. [default: this host's name]",
        metavar="NAME",
    )
    @setting(
        "--audit-key",
        "D1_AUDIT_KEY",
        "Key URI of the key that seals the audit trail.",
        metavar="URI",
        type=KEY_URI,
        callback=_checked_key,
    )
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        audit_trail: str | None,
        audit_origin: str | None,
        audit_key: str | None,
        **options: Any,
    ) -> Any:
        settings = TrailSettings(folder=audit_trail, origin=audit_origin, key=audit_key)
        meta = click.get_current_context().meta
        meta[_SETTINGS], meta[_OPEN] = settings, functools.cache(settings.open)
        return command(*args, **options)

    return wrapper


def trail_settings() -> TrailSettings:
    """What this run was given of an audit trail."""
    settings: TrailSettings = click.get_current_context().meta[_SETTINGS]
    return settings


def current_trail() -> AuditTrail | None:
    """The audit trail of this run, opened once; None where none is given.

    Raises:
        ConfigurationError: Its settings do not fit together.
        AuditUnavailable: Its folder cannot be made.
    """
    opened: AuditTrail | None = click.get_current_context().meta[_OPEN]()
    return opened


def _checked_key(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None:
        checked_keys(context, parameter, (value,))
    return value

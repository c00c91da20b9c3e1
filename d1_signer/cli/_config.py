# SPDX-License-Identifier: Apache-2.0
"""The file of settings of a run, ``--config`` and ``D1_CONFIG``; variables and flags win."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._output import Command, setting

if TYPE_CHECKING:
    from d1_signer.custody.policy import CustodyPolicy
    from d1_signer.token.settings import Settings

_FOUND = "d1_signer.config"
_PATH = "d1_signer.config.path"

# Parameters of commands, by their names in the file where they have another one there.
_NAMES = {"client_key_passphrase_source": "passphrase_source"}
_DEFAULTS = (
    *("environment", "issuer_id", "key", "kid", "timeout", "client_cert", "client_key"),
    *("client_key_passphrase_source", "ca_file", "proxy", "proxy_credentials_source"),
    *("proxy_adds_certificate", "audience", "no_audience", "request_format"),
    *("audit_trail", "audit_origin", "audit_key"),
)


def settings_in(context: click.Context) -> Settings | None:
    """What the file of this run says; None where there is none."""
    found: Settings | None = context.meta.get(_FOUND)
    return found


def policy_in(context: click.Context) -> CustodyPolicy | None:
    """The custody policy of the file; None where it has none, or the environment has one."""
    settings = settings_in(context)
    if settings is None or settings.custody_policy is None:
        return None
    from d1_signer.custody.policy import CustodyPolicy

    if CustodyPolicy.from_environment() is not None:
        return None
    return CustodyPolicy.parse(settings.custody_policy)


def with_config(command: Command) -> Command:
    """Give a command ``--config``, whose file holds the defaults of its other options."""
    option = setting(
        "--config",
        "D1_CONFIG",
        "TOML file of settings; variables and flags win over it.",
        metavar="FILE",
        is_eager=True,  # before the options whose defaults it holds
        expose_value=False,
        callback=_read,
    )
    decorated: Command = option(command)
    return decorated


def _read(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is None or context.resilient_parsing:
        return
    from d1_signer.token.settings import Settings

    settings = Settings.read(value)
    context.meta[_FOUND], context.meta[_PATH] = settings, value
    # A flag is as good as its absence in a file.
    found = {name: getattr(settings, name) for name in _DEFAULTS}
    defaults = {_NAMES.get(name, name): each for name, each in found.items() if each}
    if settings.custody_policy is not None and context.command.name == "custody":
        defaults["require"] = settings.custody_policy
    if context.command.name == "csr":  # whose key is another one
        defaults.pop("key", None)
    context.default_map = {**(context.default_map or {}), **defaults}


def texts_in(context: click.Context) -> list[Any]:
    """Everything that may name a file: the settings' own path, and what stands there."""
    settings = settings_in(context)
    if settings is None:
        return []
    path = context.meta[_PATH]
    values = [getattr(settings, name) for name in _DEFAULTS]
    store = settings.store
    sources = [] if store is None else [store.key_source, store.password_source, store.ca_file]
    return [path, *values, dict(settings.option), *sources]

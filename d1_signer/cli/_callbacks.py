# SPDX-License-Identifier: Apache-2.0
"""What a setting may not be: a secret on the command line, or a key where its place is named.

No text here repeats the value: it may be the secret itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

import click
from click.core import ParameterSource

from d1_signer.cli._config import settings_in
from d1_signer.errors import ConfigurationError, KeyUriError
from d1_signer.secret import holds_key
from d1_signer.signing.key_uri import holds_pin_itself, scheme_of, split_fragment

if TYPE_CHECKING:
    from cryptography import x509

_KEY_HINT = (
    "Put the key into a file of its own (chmod 600) and give {form}; replace the key if others may "
    "have seen it."
)
_PROXY = re.compile(r"http://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})/?")


def checked_keys(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """Key URIs, as a callback of click.

    Raises:
        KeyUriError: One of them is none, or a key itself.
        click.UsageError: One has a PIN in it and comes from the command line.
    """
    name = _name(context, parameter)
    if any(map(holds_key, value)):
        raise KeyUriError(
            f"{name} holds a key itself and not its URI.",
            hint=_KEY_HINT.format(form="file:///PATH"),
        )
    if not all(map(scheme_of, value)):
        raise KeyUriError(
            f"{name} is not a key URI: it has no scheme.",
            hint="A key URI begins with pkcs11:, awskms:, gcpkms:, hashivault: or file:. For "
            "example pkcs11:token=bank;object=d1",
        )
    on_command_line = _source(context, parameter) is ParameterSource.COMMANDLINE
    if on_command_line and any(map(holds_pin_itself, value)):
        raise click.UsageError(
            "A key URI with pin-value is not taken from the command line, which every user of "
            "this machine can read. Use pin-source=file:PATH, pin-source=env:NAME or "
            "pin-source=prompt. The PIN may stand in the shell's history now: change it."
        )
    return value


def checked_client_key(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The key URI of a client key, as a callback of click.

    Raises:
        KeyUriError: As for `checked_keys`.
        click.UsageError: As for `checked_keys`; or it is a key that signs assertions.
    """
    (uri,) = checked_keys(context, parameter, (value,))
    settings = settings_in(context)
    signing = [*os.environ.get("D1_SIGNER_KEY", "").split(), *(settings.key if settings else ())]
    if _place_of(uri) in map(_place_of, signing):
        raise click.UsageError(
            "This key signs assertions (D1_SIGNER_KEY). The client certificate needs a key of its "
            "own; make one with generate-key."
        )
    return uri


def _place_of(uri: str) -> object:
    """What a key URI names, however it is written: without kid, PIN source and the like."""
    rest = split_fragment(uri)[0].partition("?")[0]
    scheme, _, name = rest.partition(":")
    if scheme.lower() == "file":
        path = unquote(name.removeprefix("//"))
        with contextlib.suppress(ValueError):  # NUL, which no path has: the backend refuses it
            path = os.path.realpath(path)
        return path
    return frozenset(unquote(name).split(";"))


def checked_path(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """The path of a PEM file, as a callback of click.

    Raises:
        ConfigurationError: It is what the file should hold.
    """
    if value is not None and holds_key(value):
        raise ConfigurationError(
            f"{_name(context, parameter)} holds PEM or a key itself and not the path of its file.",
            hint=_KEY_HINT.format(form="its path"),
        )
    return value


def checked_path_or_key(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """The path of a PEM file or a key URI, as a callback of click.

    Raises:
        ConfigurationError: As for `checked_path`.
        click.UsageError: As for `checked_keys`.
    """
    checked_path(context, parameter, value)
    if value is not None and scheme_of(value):
        checked_keys(context, parameter, (value,))
    return value


def checked_proxy(
    context: click.Context,  # noqa: ARG001 (click's signature of a callback)
    parameter: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> str | None:
    """The URL of a proxy, as a callback of click.

    Raises:
        click.UsageError: It has a password in it, or is no such URL.
    """
    if value is None:
        return None
    # Not only in what parses as a URL: without its scheme it has a password just as well.
    if "@" in value:
        raise click.UsageError(
            "A proxy URL with a user name or password is not taken from the command line, which "
            "every user of this machine can read."
        )
    match = _PROXY.fullmatch(value)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        raise click.UsageError("--proxy takes http://HOST:PORT.")
    return value


def checked_subject(
    context: click.Context,  # noqa: ARG001 (click's signature of a callback)
    parameter: click.Parameter,  # noqa: ARG001
    value: str,
) -> x509.Name:
    """The subject of a certificate signing request, as a callback of click.

    Raises:
        click.UsageError: It is no distinguished name, or has not one common name, or has something
            in it that stands for a name.
    """
    from d1_signer.cli._subject import read_subject

    return read_subject(value)


def _source(context: click.Context, parameter: click.Parameter) -> ParameterSource | None:
    return context.get_parameter_source(parameter.name or "")


def _name(context: click.Context, parameter: click.Parameter) -> str:
    """The flag, the variable or the name in the file, whichever the value came from."""
    if _source(context, parameter) is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if _source(context, parameter) is ParameterSource.DEFAULT_MAP:
        return f"{parameter.name} of the settings"
    return parameter.opts[0]

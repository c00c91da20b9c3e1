# SPDX-License-Identifier: Apache-2.0
"""The backends' own options on the command line: ``--option NAME=VALUE``, ``D1_SIGNER_OPTIONS``."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from d1_signer.cli._config import settings_in, with_config
from d1_signer.cli._output import Command
from d1_signer.errors import ConfigurationError
from d1_signer.secret import holds_key

if TYPE_CHECKING:
    from d1_signer.signing.options import KeyOptions

VARIABLE = "D1_SIGNER_OPTIONS"
_LONGEST_TIMEOUT = 86_400.0
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_USER_IN_URL = re.compile(r"://[^/?#]*@")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """What a run was given for its backends; what does not fit them is wrong usage.

    Attributes:
        given: Names and texts, by flags and the variable, for every key of the run.
        timeout: Seconds for a backend that has a time limit; None: its own.
        of_file: Names and texts of the file of settings, which `given` wins over.
        keys_of_file: The keys that they are for.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    of_file: Mapping[str, str] = field(default_factory=dict)
    keys_of_file: tuple[str, ...] = ()

    def of(self, uri: str) -> Mapping[str, str]:
        """What a key is given: another than the file's may be in another HSM, with another PIN."""
        return {**(self.of_file if self._is_of_file(uri) else {}), **self.given}

    def require_known(self, uris: Iterable[str]) -> None:
        """Refuse an option that no backend of these keys knows.

        Raises:
            click.UsageError: There is one.
        """
        from d1_signer.signing.options import KeyOptions

        uris = tuple(uris)
        with _as_usage(f" Look at --option and {VARIABLE}."):
            KeyOptions(given=self.given).require_known(uris)
        if any(map(self._is_of_file, uris)):
            with _as_usage(" Look at [option] in the file of settings."):
                KeyOptions(given=self.of_file).require_known(self.keys_of_file)

    def for_key(self, uri: str, function_name: str) -> dict[str, Any]:
        """The options that a function of the key's backend takes, as it wants them.

        Raises:
            click.UsageError: A value cannot be read.
        """
        with _as_usage():
            return self._options(uri).for_key(uri, function_name)

    def for_opening(self, uri: str) -> dict[str, Any]:
        """As `for_key`, for opening the key; a library that hangs would be deaf to Ctrl-C as well.

        Raises:
            click.UsageError: A value cannot be read.
        """
        with _as_usage():
            return self._options(uri).for_opening(uri)

    def _is_of_file(self, uri: str) -> bool:
        return unnamed(uri) in map(unnamed, self.keys_of_file)

    def _options(self, uri: str) -> KeyOptions:
        from d1_signer.signing.options import KeyOptions

        return KeyOptions(given=self.of(uri), timeout=self.timeout)


def unnamed(uri: str) -> str:
    """A key URI without the kid, by which a flag may call the same key."""
    return uri.partition("#")[0]


@contextlib.contextmanager
def _as_usage(advice: str = "") -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise click.UsageError(f"{error.message}{advice}") from None


def with_options(command: Command) -> Command:
    """Give a command ``--option`` and ``--timeout``, as its ``options``."""

    @with_config
    @click.option(
        "--option",
        "options",
        envvar=VARIABLE,
        show_envvar=True,
        multiple=True,
        type=_ShellWords(),
        metavar="NAME=VALUE",
        callback=_read_options,
        help="An option of the key's backend, as open_signer has it, such as locking=lock; repeat "
        "it for several. The variable holds several, quoted as in a shell.",
    )
    @click.option(
        "--timeout",
        type=SECONDS,
        metavar="SECONDS",
        callback=_read_timeout,
        help="Time limit of the HSM or KMS, for opening the key and for each signature.",
    )
    @functools.wraps(command)
    def wrapper(*args: Any, options: dict[str, str], timeout: float | None, **others: Any) -> Any:
        settings = settings_in(click.get_current_context())
        backends = BackendOptions(
            given=options,
            timeout=timeout,
            of_file={} if settings is None else settings.option,
            keys_of_file=() if settings is None else settings.key,
        )
        return command(*args, options=backends, **others)

    return wrapper


class _ShellWords(click.types.StringParamType):
    """Text; several of them in a variable, split as a shell does."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """Split, see `click.ParamType`."""
        return _split(rv)


def _split(text: str) -> list[str]:
    import shlex  # not for the help, nor for a completion

    try:
        return shlex.split(text)
    except ValueError as error:
        raise click.UsageError(
            f"{VARIABLE} cannot be split as a shell does: {str(error).lower()}."
        ) from None


def _read_options(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[str, str]:
    """Names and texts, as a callback of click; name by name, a flag wins over the variable."""
    source = context.get_parameter_source(parameter.name or "")
    if source is ParameterSource.COMMANDLINE and any(map(_USER_IN_URL.search, value)):
        raise click.UsageError(
            "A URL with a user name or password is not taken from the command line, which every "
            "user of this machine can read."
        )
    pairs: dict[str, str] = {}
    if source in {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}:
        pairs |= _pairs(_split(os.environ.get(VARIABLE, "")), VARIABLE)
    if source is ParameterSource.COMMANDLINE:
        pairs |= _pairs(value, "--option")
    return pairs


def _pairs(texts: Iterable[str], where: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise click.UsageError(
                f"{where} takes NAME=VALUE; a VALUE with blanks in it is quoted."
            )
        if holds_key(value):
            raise click.UsageError(
                f"{where} holds a key itself. Put it into a file of its own (chmod 600); replace "
                "the key if others may have seen it."
            )
        if name in pairs:
            raise click.UsageError(f"{where} has an option twice.")
        pairs[name] = value
    return pairs


class _Seconds(click.types.FloatParamType):
    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the number, see `click.ParamType`."""
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)


SECONDS = _Seconds()


def _read_timeout(
    context: click.Context,  # noqa: ARG001 (click's signature of a callback)
    parameter: click.Parameter,  # noqa: ARG001
    value: float | None,
) -> float | None:
    """Seconds, as a callback of click."""
    if value is not None and not 0 < value <= _LONGEST_TIMEOUT:
        raise click.UsageError("--timeout is not a number of seconds above 0, at most a day.")
    return value

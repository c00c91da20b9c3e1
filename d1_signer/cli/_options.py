# SPDX-License-Identifier: Apache-2.0
"""The backends' own options as text: ``--option NAME=VALUE`` and ``D1_SIGNER_OPTIONS``.

Names and meanings are those of `open_signer`'s options; how a text is read goes by the type that
the backend declares. No error repeats a value: it may be a secret, put there by mistake.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import stat
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import unquote

import click

from d1_signer.cli._output import Command
from d1_signer.errors import D1SignerError
from d1_signer.secret import SecretSource, holds_key, shown_path

if TYPE_CHECKING:
    from d1_signer.es256 import PublicKey

VARIABLE = "D1_SIGNER_OPTIONS"
HSM_PATIENCE = 30.0  # seconds
_LONGEST_TIMEOUT = 86_400.0
_LARGEST_FILE = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Base64 with its padding looks like a name and "=" as well: only what cannot be that is repeated.
_PLAIN_NAME = re.compile(r"[a-z]+([_-][a-z]+)*")
_USER_IN_URL = re.compile(r"://[^/?#]*@")
_WHOLE_NUMBER = re.compile(r"-?(0x[0-9A-Fa-f]{1,16}|[0-9]{1,19})")
_DECIMAL = re.compile(r"-?([0-9]{1,19}(\.[0-9]{0,19})?|\.[0-9]{1,19})")
# What `open_signer` has itself, for a key of any backend.
_FOR_EVERY_KEY = ("attestation", "attestation_anchors")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """What a run was given for its backends.

    Attributes:
        given: Names and texts.
        timeout: Seconds for a backend that has a time limit; None: its own.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None

    def require_known(self, uris: Iterable[str]) -> None:
        """Refuse an option that no backend of these keys knows.

        Raises:
            click.UsageError: There is one.
        """
        from d1_signer.signing.registry import option_names

        unknown, known = set(self.given) - {*_FOR_EVERY_KEY}, {*_FOR_EVERY_KEY}
        for uri in uris:
            functions = [_function(uri, name) for name in ("open_backend", "generate_key")]
            if functions[0] is None:
                return  # opening it tells why
            for function in filter(None, functions):
                known.update(option_names(function))
                unknown = {name for name in unknown if _parameter(function, name) is None}
        if unknown:
            plain = sorted(filter(_PLAIN_NAME.fullmatch, unknown))
            raise click.UsageError(
                f"No backend of these keys knows the option {', '.join(plain) or 'that is given'} "
                f"(--option, {VARIABLE}). Known: {', '.join(sorted(known)) or 'none'}."
            )

    def for_key(self, uri: str, function_name: str = "open_backend") -> dict[str, Any]:
        """The options that a function of the key's backend takes, as it wants them.

        Raises:
            click.UsageError: A value cannot be read.
        """
        from d1_signer.signing.registry import option_names

        function = _function(uri, function_name)
        if function is None:
            return {}
        chosen: dict[str, Any] = {}
        if function_name == "open_backend":
            chosen = {name: self.given[name] for name in _FOR_EVERY_KEY if name in self.given}
        for name, text in self.given.items():
            parameter = _parameter(function, name)
            if parameter is not None:
                chosen[name] = _converted(name, text, _type_of(function, parameter))
        if self.timeout is not None and "timeout" in option_names(function):
            chosen["timeout"] = self.timeout
        return chosen


def with_options(command: Command) -> Command:
    """Give a command ``--option`` and ``--timeout``, as its ``options``."""

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
        type=float,
        metavar="SECONDS",
        callback=_read_timeout,
        help="Time limit of the HSM or KMS, for opening the key and for each signature.",
    )
    @functools.wraps(command)
    def wrapper(*args: Any, options: dict[str, str], timeout: float | None, **others: Any) -> Any:
        return command(*args, options=BackendOptions(given=options, timeout=timeout), **others)

    return wrapper


class _ShellWords(click.types.StringParamType):
    """Text; several of them in a variable, split as a shell does."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """Split, see `click.ParamType`."""
        return _split(rv)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise click.UsageError(
            f"{VARIABLE} cannot be split as a shell does: {str(error).lower()}."
        ) from None


def _read_options(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[str, str]:
    """Names and texts, as a callback of click; a flag wins over the variable, name by name."""
    source = context.get_parameter_source(parameter.name or "")
    if source is not click.core.ParameterSource.COMMANDLINE:
        return _pairs(value, VARIABLE)
    if any(map(_USER_IN_URL.search, value)):
        raise click.UsageError(
            "A URL with a user name or password is not taken from the command line, which every "
            "user of this machine can read."
        )
    return _pairs(_split(os.environ.get(VARIABLE, "")), VARIABLE) | _pairs(value, "--option")


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


def _read_timeout(
    context: click.Context,  # noqa: ARG001 (click's signature of a callback)
    parameter: click.Parameter,  # noqa: ARG001
    value: float | None,
) -> float | None:
    """Seconds, as a callback of click."""
    if value is not None and not 0 < value <= _LONGEST_TIMEOUT:
        raise click.UsageError("--timeout is not a number of seconds above 0, at most a day.")
    return value


def _function(uri: str, name: str) -> Callable[..., Any] | None:
    """A function of the key's backend; None where that cannot be had."""
    from d1_signer.signing.registry import load_backend_module

    try:
        function = getattr(load_backend_module(uri), name, None)
    except D1SignerError:
        return None
    return function if callable(function) else None


def _parameter(function: Callable[..., Any], name: str) -> inspect.Parameter | None:
    """The parameter that takes an option; what `open_signer` has itself, a backend never sees."""
    from d1_signer.signing.opening import open_signer
    from d1_signer.signing.registry import option_names

    if name in inspect.signature(open_signer).parameters:
        return None
    parameters = inspect.signature(function).parameters
    if name in option_names(function):
        return parameters[name]
    takes_any = (p for p in parameters.values() if p.kind is p.VAR_KEYWORD)
    return next(takes_any, None) if name.isidentifier() else None


def _type_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The declared type; None where it cannot be read, as one that only type checkers import."""
    if parameter.annotation is parameter.empty:
        return Any
    # One by one: a single one that cannot be read would hide the others.
    one = SimpleNamespace(__annotations__={"it": parameter.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(one, globalns=names)["it"]
    except Exception:  # noqa: BLE001 (an annotation may be any expression)
        return None


def _converted(name: str, text: str, kind: Any) -> Any:
    """The text as a value of a declared type.

    Raises:
        click.UsageError: It is none, or the type has no text form.
    """
    read = reader_for(kind)
    if read is None:
        raise click.UsageError(
            f"The option {name} cannot be given as text; open the key in Python for it."
        )
    try:
        return read(text)
    except _Misread as error:
        raise click.UsageError(f"The option {name} {error}") from None


def reader_for(kind: Any) -> Callable[[str], Any] | None:
    """What reads a text as a value of a declared type; None: the type has no text form."""
    kinds = {kind, *get_args(kind)}
    if {*get_args(SecretSource)} <= kinds:
        return _source
    from d1_signer.es256 import PublicKey

    readers: tuple[tuple[Any, Callable[[str], Any]], ...] = (
        (PublicKey, _public_key),
        (bool, _boolean),
        (int, _whole_number),
        (float, _number),
        (str, str),
        (Any, str),
    )
    # By the first that the declared type admits.
    return next((read for known, read in readers if known in kinds), None)


class _Misread(Exception):
    """Why a text is not what it should be; the end of a sentence."""


def _source(text: str) -> str:
    if text == "prompt" or text.startswith(("file:", "env:")):
        return text
    raise _Misread(
        "says where a secret comes from (file:PATH, env:NAME or prompt), and is not the secret."
    )


def _public_key(text: str) -> PublicKey:
    """A public key from its PEM file, whose path may be written as a file: URI."""
    from d1_signer.es256 import PublicKey

    path = text
    if text.lower().startswith("file:"):
        path = unquote(text[len("file:") :].removeprefix("//"))
    shown = shown_path(path)
    try:
        with open(path, "rb", opener=_without_blocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _Misread(f"names no regular file: {shown}.")
            content = file.read(_LARGEST_FILE)
        return PublicKey.from_pem(content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise _Misread(f"names a file that cannot be read: {shown}: {reason}.") from None
    except D1SignerError:
        raise _Misread(f"names a file without a public key on P-256 in PEM: {shown}.") from None


def _without_blocking(path: str, flags: int) -> int:
    # A FIFO without a writer would hold the command for ever; it is refused after the open.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _boolean(text: str) -> bool:
    if text not in {"true", "false"}:
        raise _Misread("is neither true nor false.")
    return text == "true"


def _whole_number(text: str) -> int:
    if not _WHOLE_NUMBER.fullmatch(text):
        raise _Misread("is no whole number, such as 4 or 0x80000001.")
    return int(text, 16 if "x" in text else 10)


def _number(text: str) -> float:
    if not _DECIMAL.fullmatch(text):
        raise _Misread("is no number, such as 2.5.")
    return float(text)

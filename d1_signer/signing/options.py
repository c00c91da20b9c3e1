# SPDX-License-Identifier: Apache-2.0
"""The backends' own options as text, as settings have them.

Names and meanings are those of `open_signer`'s options; how a text is read goes by the type that
the backend declares. No error repeats a value: it may be a secret, put there by mistake.
"""

from __future__ import annotations

import inspect
import os
import re
import stat
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, get_args
from urllib.parse import unquote

from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.es256 import PublicKey
from d1_signer.frames import without_locals
from d1_signer.secret import SecretSource, shown_path
from d1_signer.signing.key_uri import scheme_of
from d1_signer.signing.opening import open_signer
from d1_signer.signing.registry import load_backend_module, option_names

HSM_PATIENCE = 30.0
"""Seconds for an HSM where nothing else is said: a library that hangs has no limit of its own."""

_LARGEST_FILE = 1 << 20
# Base64 with its padding looks like a name and "=" as well: only what cannot be that is repeated.
_PLAIN_NAME = re.compile(r"[a-z]+([_-][a-z]+)*")
_WHOLE_NUMBER = re.compile(r"-?(0x[0-9A-Fa-f]{1,16}|[0-9]{1,19})")
_DECIMAL = re.compile(r"-?([0-9]{1,19}(\.[0-9]{0,19})?|\.[0-9]{1,19})")
# What `open_signer` has itself, for a key of any backend.
_FOR_EVERY_KEY = ("attestation", "attestation_anchors")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyOptions:
    """What keys were given for their backends.

    Attributes:
        given: Names and texts.
        timeout: Seconds for a backend that has a time limit; None: its own.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None

    @without_locals
    def require_known(self, uris: Iterable[str]) -> None:
        """Refuse an option that no backend of these keys knows.

        Raises:
            ConfigurationError: There is one.
        """
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
            raise ConfigurationError(
                f"No backend of these keys knows the option {', '.join(plain) or 'that is given'}. "
                f"Known: {', '.join(sorted(known)) or 'none'}."
            )

    @without_locals
    def for_key(self, uri: str, function_name: str = "open_backend") -> dict[str, Any]:
        """The options that a function of the key's backend takes, as it wants them.

        Raises:
            ConfigurationError: A value cannot be read.
        """
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

    @without_locals
    def for_opening(self, uri: str) -> dict[str, Any]:
        """As `for_key`; with a time limit where the backend has none by default.

        Raises:
            ConfigurationError: A value cannot be read.
        """
        limit = {"timeout": HSM_PATIENCE} if scheme_of(uri) == "pkcs11" else {}
        return limit | self.for_key(uri)


def _function(uri: str, name: str) -> Callable[..., Any] | None:
    """A function of the key's backend; None where that cannot be had."""
    try:
        function = getattr(load_backend_module(uri), name, None)
    except D1SignerError:
        return None
    return function if callable(function) else None


def _parameter(function: Callable[..., Any], name: str) -> inspect.Parameter | None:
    """The parameter that takes an option; what `open_signer` has itself, a backend never sees."""
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
        ConfigurationError: It is none, or the type has no text form.
    """
    read = reader_for(kind)
    if read is None:
        raise ConfigurationError(
            f"The option {name} cannot be given as text; open the key in Python for it."
        )
    try:
        return read(text)
    except _Misread as error:
        raise ConfigurationError(f"The option {name} {error}") from None


def reader_for(kind: Any) -> Callable[[str], Any] | None:
    """What reads a text as a value of a declared type; None: the type has no text form."""
    kinds = {kind, *get_args(kind)}
    if {*get_args(SecretSource)} <= kinds:
        return _source
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

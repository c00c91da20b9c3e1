# SPDX-License-Identifier: Apache-2.0
"""The names of settings, and how the value of each is read. No value is repeated in an error."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import ConfigurationError
from d1_signer.secret import holds_key
from d1_signer.signing.key_uri import holds_pin_itself, scheme_of, without_secrets
from d1_signer.token.d1 import Environment
from d1_signer.token.renewal import Limits, seconds

# What is no name of ours may be a secret that stands in the wrong place.
_PLAIN_NAME = re.compile(r"[a-z]{1,16}([_-][a-z]{1,16}){0,4}|D1(_[A-Z]{1,16}){1,4}")
_LIKE_A_SECRET = re.compile(r"pin|pass|secret|token|credential|private|store_key", re.IGNORECASE)
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
_STORE_URL = re.compile(rf"rediss?://{_HOST}(:[0-9]{{1,5}})?(/[0-9]{{0,5}})?|unix:///[^?#@\s]+")
_PROXY = re.compile(rf"http://{_HOST}:[0-9]{{1,5}}/?")
_USER = re.compile(r"://[^/?#]*@")
# What Python makes a number of that C has a name for.
_MOST_BITS = 64
_NO_SECRET = "No secret stands in settings: name its source, file:PATH or env:NAME."  # noqa: S105

Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """Where the fleet shares its token.

    Attributes:
        key_source: Where the 32 bytes come from that seal tokens, as 64 hexadecimal digits.
        url: ``redis://``, ``rediss://`` or ``unix://``; None: the store is given in code.
        username: Whom the store knows us as.
        password_source: Where that user's password comes from.
        ca_file: Authorities for the store's certificate.
        cluster: Whether it is a cluster.
    """

    key_source: str
    url: str | None = None
    username: str | None = None
    password_source: str | None = None
    ca_file: str | None = None
    cluster: bool = False


def refuse(name: str, why: str, hint: str = "") -> NoReturn:
    """Raise the error for a setting."""
    raise ConfigurationError(f"{name} {why}.", hint=hint)


def read_table(document: object, readers: Mapping[str, Reader], path: str) -> dict[str, Any]:
    """Read a table of known names.

    Raises:
        ConfigurationError: A name is not known, or a value cannot be used.
    """
    if not isinstance(document, dict):
        refuse(path, "is no table", f"Write [{path}], and its names below.")
    for name in document:
        if name not in readers:
            _refuse_name(name, readers, path)
    return {
        name: readers[name](value, f"{path}.{name}" if path else name)
        for name, value in document.items()
    }


def _refuse_name(name: str, readers: Mapping[str, Reader], path: str) -> NoReturn:
    where = f" in [{path}]" if path else ""
    told = f"The name {name}" if _PLAIN_NAME.fullmatch(name) else "A name"
    meant = name.lower().replace("-", "_").removeprefix("d1_").removeprefix("signer_")
    secret = _LIKE_A_SECRET.search(name)
    here = {
        known: known if not path else f"{path}.{known}"
        for known in readers
        if not secret or known.endswith("_source")
    }
    elsewhere = {known.rpartition(".")[2]: known for known in _ALL}
    near = difflib.get_close_matches(meant, here, n=1, cutoff=0.5)
    hint = f"Known here: {', '.join(readers)}."
    if meant in elsewhere and meant not in here:
        hint = f"Did you mean {elsewhere[meant]}?"
    elif near:
        hint = f"Did you mean {here[near[0]]}?"
    if secret:
        hint = f"{hint} {_NO_SECRET}"
    raise ConfigurationError(f"{told}{where} is not known.", hint=hint)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        refuse(name, "is no text", f'Write it in quotes: {name.rpartition(".")[2]} = "…".')
    if holds_key(value):
        refuse(
            name,
            "holds a key itself",
            "Put the key into a file of its own (chmod 600), and its path or URI here; replace the "
            "key if others may have seen it.",
        )
    if not value or not value.isprintable():
        refuse(name, "is empty, or has characters that cannot be printed")
    if _USER.search(value):
        refuse(name, "has a user name or a password in its URL", _NO_SECRET)
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        refuse(name, "is neither true nor false")
    return value


def _seconds(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, "is no number of seconds")
    return float(seconds(value, name, least=0.001))


def _uri(value: object, name: str) -> str:
    uri = _text(value, name)
    if holds_pin_itself(uri) or "****" in without_secrets(uri.partition("?")[0]):
        refuse(name, "holds a secret itself", f"{_NO_SECRET} In a key URI: pin-source=file:PATH.")
    if not scheme_of(uri):
        refuse(
            name,
            "has something in it that is no key URI",
            "It begins with pkcs11:, awskms:, gcpkms:, hashivault: or file:.",
        )
    return uri


def _uris(value: object, name: str) -> tuple[str, ...]:
    found = tuple(_uri(each, name) for each in (value if isinstance(value, list) else [value]))
    if not found:
        refuse(name, "is empty", 'Write key = ["URI", "URI"], first the active one.')
    return found


def _path_or_uri(value: object, name: str) -> str:
    text = _text(value, name)
    return _uri(text, name) if scheme_of(text) else text


def _source(value: object, name: str) -> str:
    text = _text(value, name)
    if text != "prompt" and not text.startswith(("file:", "env:")):
        refuse(name, "is no source of a secret", _NO_SECRET)
    return text


def _environment(value: object, name: str) -> str:
    text = _text(value, name)
    Environment.of(text)
    return text


def _proxy(value: object, name: str) -> str:
    text = _text(value, name)
    if not _PROXY.fullmatch(text):
        refuse(
            name,
            "is not of the form http://HOST:PORT",
            "Its USER:PASSWORD comes from proxy_credentials_source.",
        )
    return text


def _store_url(value: object, name: str) -> str:
    text = _text(value, name)
    if not _STORE_URL.fullmatch(text):
        refuse(
            name,
            "is not of the form rediss://HOST:PORT/DB, redis:// or unix://PATH",
            "User and password stand in username and password_source.",
        )
    return text


def _format(value: object, name: str) -> str:
    text = _text(value, name)
    if text not in {"form", "json"}:
        refuse(name, "is neither form nor json")
    return text


def _policy(value: object, name: str) -> str:
    words = value if isinstance(value, list) else [value]
    text = ",".join(_text(word, name) for word in words)
    CustodyPolicy.parse(text, where=name)
    return text


def _options(value: object, name: str) -> dict[str, str]:
    """Texts, which are read by the type that the backend declares."""
    if not isinstance(value, dict):
        refuse(name, "is no table", f"Write [{name}], and the options below.")
    return {known: _option(each, f"{name}.{known}") for known, each in value.items()}


def _option(value: object, name: str) -> str:
    shown = name if _PLAIN_NAME.fullmatch(name.partition(".")[2]) else "an option"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    text = _text(value, shown)
    if shown.endswith("_source"):
        _source(text, shown)
    return text


_LIMITS: dict[str, Reader] = dict.fromkeys(("total", "sign", "connect", "read"), _seconds)
_STORE: dict[str, Reader] = {
    "key_source": _source,
    "url": _store_url,
    "username": _text,
    "password_source": _source,
    "ca_file": _text,
    "cluster": _flag,
}


def _limits(value: object, name: str) -> Limits:
    return Limits(**read_table(value, _LIMITS, name))


def _store(value: object, name: str) -> StoreSettings:
    given = read_table(value, _STORE, name)
    if "key_source" not in given:
        refuse(
            name,
            "has no key_source",
            "Name the file of the fleet's key: openssl rand -hex 32, the same for all.",
        )
    return StoreSettings(**given)


FIELDS: dict[str, Reader] = {
    "environment": _environment,
    "issuer_id": _text,
    "key": _uris,
    "kid": _text,
    "option": _options,
    "timeout": _seconds,
    "client_cert": _text,
    "client_key": _path_or_uri,
    "client_key_passphrase_source": _source,
    "ca_file": _text,
    "proxy": _proxy,
    "proxy_credentials_source": _source,
    "proxy_adds_certificate": _flag,
    "audience": _text,
    "no_audience": _flag,
    "request_format": _format,
    "custody_policy": _policy,
    "audit_trail": _text,
    "audit_origin": _text,
    "audit_key": _uri,
    "limits": _limits,
    "store": _store,
}
_ALL = (
    *FIELDS,
    *(f"limits.{name}" for name in _LIMITS),
    *(f"store.{name}" for name in _STORE),
)

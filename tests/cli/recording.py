# SPDX-License-Identifier: Apache-2.0
"""A backend with an option of each type, which writes down what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d1_signer.backends import pem
from d1_signer.errors import ConfigurationError
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource
from d1_signer.signing.backend import Backend, GeneratedKey

if TYPE_CHECKING:
    from missing_sdk import Client  # type: ignore[import-not-found]

given: list[dict[str, Any]] = []


def open_backend(
    uri: str,
    *,
    flag: bool | None = None,
    count: int = 1,
    seconds: float = 1.0,
    text: str | None = None,
    source: SecretSource | None = None,
    key: PublicKey | str | None = None,
    anything: Any = None,
    client: Client | Callable[[], Client] | None = None,
    hook: Callable[[], None] | None = None,
    timeout: float = 10.0,
) -> Backend:
    """Open the PEM file that ``recording:///PATH`` names."""
    options = dict(locals())
    given.append({name: value for name, value in options.items() if name != "uri"})
    if count < 0:
        raise ConfigurationError("count is below 0.")
    return pem.open_backend(uri.replace("recording", "file"))


def generate_key(uri: str, *, flag: bool = False, label: str = "") -> GeneratedKey:
    """Make a key in a PEM file."""
    given.append({"flag": flag, "label": label})
    return pem.generate_key(uri.replace("recording", "file"))

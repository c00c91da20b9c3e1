# SPDX-License-Identifier: Apache-2.0
"""A loopback D1 authorization server for demos and tests.

It speaks what Thales' OpenAPI document says, over mutual TLS with certificates made for the run,
verifies assertions with a JOSE library by others, and misbehaves on request::

    with Sandbox(issuer_id="demo-issuer") as sandbox:
        sandbox.register_key(signer.kid, signer.public_key.jwk())
        ...                                  # fetch tokens from sandbox.base_url
        sandbox.misbehave(Fault.STATUS_503, times=2, retry_after=1)

It listens on 127.0.0.1 only and is no place for production keys. It needs the extra
``d1-signer[sandbox]``; the names below other than `Sandbox` do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d1_signer.errors import MissingExtraError
from d1_signer.sandbox.records import Counters, Exchange, Fault, TokenRequest

if TYPE_CHECKING:
    from d1_signer.sandbox.server import Sandbox

__all__ = ["Counters", "Exchange", "Fault", "Sandbox", "TokenRequest"]

_EXTRA = frozenset({"aiohttp", "joserfc"})


def __getattr__(name: str) -> object:
    # Late, so that a command line can offer the faults by name where the extra is not installed.
    if name != "Sandbox":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from d1_signer.sandbox.server import Sandbox  # noqa: PLC0415, RUF100
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        raise MissingExtraError.of(package, "sandbox") from None
    return Sandbox

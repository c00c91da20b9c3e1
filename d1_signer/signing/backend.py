# SPDX-License-Identifier: Apache-2.0
"""What a place that holds keys must offer, and how whatever it raises becomes our error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from d1_signer import frames
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import D1SignerError, SignerError
from d1_signer.es256 import PublicKey

_P = ParamSpec("_P")
_T = TypeVar("_T")


class SignatureEncoding(StrEnum):
    """How a backend answers a signature; declared by the backend, never guessed."""

    RAW = "raw"
    DER = "der"


class Backend(Protocol):
    """What a place that holds a key must be able to do. All methods may be called by any thread.

    Every failure is raised as an error of `d1_signer.errors` that repeats no secret. A backend
    works in a forked child as in its parent.
    """

    @property
    def name(self) -> str:
        """Short name for logs and reports, such as ``"pkcs11"``."""
        ...

    @property
    def encoding(self) -> SignatureEncoding:
        """Declared form of the answers of `sign_digest`."""
        ...

    def public_key(self) -> PublicKey:
        """The public key, pinned when the backend was opened: always the same one."""
        ...

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign a digest.

        Args:
            digest: SHA-256 digest, 32 bytes (checked by the caller).
            deadline: Moment on ``time.monotonic()`` by which to answer or raise; None: the
                backend's own time limit.

        Returns:
            The signature in the declared encoding.
        """
        ...

    def custody(self) -> Evidence:
        """Collect what is known about where the private key lives."""
        ...

    def close(self) -> None:
        """Release what is held; calling it again does nothing."""
        ...


@runtime_checkable
class Pooled(Protocol):
    """A backend with a bounded number of sessions; what an operator watches."""

    def pool_use(self) -> tuple[int, int]:
        """Sessions in use now, and how many there may be."""
        ...


@runtime_checkable
class Reopening(Protocol):
    """A backend that opens its key anew by itself, such as after its device was away.

    The `Signer` looks at it before and after each signature where a custody policy is in force, and
    holds the policy again.
    """

    @property
    def openings(self) -> int:
        """How often the key was opened so far; never less than before."""
        ...

    def custody_within(self, deadline: float | None) -> Evidence:
        """As `Backend.custody`, by a moment on ``time.monotonic()``; None: its own limit."""
        ...


class BackendModule(Protocol):
    """What an entry point of the group ``d1_signer.backends`` refers to."""

    def open_backend(self, uri: str, **options: Any) -> Backend:
        """Open the key that ``uri``, without its fragment, names."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedKey:
    """A key that was just made.

    Attributes:
        uri: The URI that `open_signer` takes for it, without secrets.
        public_key: The public half.
    """

    uri: str
    public_key: PublicKey


def guarded(backend: str, function: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """Call what may be a plug-in's; whatever it raises becomes our error."""
    try:
        return function(*args, **options)
    except D1SignerError:
        raise
    except Exception as failure:
        if frames.of_signal_handler(failure):
            raise
        kind = type(failure).__name__
    # Its text and its attributes may carry a secret: only its type is told, and it is over here, so
    # that it does not become the context of ours.
    raise SignerError(
        f"The {backend} backend failed with {kind}.",
        hint="This is a defect of the backend; report it to its maintainers.",
    )

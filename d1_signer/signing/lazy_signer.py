# SPDX-License-Identifier: Apache-2.0
"""A signer whose device may be down, or may hang, while the process starts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import final

from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    KeyMismatchError,
    SignerClosedError,
    SignerError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.frames import without_locals
from d1_signer.signing import forks
from d1_signer.signing.backend import guarded
from d1_signer.signing.signer import Signer

_lazy_signers: weakref.WeakSet[LazySigner] = weakref.WeakSet()


class _Opening:
    """One opening under way, in a thread of its own: a device that hangs holds up only that."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.signer: Signer | None = None
        self.error: D1SignerError | None = None


@final
class LazySigner:
    """A member of a `SignerSet` that is opened when it is needed.

    Its kid and public key are told instead of asked, and the key that is found must be that one.
    """

    @without_locals  # a URI with a PIN may be given for the opener
    def __init__(self, opener: Callable[[], Signer], *, kid: str, public_key: PublicKey) -> None:
        """Remember how to open the signer.

        Args:
            opener: Opens it: ``lambda: open_signer(uri, kid=kid)``.
            kid: Its key identifier.
            public_key: Its public key.

        Raises:
            ConfigurationError: ``opener`` cannot be called, or ``public_key`` is none.
        """
        if not callable(opener) or not isinstance(public_key, PublicKey):
            raise ConfigurationError(
                "A LazySigner needs a callable that opens it, and its PublicKey.",
                hint="Write LazySigner(lambda: open_signer(uri, kid=kid), kid=…, public_key=…).",
            )
        self._opener = opener
        self._lock = threading.Lock()
        self._signer: Signer | None = None
        self._opening: _Opening | None = None
        self._closed = False
        self.kid = kid
        self.public_key = public_key
        _lazy_signers.add(self)

    def signer(self, *, timeout: float | None = None) -> Signer:
        """The open signer; opens it where it is not, one caller for all.

        Args:
            timeout: Seconds to wait for the opening at most; None: as long as it takes.

        Raises:
            SignerTimeout: It is not open in time; the opening goes on.
            KeyMismatchError: The key or the kid is not the one that was told.
            SignerClosedError: It was closed; it is not opened again.
            SignerUnavailable: No thread can be started to open it.
            SignerError: It cannot be opened.
        """
        forks.notice()
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._signer is not None:
                return self._signer
            opening = self._opening
            if opening is None:
                opening = _Opening()
                self._start(opening)
                self._opening = opening
        if not opening.ended.wait(timeout):
            raise SignerTimeout(
                f"The signer of kid {self.kid!r} is not open within {timeout:g} seconds.",
                hint="Its device hangs; look at it. The opening goes on.",
            )
        if opening.error is not None:
            raise opening.error.fresh()
        if opening.signer is None:
            raise self._closed_error()
        return opening.signer

    def _start(self, opening: _Opening) -> None:
        try:
            threading.Thread(
                target=self._open, args=(opening,), name="d1-signer-opening", daemon=True
            ).start()
        except RuntimeError:
            raise SignerUnavailable(
                f"No thread can be started to open the signer of kid {self.kid!r}.",
                hint="The process has reached its limit of threads.",
            ) from None

    def _open(self, opening: _Opening) -> None:
        signer: Signer | None = None
        try:
            signer = guarded(f"opener of kid {self.kid!r}", self._checked)
        except D1SignerError as error:
            opening.error = error.fresh()
        except BaseException as error:  # noqa: BLE001 (an opener that exits ends this thread alone)
            opening.error = SignerError(
                f"The opener of kid {self.kid!r} ended with {type(error).__name__}."
            )
        with self._lock:
            if self._opening is opening:
                self._opening = None
            if not self._closed:
                self._signer = opening.signer = signer
                signer = None
        opening.ended.set()
        if signer is not None:
            signer.close()  # it came too late

    def _checked(self) -> Signer:
        signer = self._opener()
        if signer.public_key != self.public_key or signer.kid != self.kid:
            signer.close()
            raise KeyMismatchError(
                f"The key of kid {self.kid!r} is not the expected one: it has the kid "
                f"{signer.kid!r} and the thumbprint {signer.public_key.thumbprint()}.",
                hint="Check the key URI against the key that was registered.",
            )
        return signer

    def _closed_error(self) -> SignerClosedError:
        return SignerClosedError(f"The signer of kid {self.kid!r} is closed.")

    def close(self) -> None:
        """Close the signer where it was opened; it is not opened again."""
        forks.notice()
        with self._lock:
            self._closed = True
            signer, self._signer = self._signer, None
        if signer is not None:
            signer.close()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._opening = None


def _after_fork_in_child() -> None:
    # The thread that opened, or held a lock, is not here.
    for lazy in list(_lazy_signers):
        lazy._after_fork()  # noqa: SLF001 (this module's own class)


forks.in_child(_after_fork_in_child)

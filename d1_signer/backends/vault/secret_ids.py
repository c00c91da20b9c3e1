# SPDX-License-Identifier: Apache-2.0
"""What this process knows of secrets that Vault counts: refused, used, unwrapped.

For all signers of the process and for its life, under salted digests, as PINs are.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Iterator

from d1_signer.secret import Secret
from d1_signer.signing import forks
from d1_signer.transport.deadlines import no_time_left

# A source that gives a new wrapping token for each login would have this grow for ever.
_MOST_UNWRAPPED = 64


class _Shared:
    """A lock, and how many hold it or wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class Known:
    """What is known of secret ids and of the tokens that wrap them.

    Vault counts failures and locks the role for everybody (``user_lockout``), and unwraps once.

    Attributes:
        refused: What it refused: not sent again.
        good: Secret ids with which a login succeeded.
        unwrapped: Secret ids by the tokens that wrapped them.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._salt = secrets.token_bytes(32)
        self.refused: set[bytes] = set()
        self.good: set[bytes] = set()
        self.unwrapped: dict[bytes, Secret] = {}
        self.new_locks()

    def new_locks(self) -> None:
        """In a child of a fork: the parent's may have been held at that moment."""
        # One for each secret: a Vault that hangs must not hold up the signers of another.
        self._locks: dict[bytes, _Shared] = {}
        self._counting = threading.Lock()

    def digest(self, *parts: str) -> bytes:
        """The name of a secret here."""
        return hmac.digest(self._salt, "\0".join(parts).encode(), hashlib.sha256)

    @contextlib.contextmanager
    def alone(self, digest: bytes, until: float) -> Iterator[None]:
        """One signer after the other: the second knows what became of the first one's request."""
        with self._counting:
            shared = self._locks.setdefault(digest, _Shared())
            shared.users += 1
        try:
            if not shared.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                raise no_time_left()
            try:
                yield
            finally:
                shared.lock.release()
        finally:
            with self._counting:
                shared.users -= 1
                if not shared.users:
                    self._locks.pop(digest, None)

    def keep(self, wrapping: bytes, inner: Secret) -> None:
        """Keep what a wrapping token held."""
        while len(self.unwrapped) >= _MOST_UNWRAPPED:
            del self.unwrapped[next(iter(self.unwrapped))]
        self.unwrapped[wrapping] = inner


known = Known()
forks.in_child(known.new_locks)

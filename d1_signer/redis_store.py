# SPDX-License-Identifier: Apache-2.0
"""A token store in Redis or Valkey, for `TokenFetcher(store=…)`; needs ``d1-signer[redis]``.

Use::

    store = RedisTokenStore(redis.Redis.from_url("rediss://…", **RedisTokenStore.CLIENT_SETTINGS))
    fetcher = TokenFetcher(signer, …, store=store, store_key=key)

Any client of the redis package serves: ``Redis.from_url``, ``RedisCluster.from_url``,
``Sentinel(…).master_for(…)``. All keys of one fetcher are in one hash slot.
"""

from __future__ import annotations

from typing import Any, Final, final

from d1_signer.errors import MissingExtraError, StoreUnavailable
from d1_signer.stores import Lease

try:
    from redis.cluster import RedisCluster
    from redis.exceptions import LockError, RedisError
    from redis.lock import Lock
except ModuleNotFoundError:
    raise MissingExtraError.of("redis", "redis") from None

from redis import Redis


@final
class RedisTokenStore:
    """Keeps sealed tokens under ``d1-signer:{…}:token`` and leases under ``d1-signer:{…}:lease``.

    Its user needs the commands GET, PTTL, SET and EVALSHA, EVAL or SCRIPT LOAD on these keys.
    """

    CLIENT_SETTINGS: Final = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
    """Settings that keep a Redis which hangs from holding up a renewal for longer."""

    def __init__(self, client: Redis | RedisCluster) -> None:
        """Use a client, which stays the caller's to close."""
        # The package types its clients for sync and async use at once.
        self._client: Any = client

    def load(self, name: str) -> tuple[bytes, float] | None:
        """See `TokenStore.load`."""
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.get(f"{name}:token")
                pipe.pttl(f"{name}:token")
                sealed, remaining = pipe.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None
        if sealed is None or remaining < 0:
            return None
        return sealed.encode() if isinstance(sealed, str) else sealed, remaining / 1000

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        """See `TokenStore.save`."""
        try:
            self._client.set(f"{name}:token", sealed, px=max(1, int(life * 1000)))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None

    def lease(self, name: str, *, life: float) -> Lease | None:
        """See `TokenStore.lease`."""
        try:
            lock = Lock(self._client, f"{name}:lease", timeout=life, thread_local=False)
            return _Lease(lock) if lock.acquire(blocking=False) else None
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None


class _Lease:
    def __init__(self, lock: Lock) -> None:
        self._lock: Any = lock

    def release(self) -> None:
        try:
            self._lock.release()
        except LockError:
            return  # it ran out, and may be another's by now
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None


def _unavailable(error: Exception) -> StoreUnavailable:
    # Its text may hold the URL, and with it a password.
    return StoreUnavailable(
        f"The token store does not answer ({type(error).__name__}).",
        hint="Look at Redis; tokens are fetched without it meanwhile.",
    )

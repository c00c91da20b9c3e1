# SPDX-License-Identifier: Apache-2.0
"""A token store in Redis or Valkey, for `TokenFetcher(store=…)`; needs ``d1-signer[redis]``.

Use::

    store = RedisTokenStore(redis.Redis.from_url("rediss://…", **RedisTokenStore.CLIENT_SETTINGS))
    fetcher = TokenFetcher(signer, …, store=store, store_key=key)

Any client of the redis package serves: ``Redis.from_url``, ``RedisCluster.from_url``,
``Sentinel(…).master_for(…)``. All keys of one fetcher are in one hash slot.
"""

from __future__ import annotations

import secrets
from typing import Any, Final, final

from d1_signer.errors import MissingExtraError, StoreUnavailable
from d1_signer.token.stores import Lease

try:
    from redis.backoff import NoBackoff
    from redis.cluster import RedisCluster
    from redis.exceptions import RedisError
    from redis.retry import Retry
except ModuleNotFoundError:
    raise MissingExtraError.of("redis", "redis") from None

from redis import Redis

# A Redis that hung executes later what nobody waits for any more: a lease is taken for a moment
# first, so that one which its asker never heard of does not hold up the fleet.
_CLAIM = 2000  # milliseconds

_IF_MINE = "if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end "
_EXTEND = _IF_MINE + "return redis.call('pexpire', KEYS[1], ARGV[2])"
_RELEASE = _IF_MINE + "return redis.call('del', KEYS[1])"


@final
class RedisTokenStore:
    """Keeps sealed tokens under ``d1-signer:{…}:token`` and leases under ``d1-signer:{…}:lease``.

    Its user needs the commands GET, SET, PTTL, PEXPIRE and DEL on these keys, and EVALSHA with
    SCRIPT LOAD.
    """

    CLIENT_SETTINGS: Final[dict[str, Any]] = {
        "socket_timeout": 1.0,
        "socket_connect_timeout": 1.0,
        "retry": Retry(NoBackoff(), 0),
    }
    """Settings for each client, so that a Redis which hangs does not hold up a renewal for longer.

    The client's own default repeats each command for up to half a minute. A lease that is asked
    for twice looks like another's, too; what is not answered at once is done without.
    """

    def __init__(self, client: Redis | RedisCluster) -> None:
        """Use a client, which stays the caller's to close."""
        # The package types its clients for sync and async use at once.
        self._client: Any = client
        self._extend = self._client.register_script(_EXTEND)
        self._release = self._client.register_script(_RELEASE)

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
        key, owner, milliseconds = f"{name}:lease", secrets.token_hex(16), int(life * 1000)
        try:
            if not self._client.set(key, owner, nx=True, px=_CLAIM):
                # -1: no time to live. -2: it has just ended, and the next look takes it.
                left = self._client.pttl(key)
                if left == -1 or left > max(milliseconds, _CLAIM):
                    raise _no_lease()
                return None
            mine = self._extend(keys=[key], args=[owner, milliseconds])
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None
        return _Lease(self._release, key, owner) if mine else None


class _Lease:
    def __init__(self, release: Any, key: str, owner: str) -> None:
        self._release = release
        self._key = key
        self._owner = owner

    def release(self) -> None:
        try:
            self._release(keys=[self._key], args=[self._owner])
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None


def _no_lease() -> StoreUnavailable:
    return StoreUnavailable(
        "The lease in the token store is no renewal's: it has no time to live, or too long a one.",
        hint="Delete the key that ends in :lease, and give all of the fleet the same Limits.total; "
        "tokens are fetched without it meanwhile.",
    )


def _unavailable(error: Exception) -> StoreUnavailable:
    # Its text may hold the URL, and with it a password.
    return StoreUnavailable(
        f"The token store does not answer ({type(error).__name__}).",
        hint="Look at Redis; tokens are fetched without it meanwhile.",
    )

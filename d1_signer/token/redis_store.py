# SPDX-License-Identifier: Apache-2.0
"""A token store in Redis or Valkey, for `TokenFetcher(store=…)`; needs ``d1-signer[redis]``.

Use::

    store = RedisTokenStore(redis.Redis.from_url(url, **RedisTokenStore.CLIENT_SETTINGS))
    fetcher = TokenFetcher(signer, store=store, store_key=key, **settings)

Any synchronous client of the redis package serves: ``Redis.from_url``, ``RedisCluster.from_url``,
``Sentinel(…).master_for(…)``; or a function that makes one. All keys of one fetcher are in one hash
slot.
"""

from __future__ import annotations

import functools
import math
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, final

from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    MissingExtraError,
    StoreUnavailable,
)
from d1_signer.frames import without_locals
from d1_signer.secret import Secret
from d1_signer.token.stores import MAX_SEALED, MEMBER, Lease
from d1_signer.transport.processes import PerProcess

try:
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisClusterException, RedisError
    from redis.retry import Retry
except ModuleNotFoundError:
    raise MissingExtraError.of("redis", "redis") from None

from d1_signer.token.redis_clients import Client, address, checked, maker, pools_of, refusal, why

_P = ParamSpec("_P")
_T = TypeVar("_T")

# A Redis that hung executes later what nobody waits for any more: a lease is taken for a moment
# first, so that one which its asker never heard of does not hold up the fleet.
_CLAIM = 2000  # milliseconds
_OWNER = 32  # characters
# Of processes whose announcements are kept: a larger fleet shows a part of itself.
_PLACES = 256


def _answered(
    method: Callable[Concatenate[RedisTokenStore, _P], _T],
) -> Callable[Concatenate[RedisTokenStore, _P], _T]:
    """Have what Redis' package raises told as an error of ours, without that in its context.

    Its text and its frames may hold the URL, and with it a password.
    """

    @functools.wraps(method)
    def call(self: RedisTokenStore, /, *args: _P.args, **options: _P.kwargs) -> _T:
        failure: D1SignerError
        try:
            return method(self, *args, **options)
        except ConfigurationError as error:  # of a client that a function made
            failure = StoreUnavailable(error.message, hint=error.hint)
        # The last is of a connection that `abort` has closed meanwhile.
        except (RedisError, RedisClusterException, OSError, ValueError) as error:
            a_cluster = ", and whether it is a cluster"
            look = a_cluster if isinstance(error, RedisClusterException) else ""
            silent = f"does not answer ({why(error)})", f"Look at Redis{look}"
            told, hint = refusal(error) or silent
            failure = StoreUnavailable(
                f"The token store{self.where()} {told}.",
                hint=f"{hint}; tokens are fetched without it meanwhile.",
            )
        raise failure

    return call


class _Place:
    """Where a process tells of itself.

    Attributes:
        number: Its place; None: it has none so far.
        missed: Whether it looked for one and found none.
    """

    number: int | None = None
    missed = False


@final
class RedisTokenStore:
    """Keeps sealed tokens under ``d1-signer:{…}:token`` and leases under ``d1-signer:{…}:lease``.

    What processes tell of themselves is under ``d1-signer:{…}:member:N``.

    Its user needs the commands GETRANGE, SET, PTTL and DEL on these keys.
    """

    CLIENT_SETTINGS: Final[dict[str, Any]] = {
        "socket_timeout": 0.4,
        "socket_connect_timeout": 0.4,
        "retry": Retry(NoBackoff(), 0),
    }
    """Settings for each client, and for the ``sentinel_kwargs`` of a ``Sentinel``.

    A renewal gives its store a second for each call. So that one sentinel or node which hangs does
    not use it up, each has less; and the client's own default, to repeat a command for up to half a
    minute, is off: a lease that is asked for twice looks like another's.
    """

    @without_locals
    def __init__(self, client: Client | Callable[[], Client]) -> None:
        """Use a client, which stays the caller's to close.

        Args:
            client: A client for this store alone: calls that take too long are ended by closing its
                connections. Or a function that makes one when it is first needed, and again while
                it fails: ``RedisCluster`` cannot be made while its nodes are away.

        Raises:
            ConfigurationError: It is another kind of client, or one without time limits.
        """
        # The package looks its release up at its first connection. A module that is loaded for this
        # in another thread while a process forks would be locked in the child for ever.
        with suppress(metadata.PackageNotFoundError):
            metadata.version("redis")
        self._member: PerProcess[str] = PerProcess(lambda: secrets.token_hex(MEMBER // 2))
        self._place: PerProcess[_Place] = PerProcess(_Place)
        self._named = ""
        self._own = False
        # The package types its clients for sync and async use at once.
        self._clients: PerProcess[Any]
        if callable(client) and not isinstance(client, type):
            make = client
            self._clients = PerProcess(lambda: checked(make()))
        else:
            checked(client)
            self._clients = PerProcess(lambda: client)

    @classmethod
    @without_locals
    def from_url(
        cls,
        url: str,
        *,
        username: str | None = None,
        password: Secret | None = None,
        ca_file: str | None = None,
        cluster: bool = False,
    ) -> Self:
        """A store over a client of its own, with `CLIENT_SETTINGS`.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            username: Whom Redis knows us as.
            password: That user's.
            ca_file: PEM file of the authorities for Redis' certificate; None: the system's.
            cluster: Whether it is a cluster.

        Raises:
            ConfigurationError: It is no URL of Redis, or asks for TLS that is not verified, or for
                a database of a cluster, which has none.
        """
        settings = {**cls.CLIENT_SETTINGS, "username": username}
        made, named = maker(url, settings, password, ca_file=ca_file, cluster=cluster)
        store = cls(made)
        store._named, store._own = named, True
        return store

    @_answered
    def load(self, name: str) -> tuple[bytes, float] | None:
        """See `TokenStore.load`."""
        key = f"{name}:token"
        client = self._clients.get()
        try:
            with client.pipeline(transaction=False) as pipe:
                # Whoever can write to Redis can put half a gigabyte there.
                pipe.getrange(key, 0, MAX_SEALED)
                pipe.pttl(key)
                sealed, remaining = pipe.execute()
        except UnicodeDecodeError:  # of a client that decodes what it reads
            return None
        if not sealed or remaining < 0:
            return None
        return _bytes(sealed), remaining / 1000

    @_answered
    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        """See `TokenStore.save`."""
        client = self._clients.get()
        client.set(f"{name}:token", sealed, px=max(1, int(life * 1000)))

    @_answered
    def lease(self, name: str, *, life: float) -> Lease | None:
        """See `TokenStore.lease`."""
        key, milliseconds = f"{name}:lease", int(life * 1000)
        owner = self.member + secrets.token_hex((_OWNER - MEMBER) // 2)
        asked = time.monotonic()
        client = self._clients.get()
        with client.pipeline(transaction=False) as pipe:
            pipe.set(key, owner, nx=True, px=_CLAIM)
            pipe.pttl(key)
            claimed, left = pipe.execute()
        if not claimed:
            # -1: no time to live. -2: it has just ended, and the next look takes it.
            if left == -1 or left > max(milliseconds, _CLAIM):
                raise _no_lease()
            return None
        # An answer that took so long may be about a claim that ended and is another's by now.
        # No script, which could look and set at once: not every user of a Redis may run one.
        late = time.monotonic() - asked >= _CLAIM / 2000
        mine = not late and client.set(key, owner, xx=True, px=milliseconds)
        return _Lease(self, key, owner) if mine else None

    @_answered
    def release(self, key: str, owner: str) -> None:
        """Give a lease back, unless it is another's by now."""
        client = self._clients.get()
        if _bytes(client.getrange(key, 0, _OWNER)) == owner.encode():
            client.delete(key)

    @property
    def member(self) -> str:
        """See `Register.member`."""
        return self._member.get()

    @_answered
    def announce(self, name: str, sealed: bytes, *, life: float) -> None:
        """See `Register.announce`."""
        content, place = self.member.encode() + sealed, self._place.get()
        milliseconds = max(1, int(life * 1000))
        client = self._clients.get()
        if place.number is not None:
            key = f"{name}:member:{place.number}"
            if _bytes(client.getrange(key, 0, MEMBER - 1)) == self.member.encode():
                client.set(key, content, px=milliseconds)
                return
        for number in self._places(name, all_of_them=place.missed):
            if client.set(f"{name}:member:{number}", content, nx=True, px=milliseconds):
                place.number = number
                return
        place.number, place.missed = None, True

    @_answered
    def withdraw(self, name: str) -> None:
        """See `Register.withdraw`."""
        client, place = self._clients.get(), self._place.get()
        if place.number is not None:
            key = f"{name}:member:{place.number}"
            place.number = None
            if _bytes(client.getrange(key, 0, MEMBER - 1)) == self.member.encode():
                client.delete(key)

    def _places(self, name: str, *, all_of_them: bool) -> Iterator[int]:
        """Some places; and those that are free, for who found none the last time.

        A fleet of thousands that starts at once is not to look at all of them at once.
        """
        yield from random.sample(range(_PLACES), 4)
        if not all_of_them:
            return
        with self._clients.get().pipeline(transaction=False) as pipe:
            for number in range(_PLACES):
                pipe.getrange(f"{name}:member:{number}", 0, 0)
            free = [number for number, taken in enumerate(pipe.execute()) if not taken]
        yield from random.sample(free, len(free))

    @_answered
    def members(self, name: str) -> list[bytes]:
        """See `Register.members`."""
        with self._clients.get().pipeline(transaction=False) as pipe:
            for number in range(_PLACES):
                pipe.getrange(f"{name}:member:{number}", 0, MAX_SEALED)
            return [_bytes(found)[MEMBER:] for found in pipe.execute() if found]

    @_answered
    def holder(self, name: str) -> tuple[str, float] | None:
        """See `Register.holder`."""
        key = f"{name}:lease"
        with self._clients.get().pipeline(transaction=False) as pipe:
            pipe.getrange(key, 0, MEMBER - 1)
            pipe.pttl(key)
            owner, left = pipe.execute()
        if not owner:
            return None
        seconds = math.inf if left == -1 else max(left, 0) / 1000
        return _bytes(owner).decode("ascii", "replace"), seconds

    def abort(self) -> None:
        """End the calls under way by closing the client's connections."""
        client = self._clients.made_here()
        for pool in () if client is None else pools_of(client):
            pool.disconnect()

    def close(self) -> None:
        """Close the connections of a client that `from_url` made; a caller's stays open."""
        if self._own:
            self.abort()

    def where(self) -> str:
        """The addresses of the servers, as they stand in a sentence; "" where none is known."""
        client = self._clients.made_here()
        found = [] if client is None else [address(pool) for pool in pools_of(client)]
        places = found or [self._named] * bool(self._named)
        return f" {', '.join(places)}" if places else ""


class _Lease:
    def __init__(self, store: RedisTokenStore, key: str, owner: str) -> None:
        self._store = store
        self._key = key
        self._owner = owner

    def release(self) -> None:
        self._store.release(self._key, self._owner)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _no_lease() -> StoreUnavailable:
    return StoreUnavailable(
        "The lease in the token store is no renewal's: it has no time to live, or too long a one.",
        hint="Delete the key that ends in :lease, and give all of the fleet the same Limits.total; "
        "tokens are fetched without it meanwhile.",
    )

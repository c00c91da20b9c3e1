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

import inspect
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any, Final, Self, final

from d1_signer.errors import ConfigurationError, MissingExtraError, StoreUnavailable
from d1_signer.frames import without_locals
from d1_signer.secret import Secret
from d1_signer.token.stores import MAX_SEALED, MEMBER, Lease
from d1_signer.transport.processes import PerProcess

try:
    from redis.backoff import NoBackoff
    from redis.cluster import RedisCluster
    from redis.connection import AbstractConnection
    from redis.exceptions import NoPermissionError, RedisError
    from redis.retry import Retry
except ModuleNotFoundError:
    raise MissingExtraError.of("redis", "redis") from None

from redis import Redis

_log = logging.getLogger("d1_signer.fleet")

Client = Redis | RedisCluster

# A Redis that hung executes later what nobody waits for any more: a lease is taken for a moment
# first, so that one which its asker never heard of does not hold up the fleet.
_CLAIM = 2000  # milliseconds
_OWNER = 32  # characters
# Of processes whose announcements are kept: a larger fleet shows a part of itself.
_PLACES = 256


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
        self._place: PerProcess[list[int]] = PerProcess(list)
        if callable(client) and not isinstance(client, type):
            make = client
            self._clients: PerProcess[Any] = PerProcess(lambda: _checked(make()))
        else:
            _checked(client)
            self._clients = PerProcess(lambda: client)

    @classmethod
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
        """
        settings: dict[str, Any] = {**cls.CLIENT_SETTINGS, "username": username}
        if url.startswith("rediss://"):
            settings |= {"ssl_check_hostname": True, "ssl_ca_certs": ca_file}
        kind: type[Any] = RedisCluster if cluster else Redis

        def client() -> Client:
            secret = None if password is None else password.reveal()
            made: Client = kind.from_url(url, **settings, password=secret)
            return made

        return cls(client)

    def load(self, name: str) -> tuple[bytes, float] | None:
        """See `TokenStore.load`."""
        key = f"{name}:token"
        with self._asked() as client:
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

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        """See `TokenStore.save`."""
        with self._asked() as client:
            client.set(f"{name}:token", sealed, px=max(1, int(life * 1000)))

    def lease(self, name: str, *, life: float) -> Lease | None:
        """See `TokenStore.lease`."""
        key, milliseconds = f"{name}:lease", int(life * 1000)
        owner = self.member + secrets.token_hex((_OWNER - MEMBER) // 2)
        asked = time.monotonic()
        with self._asked() as client:
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

    def release(self, key: str, owner: str) -> None:
        """Give a lease back, unless it is another's by now."""
        with self._asked() as client:
            if _bytes(client.getrange(key, 0, _OWNER)) == owner.encode():
                client.delete(key)

    @property
    def member(self) -> str:
        """See `Register.member`."""
        return self._member.get()

    def announce(self, name: str, sealed: bytes, *, life: float) -> None:
        """See `Register.announce`."""
        content, place = self.member.encode() + sealed, self._place.get()
        milliseconds = max(1, int(life * 1000))
        with self._asked() as client:
            if place:
                key = f"{name}:member:{place[0]}"
                if _bytes(client.getrange(key, 0, MEMBER - 1)) == self.member.encode():
                    client.set(key, content, px=milliseconds)
                    return
            for number in random.sample(range(_PLACES), 4):
                if client.set(f"{name}:member:{number}", content, nx=True, px=milliseconds):
                    place[:] = [number]
                    return

    def members(self, name: str) -> list[bytes]:
        """See `Register.members`."""
        with self._asked() as client, client.pipeline(transaction=False) as pipe:
            for number in range(_PLACES):
                pipe.getrange(f"{name}:member:{number}", 0, MAX_SEALED)
            return [_bytes(found)[MEMBER:] for found in pipe.execute() if found]

    def holder(self, name: str) -> tuple[str, float] | None:
        """See `Register.holder`."""
        key = f"{name}:lease"
        with self._asked() as client, client.pipeline(transaction=False) as pipe:
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
        for pool in () if client is None else _pools(client):
            pool.disconnect()

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        try:
            # The package types its clients for sync and async use at once.
            yield self._clients.get()
        except NoPermissionError:
            raise StoreUnavailable(
                "The token store refuses a command to its user.",
                hint="Redis' user needs GETRANGE, SET, PTTL and DEL on the keys d1-signer:*; "
                "tokens are fetched without it meanwhile.",
            ) from None
        except ConfigurationError as error:  # of a client that a function made
            raise StoreUnavailable(error.message, hint=error.hint) from None
        # The last is of a connection that `abort` has closed meanwhile.
        except (RedisError, OSError, ValueError) as error:
            # Its text may hold the URL, and with it a password.
            raise StoreUnavailable(
                f"The token store{self._where()} does not answer ({type(error).__name__}).",
                hint="Look at Redis; tokens are fetched without it meanwhile.",
            ) from None

    def _where(self) -> str:
        client = self._clients.made_here()
        places = () if client is None else [_address(pool) for pool in _pools(client)]
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


# -- which clients serve ------------------------------------------------------------------------


def _checked(client: object) -> Client:
    """Refuse what is no client, or may wait for ever.

    Raises:
        ConfigurationError: It does not serve.
    """
    if not isinstance(client, Redis | RedisCluster):
        raise ConfigurationError(
            f"A RedisTokenStore needs a client of the redis package that is not asynchronous; "
            f"it was given {_kind(client)}.",
            hint="Give Redis.from_url(…), RedisCluster.from_url(…) or Sentinel(…).master_for(…), "
            "each with **RedisTokenStore.CLIENT_SETTINGS.",
        )
    for part, settings in _settings(client):
        seconds = [
            _timeout(settings, name) for name in ("socket_timeout", "socket_connect_timeout")
        ]
        if None in seconds:
            raise ConfigurationError(
                f"The {part} of the token store has no time limit: a Redis that hangs would keep "
                "it for ever.",
                hint=f"Give the {part} **RedisTokenStore.CLIENT_SETTINGS.",
            )
        if max(each or 0.0 for each in seconds) > 1 or _repeats(settings.get("retry")):
            _log.warning(
                "fleet.slow_client the %s of the token store waits or tries for longer than a "
                "renewal does: give it **RedisTokenStore.CLIENT_SETTINGS",
                part,
            )
    return client


def _kind(client: object) -> str:
    kind = client if isinstance(client, type) else type(client)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"the class {name}" if kind is client else name


def _settings(client: Client) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings of each part that makes connections."""
    if isinstance(client, RedisCluster):
        retry = getattr(client, "retry", None)
        yield "client", {**client.nodes_manager.connection_kwargs, "retry": retry}
        return
    for number, pool in enumerate(_pools(client)):
        yield "sentinel_kwargs" if number else "client", pool.connection_kwargs


def _pools(client: Client) -> list[Any]:
    """The connection pools of a client; those of its sentinels behind its own."""
    if isinstance(client, RedisCluster):
        nodes: list[Any] = client.get_nodes()  # type: ignore[no-untyped-call]
        found = [node.redis_connection for node in nodes]
    else:
        manager = getattr(client.connection_pool, "sentinel_manager", None)
        found = [client, *(manager.sentinels if manager else ())]
    return [each.connection_pool for each in found if each is not None]


def _address(pool: Any) -> str:
    settings = pool.connection_kwargs
    return str(settings.get("path") or f"{settings.get('host')}:{settings.get('port')}")


_DEFAULTS = inspect.signature(AbstractConnection.__init__).parameters


def _timeout(settings: Mapping[str, Any], name: str) -> float | None:
    seconds: float | None = settings.get(name, _DEFAULTS[name].default)
    # The package does the same.
    return settings.get("socket_timeout") if seconds is None else seconds


def _repeats(retry: object) -> bool:
    return getattr(retry, "_retries", 0) != 0

# SPDX-License-Identifier: Apache-2.0
"""Which clients of the redis package serve a `RedisTokenStore`, and how it makes its own."""

from __future__ import annotations

import inspect
import logging
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from redis import Redis
from redis.cluster import RedisCluster, cleanup_kwargs
from redis.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    parse_url,
)
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
)

from d1_signer.errors import ConfigurationError
from d1_signer.frames import causes, of_signal_handler, without_locals
from d1_signer.secret import Secret

_log = logging.getLogger("d1_signer.fleet")

Client = Redis | RedisCluster

_VERIFIED: Final = {"ssl_check_hostname": True, "ssl_cert_reqs": "required"}


class _VerifyingPool(ConnectionPool):
    """Of the nodes of a cluster: redis before 6 does not pass on to them that names are checked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, **_VERIFIED})


def maker(
    url: str,
    settings: Mapping[str, Any],
    password: Secret | None,
    *,
    ca_file: str | None,
    cluster: bool,
) -> tuple[Callable[[], Client], str]:
    """What makes a client for a URL, and the address of its server, as it may be shown.

    Raises:
        ConfigurationError: The URL cannot serve.
    """
    try:
        named: dict[str, Any] = {**parse_url(url)}  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError):
        named = {}
    if not named.get("host") and not named.get("path"):
        raise ConfigurationError(
            "The token store's URL is none of a Redis.",
            hint="Write rediss://HOST:PORT/DB, redis:// or unix://PATH.",
        )
    if cluster and (named.get("db") or "path" in named):
        raise ConfigurationError(
            "The token store is a cluster, and its URL names a database or a socket.",
            hint="Write rediss://HOST:PORT, or leave cluster out: a cluster has no databases.",
        )
    options, verifies = dict(settings), named.get("connection_class") is SSLConnection
    if verifies:
        options |= {**_VERIFIED, "ssl_ca_certs": ca_file}
        _require_verified({**options, **named})  # what the URL says wins
    _require_known({**options, **named}, dropped=_dropped(named) if cluster else set())
    if verifies and cluster:
        options["connection_pool_class"] = _VerifyingPool
    kind: type[Any] = RedisCluster if cluster else Redis

    @without_locals
    def client() -> Client:
        secret = None if password is None else password.reveal()
        made: Client = kind.from_url(url, **options, password=secret)
        return made

    return client, str(named.get("path") or f"{named['host']}:{named.get('port', 6379)}")


def _dropped(named: dict[str, Any]) -> set[str]:
    """What a cluster's client would leave out of its URL without a word."""
    kept: dict[str, Any] = cleanup_kwargs(**named)  # type: ignore[no-untyped-call]
    return named.keys() - kept.keys() - {"host", "port", *_VERIFIED}


def _require_known(settings: dict[str, Any], *, dropped: set[str]) -> None:
    """Refuse what the URL's query sets and no connection takes: each call would fail of it."""
    kind: Any = settings.pop("connection_class", Connection)
    settings.pop("max_connections", None)  # the pool's own
    try:
        kind(**settings)  # opens nothing
    except Exception as error:
        if of_signal_handler(error):
            raise
        # Of a value that it did not expect the package raises anything, AttributeError even.
        fits = False
    else:
        fits = not dropped
    if not fits:
        raise ConfigurationError(
            "The token store's URL has a setting that its client does not take.",
            hint="Look at the names behind its question mark, such as db=1, and at their values.",
        )


def why(error: Exception) -> str:
    """What has failed, in a word or two; what was the matter with a certificate, if that was it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    name = type(error).__name__
    return name if cause is None else f"{name}: {cause.verify_message.rstrip('.')}"


# What the package has classes of its own for has lost its code by the time that we see it.
_CODES: Final = (
    ((AuthenticationError, AuthenticationWrongNumberOfArgsError), "WRONGPASS"),
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (BusyLoadingError, "LOADING"),
    (MasterDownError, "MASTERDOWN"),  # before the next, of which it is a subclass
    (ClusterDownError, "CLUSTERDOWN"),
    (NoPermissionError, "NOPERM"),
)
_REFUSALS: Final = {
    "WRONGPASS": (
        "refuses the login",
        "Compare user and password with those that Redis knows; a process reads them at its start",
    ),
    "NOPERM": (
        "refuses a command to its user",
        "Its user needs GETRANGE, SET, PTTL and DEL on d1-signer:*, in a cluster CLUSTER SLOTS too",
    ),
    "OOM": ("has no memory left for writes (OOM)", "Look at its memory and at maxmemory"),
    "READONLY": ("is a replica, which takes no writes (READONLY)", "Name its primary"),
    "NOREPLICAS": (
        "takes no writes, having too few replicas (NOREPLICAS)",
        "Look at its replicas and at min-replicas-to-write",
    ),
    "MISCONF": (
        "takes no writes, since it cannot save what it holds (MISCONF)",
        "Look at the disk of Redis and at its log",
    ),
    "BUSY": ("is busy with somebody's script (BUSY)", "Look at who runs scripts on it"),
    "LOADING": ("is still loading what it holds (LOADING)", "Wait until it has loaded that"),
    "CLUSTERDOWN": ("is a cluster that is down (CLUSTERDOWN)", "Look at the nodes of Redis"),
    "MASTERDOWN": ("is a replica without its primary (MASTERDOWN)", "Look at the primary"),
    "max number of clients reached": (
        "has as many clients as it takes (maxclients)",
        "Look at who has connections to it",
    ),
}
# Behind a command of a pipeline, which the package repeats.
_REFUSED = re.compile(rf"(?:\A|caused error: )(?:ERR )?({'|'.join(_REFUSALS)})\b")


def refusal(error: Exception) -> tuple[str, str] | None:
    """What a server that answers refuses, and where to look; None where it may be something else.

    Of its text a word that is known is told alone: there are servers that repeat a password.
    """
    for link in causes(error):  # a cluster's client wraps what the nodes say
        code = next((code for kinds, code in _CODES if isinstance(link, kinds)), None)
        if code is None and (found := _REFUSED.search(str(link))):
            code = found[1]
        if code is not None:
            return _REFUSALS[code]
    return None


def checked(client: object) -> Client:
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
    for pool in pools_of(client):
        if issubclass(pool.connection_class, SSLConnection):
            _require_verified(pool.connection_kwargs)
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


_DEFAULTS_OF_TLS = inspect.signature(SSLConnection.__init__).parameters


def _require_verified(settings: Mapping[str, Any]) -> None:
    name, verify = (
        settings.get(setting, _DEFAULTS_OF_TLS[setting].default) for setting in _VERIFIED
    )
    if name and verify in ("required", ssl.CERT_REQUIRED):
        return
    raise ConfigurationError(
        "The client of the token store does not verify whom it gives its password to: it takes "
        "certificates of other hosts, or any.",
        hint="Give it ssl_check_hostname=True and ssl_cert_reqs='required'; a cluster with redis "
        "before 6 needs RedisTokenStore.from_url(URL, cluster=True), which sees to it.",
    )


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
    for number, pool in enumerate(pools_of(client)):
        yield "sentinel_kwargs" if number else "client", pool.connection_kwargs


def pools_of(client: Client) -> list[Any]:
    """The connection pools of a client; those of its sentinels behind its own."""
    if isinstance(client, RedisCluster):
        nodes: list[Any] = client.get_nodes()  # type: ignore[no-untyped-call]
        found = [node.redis_connection for node in nodes]
    else:
        manager = getattr(client.connection_pool, "sentinel_manager", None)
        found = [client, *(manager.sentinels if manager else ())]
    return [each.connection_pool for each in found if each is not None]


def address(pool: Any) -> str:
    """Where the connections of a pool go."""
    settings = pool.connection_kwargs
    return str(settings.get("path") or f"{settings.get('host')}:{settings.get('port')}")


_DEFAULTS = inspect.signature(AbstractConnection.__init__).parameters


def _timeout(settings: Mapping[str, Any], name: str) -> float | None:
    seconds: float | None = settings.get(name, _DEFAULTS[name].default)
    # The package does the same.
    return settings.get("socket_timeout") if seconds is None else seconds


def _repeats(retry: object) -> bool:
    return getattr(retry, "_retries", 0) != 0

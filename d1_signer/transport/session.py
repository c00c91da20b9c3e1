# SPDX-License-Identifier: Apache-2.0
"""The adapter that carries mutual TLS into requests, and sessions with it.

Verification of the server cannot be switched off by what a caller does to a session.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import requests
from requests.adapters import BaseAdapter, HTTPAdapter

from d1_signer import frames
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.signing import forks
from d1_signer.transport.client import ClientTls
from d1_signer.transport.connections import SOCKET_OPTIONS, Connections
from d1_signer.transport.hosts import is_loopback
from d1_signer.transport.patching import require_patched_first
from d1_signer.transport.proxies import Proxy

# Seconds. The first servers close an idle connection after five, and a POST that meets the close is
# lost; firewalls forget it after a minute and more, and then a call waits for its time-out.
_IDLE = 4.0

# Seconds between an answer and the next request on its connection. What a server sends right behind
# an answer comes within that, and would be taken for the answer to that request.
_REST = 0.001


class TlsAdapter(HTTPAdapter):
    """An adapter for requests that uses exactly the context it was given.

    The usual recipe (``init_poolmanager(ssl_context=…)``) lets requests add certifi's authorities
    to the context at the first call; here nothing is added.

    Attributes:
        timeouts: Asked at each call that says nothing else: seconds to wait for a connection, and
            for the next bytes.
    """

    def __init__(
        self,
        tls: ClientTls,
        *,
        timeouts: Callable[[], tuple[float, float]],
        pool_size: int = 10,
        idle: float = _IDLE,
        proxy: Proxy | None = None,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            tls: Gives the context of every https connection.
            timeouts: See the attribute.
            pool_size: Connections to keep.
            idle: Seconds without a call after which a connection is not used again.
            proxy: On the way of https, or None.
        """
        self._tls: Final = tls
        self._context = tls.context()
        self._generation = tls.generation
        self.timeouts = timeouts
        self.proxy: Final = proxy
        self._idle: Final = idle
        self._connections = Connections(proxy=proxy, idle=idle, rest=_REST)
        super().__init__(pool_maxsize=pool_size, max_retries=0)
        _adapters.add(self)

    def send(
        self, request: requests.PreparedRequest, *args: Any, **kwargs: Any
    ) -> requests.Response:
        """Send one request; see `HTTPAdapter`."""
        require_patched_first()
        forks.notice()
        self._tls.look()
        self._notice_new_files()
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self.timeouts()
        return super().send(request, *args, **kwargs)

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        """Select the pool by our context alone; see `HTTPAdapter`."""
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https":
            return host, {"ssl_context": self._context}
        if not is_loopback(str(host["host"])):
            raise ConfigurationError(
                "A call without TLS to another machine is refused.", hint="Use an https URL."
            )
        return host, pool

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:  # noqa: ARG002
        """Refuse what would weaken or replace the context; see `HTTPAdapter`.

        Raises:
            ConfigurationError: ``verify`` is not True, or ``cert`` is set.
        """
        if verify is not True or cert is not None:
            raise ConfigurationError(
                "TLS verification cannot be switched off or replaced on this session.",
                hint="Give ca_file or an ssl.SSLContext to TokenFetcher instead.",
            )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pools; see `HTTPAdapter`."""
        super().init_poolmanager(*args, socket_options=SOCKET_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._connections.pools()

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Create the pools behind a proxy; see `HTTPAdapter`."""
        manager = super().proxy_manager_for(proxy, socket_options=SOCKET_OPTIONS, **kwargs)
        manager.pool_classes_by_scheme = self._connections.pools()
        return manager

    def bounded(self, deadline: float) -> AbstractContextManager[None]:
        """Bound the calls of this thread; see `Connections.bounded`."""
        forks.notice()
        return self._connections.bounded(deadline)

    def abort(self) -> None:
        """End every call under way, so that a thread that waits in one comes back."""
        forks.notice()
        self._connections.cut()

    def _notice_new_files(self) -> None:
        generation = self._tls.generation
        if generation != self._generation:
            self._context, self._generation = self._tls.context(), generation
            # Idle connections are those of the old certificate.
            self.poolmanager.clear()
            for manager in self.proxy_manager.values():
                manager.clear()

    def after_fork(self) -> None:
        """In a forked child: begin without a connection.

        Both sides writing into one inherited TLS stream would break it for both, and so would one
        side cutting it.
        """
        # Dropping the pools closes their connections, and the lock may be a thread's of the parent.
        self._connections.lock = threading.RLock()
        self._connections = Connections(proxy=self.proxy, idle=self._idle, rest=_REST)
        self.proxy_manager.clear()
        self.init_poolmanager(self._pool_connections, self._pool_maxsize)  # type: ignore[attr-defined]


_adapters: weakref.WeakSet[TlsAdapter] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for adapter in list(_adapters):
        adapter.after_fork()


forks.in_child(_after_fork_in_child)


class _Session(requests.Session):
    """Follows no redirect: a token, an assertion or a card stays with the host it was meant for."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """There is none; the answer is returned as it is."""
        del resp


class _CallersSession(_Session):
    """One for callers: its errors hold nothing of what was sent, and it verifies whatever they do.

    Attributes:
        complete: Whether it has its adapters; those that requests mounts first are replaced.
    """

    complete = False

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send one request; see `requests.Session`."""
        outer = sys.exception()
        failure: requests.RequestException | D1SignerError
        try:
            return super().send(request, **kwargs)
        except requests.RequestException as error:
            # The frames below, and urllib3's errors in the chain, hold what was being sent.
            failure = type(error)(str(error), request=request, response=error.response)
        except D1SignerError as error:
            failure = error.fresh()
        except BaseException as error:  # such as a signal's handler raises
            frames.clear(error, outer=outer)
            raise
        failure.__context__ = None
        raise failure

    def get_adapter(self, url: str) -> BaseAdapter:
        """The adapter for a call; see `requests.Session`.

        Raises:
            ConfigurationError: It is none of ours, however it came there.
        """
        adapter = super().get_adapter(url)
        if not isinstance(adapter, TlsAdapter):
            raise ConfigurationError(
                "The adapter of this session is not the one that verifies.",
                hint="Make a session of your own, with D1Auth(fetcher) as its auth.",
            )
        return adapter

    def mount(self, prefix: str | bytes, adapter: BaseAdapter) -> None:
        """Take an adapter of ours; see `requests.Session`.

        Raises:
            ConfigurationError: Another one, which would verify or not as it likes.
        """
        if self.complete and not isinstance(adapter, TlsAdapter):
            raise ConfigurationError(
                "Another adapter cannot be mounted on this session: it would verify on its own.",
                hint="Make a session of your own, with D1Auth(fetcher) as its auth.",
            )
        super().mount(prefix, adapter)


def new_session(adapter: TlsAdapter, *, for_callers: bool = False) -> requests.Session:
    """A requests session that takes nothing from the process environment and follows no redirect.

    Args:
        adapter: Used for https and, where the environment is a loopback address, for http.
        for_callers: Whether it is given out; else its errors keep what they came from, and it keeps
            no cookie.
    """
    session = _CallersSession() if for_callers else _Session()
    # No proxy variables, no netrc, no REQUESTS_CA_BUNDLE: what is used is what was configured.
    session.trust_env = False
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    if isinstance(session, _CallersSession):
        session.complete = True
    else:
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    if adapter.proxy is not None:
        session.proxies = {"https": adapter.proxy.url}
    return session

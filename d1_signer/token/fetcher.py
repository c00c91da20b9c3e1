# SPDX-License-Identifier: Apache-2.0
"""`TokenFetcher`: the access token for everyone in the process, renewed before anyone waits for it.

Use::

    fetcher = TokenFetcher(
        signer,
        issuer_id="my-issuer",
        environment=Environment.STAGING,
        client_certificate=ClientCertificate("/etc/d1/client.pem", "/etc/d1/client.key"),
    )
    with fetcher.session() as session:
        session.get(fetcher.environment.banking_url + "/ping")

One fetcher for each issuer and environment, shared by all threads, made once.
"""

from __future__ import annotations

import functools
import os
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, NoReturn, Self, Unpack, final

import requests

from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.events import Observer, checked
from d1_signer.frames import without_locals
from d1_signer.secret import Secret, SecretSource
from d1_signer.signing import forks
from d1_signer.signing.signer import Signer
from d1_signer.signing.signer_set import SignerSet
from d1_signer.token.auth import D1Auth
from d1_signer.token.certificates import require_another_key, require_certificate
from d1_signer.token.clock import token_clock
from d1_signer.token.d1 import DEFAULT_ASSERTION_LIFETIME, AssertionProfile, Audience, Environment
from d1_signer.token.endpoint import RequestFormat, TokenEndpoint
from d1_signer.token.fleet import FleetRenewal
from d1_signer.token.following import LOOK_INTERVAL, Following, opened
from d1_signer.token.keeper import TokenKeeper
from d1_signer.token.opening import InCode, Keys, arguments_of, audience_in, certificate
from d1_signer.token.renewal import Limits, Renewal, seconds
from d1_signer.token.settings import Settings
from d1_signer.token.signals import let_go, reload_on
from d1_signer.token.status import CertificateStatus, FetcherStatus
from d1_signer.token.stores import TokenStore
from d1_signer.transport.client import ClientTls
from d1_signer.transport.credentials import ClientCertificate
from d1_signer.transport.proxies import optional_proxy
from d1_signer.transport.session import TlsAdapter, new_session

_LEAST_INTERVAL = 0.01


@final
class TokenFetcher(TokenKeeper):
    """Gives access tokens; caches, renews, shares. Safe in threads and after fork; not picklable.

    A fresh token is returned without a lock. A stale one is returned too, while one renewal runs in
    the background. Only when no valid token is left do callers wait, all for the same renewal. Its
    failure is theirs as well, but for an outage that may end within their patience; and nobody asks
    D1 again before a minimum interval is over.
    """

    @without_locals
    def __init__(
        self,
        signer: Signer | SignerSet,
        *,
        issuer_id: str,
        environment: Environment | str,
        client_certificate: ClientCertificate | ssl.SSLContext | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        proxy: str | None = None,
        proxy_credentials_source: SecretSource | None = None,
        proxy_adds_certificate: bool = False,
        audience: str | Audience | None = Audience.TOKEN_ENDPOINT,
        assertion_lifetime: int = DEFAULT_ASSERTION_LIFETIME,
        issued_at: bool = True,
        jwt_id: bool = True,
        request_format: Literal["form", "json"] = "form",
        correlation_id: Callable[[], str] | None = None,
        limits: Limits | None = None,
        retry_interval: float = 1.0,
        store: TokenStore | None = None,
        store_key: bytes | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Configure; nothing is signed or sent yet.

        Args:
            signer: Signs the assertions. It stays the caller's to close.
            issuer_id: The issuerId (or aggregatorId) that D1 assigned.
            environment: Which D1: an `Environment`, its name, or a URL.
            client_certificate: For mutual TLS, or a ready ``ssl.SSLContext`` that verifies; its
                sockets are then looked at after the handshake, whoever makes them.
            ca_file: Authorities for the server's certificate instead of the public ones.
            proxy: URL of an HTTP proxy; proxy variables of the environment are not read.
            proxy_credentials_source: Source of its ``USER:PASSWORD``, for Basic authentication.
            proxy_adds_certificate: State that an outgoing proxy adds the client certificate, so
                that none is demanded here.
            audience: ``aud`` of the assertions; None leaves it out.
            assertion_lifetime: Seconds from now to ``exp``, 1 to 900; without it 300.
            issued_at: Whether assertions carry ``iat``.
            jwt_id: Whether assertions carry ``jti``.
            request_format: Whether they are sent as a form or in JSON, for a gateway that takes
                only that.
            correlation_id: Gives the ``x-correlation-id`` of each request; D1 logs it in clear.
                None: a random one.
            limits: Time limits of a renewal.
            retry_interval: Seconds between two renewals at least; after failures doubling to 15,
                or what D1's ``Retry-After`` says, up to 60; and up to a quarter more.
            store: Shares tokens and one renewal among processes; None: each has its own.
            store_key: 32 bytes, the same in all of the fleet: tokens in the store are encrypted.
            observers: Told of each request and renewal, see `RequestEvent` and `RenewalEvent`.

        Raises:
            ConfigurationError: A setting is missing, contradictory or malformed; for Thales' own
                environments that includes a missing client certificate.
            InvalidInputError: A value is out of range.
        """
        # Masked before anything can fail: the frame of an error shows its local variables.
        sealing_key = Secret(store_key.hex()) if isinstance(store_key, bytes) else None
        store_key_given, store_key = store_key is not None, None
        proxy_url = Secret(proxy) if isinstance(proxy, str) and "@" in proxy else proxy
        proxy = None
        self._environment = Environment.of(environment)
        self._following: Following | None = None
        self._opened_store: Any = None  # a RedisTokenStore, which is an extra
        if not proxy_adds_certificate:
            require_certificate(self._environment, client_certificate)
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigurationError("limits is not a Limits.", hint="Write Limits(total=20.0).")
        if store is None and store_key_given:
            raise ConfigurationError(
                "A store_key was given without a store.", hint="Give both, or neither."
            )
        observers = checked(observers)
        signers = signer if isinstance(signer, SignerSet) else SignerSet([signer])
        self._signers = signers
        self._tls = ClientTls(
            client_certificate,
            ca_file,
            observers,
            accept=functools.partial(require_another_key, signers),
        )
        self._proxy = optional_proxy(proxy_url, proxy_credentials_source)
        limits, clock, wall = limits or Limits(), token_clock, time.time
        endpoint = TokenEndpoint(
            self._environment,
            self._tls,
            proxy=self._proxy,
            connect_timeout=limits.connect,
            read_timeout=limits.read,
            request_format=RequestFormat.of(request_format),
        )
        self._profile = AssertionProfile(
            issuer_id=issuer_id,
            audience=Audience.of(audience, self._environment),
            lifetime=assertion_lifetime,
            issued_at=issued_at,
            jwt_id=jwt_id,
        )
        alone = Renewal(
            signers,
            self._profile,
            endpoint,
            limits=limits,
            clock=clock,
            wall=wall,
            correlation_id=correlation_id,
            observers=observers,
        )
        shared = None
        if store is not None:
            shared = FleetRenewal(
                alone,
                store,
                key=sealing_key,
                issuer_id=issuer_id,
                environment=self._environment,
                limits=limits,
                clock=clock,
                wall=wall,
                about=self._about,
            )
        super().__init__(
            shared or alone,
            endpoint,
            limits=limits,
            retry_interval=seconds(retry_interval, "retry_interval", least=_LEAST_INTERVAL),
            clock=clock,
            wall=wall,
            observers=observers,
        )

    @classmethod
    @without_locals
    def from_settings(
        cls,
        file: str | os.PathLike[str],
        *,
        observers: Sequence[Observer] = (),
        store: TokenStore | None = None,
        **options: Unpack[InCode],
    ) -> Self:
        """A fetcher by a file of settings, which it follows, and closes what it opened.

        The file is looked at every few seconds when a token is asked for, or the `status`. Keys and
        their order, the client certificate, authorities, limits, ``aud`` and the request format
        change in place, all of it or nothing; for anything else a new fetcher is needed. A file
        that cannot be used keeps what was good last. Its names stand in ``docs/settings.md``.

        Args:
            file: Path of the file, in TOML.
            observers: Told of each signature, failover, request and renewal.
            store: Shares tokens, where the file names the ``key_source`` of a store and no URL.
            **options: As for `TokenFetcher`: ``assertion_lifetime``, ``issued_at``, ``jwt_id``,
                ``correlation_id``, ``retry_interval``.

        Raises:
            ConfigurationError: The file cannot be used, or something that it names.
            SignerError: No key can be opened. One of several that is away is left out, and tried
                again.
        """
        with opened(file, observers) as (following, keys):
            arguments = arguments_of(following.settings, keys, store)
            signers = SignerSet(keys.signers, observers=observers)
            fetcher = cls(signers, **arguments, **options, observers=observers)
            fetcher._opened_store = arguments.get("store") if store is None else None
            fetcher._following, fetcher._looks_every = following, LOOK_INTERVAL
            following.begin(keys, fetcher._take, fetcher._announce)
        return fetcher

    def _look(self) -> None:
        if self._following is not None:
            self._following.look()

    def _about(self) -> dict[str, object]:
        """What the fleet is told of this process."""
        certificate = CertificateStatus.of(self._tls.certificate)
        return {
            "settings": self._following and self._following.settings.digest,
            "kids": list(self._signers.kids),
            "away": list(self._following.status().keys_away) if self._following else [],
            "certificate": certificate and certificate.fingerprint,
        }

    def _announce(self) -> None:
        if isinstance(self._renewal, FleetRenewal):
            self._renewal.announcer.tell()

    def _take(self, settings: Settings, keys: Keys) -> None:
        """Have settings serve from now on, all of them; or raise, and change nothing."""
        audience = Audience.of(audience_in(settings), self._environment)
        profile = replace(self._profile, audience=audience)
        request_format = RequestFormat.of(settings.request_format)
        shown = certificate(settings, keys.client)
        if not settings.proxy_adds_certificate:
            require_certificate(self._environment, shown)
        before = self._signers.replace(keys.signers)
        try:
            self._tls.change(shown, settings.ca_file)
        except BaseException:
            self._signers.replace(before)
            raise
        # Nothing fails from here on.
        self._limits = limits = settings.limits
        self._renewal.change(limits=limits, profile=profile)
        self._endpoint.change(timeouts=self._timeouts(), request_format=request_format)

    def _timeouts(self) -> tuple[float, float]:
        return self._limits.connect, self._limits.read

    @property
    def environment(self) -> Environment:
        """The D1 environment that the tokens are for."""
        return self._environment

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """The mutual TLS of this fetcher, for another HTTP client: ``verify=`` of httpx.

        A context of its own for each access; a ready one that was given is given back. Its sockets
        look at the server's certificate and name after the handshake, before the first byte.

        Raises:
            ConfigurationError: Someone has switched off the verification of one that was given.
        """
        return self._tls.context()

    def reload(self) -> None:
        """Take what the file of settings, of the client certificate, its key and authorities hold.

        They are looked at by themselves when a connection is made, and every few seconds when a
        call begins; so this is for a program that wants the error, or does not want to wait. What a
        proxy has refused is asked of it again.

        Raises:
            D1SignerError: One cannot be used, the first of them; its last good one is used on.
        """
        if self._proxy is not None:
            self._proxy.forget_refusals()
        try:
            if self._following is not None:
                self._following.reload()
        except D1SignerError:
            with suppress(D1SignerError):  # a broken file of settings keeps no other from its turn
                self._tls.reload()
            raise
        self._tls.reload()

    def reload_on(self, number: int) -> None:
        """Reload at a signal, such as ``SIGHUP``, from now on; in the main thread of each worker.

        What cannot be used is told by the log and by `status`.

        Raises:
            InvalidInputError: This is not the main thread, or no signal that can be handled.
        """
        reload_on(number, self)

    def close(self) -> None:
        """Forget the token, end a renewal under way, close connections and what settings opened.

        Those who wait for the renewal get a `FetcherClosedError`. A signer that was given stays.
        """
        let_go(self)
        super().close()
        if self._opened_store is not None:
            self._opened_store.close()
        if self._following is not None:
            self._following.close()

    def status(self) -> FetcherStatus:
        """How this fetcher is now, from memory: nothing is asked of D1, a signer or the store."""
        forks.notice()
        self._look()
        members = self._signers.health()
        with self._lock:
            now, held, journal = self._clock(), self._held, self._journal
            renewing = self._flight is not None
            due = max(self._not_before, held.renew_at if held else now)
            return FetcherStatus(
                at=self._wall(),
                environment=self._environment.base_url,
                issuer_id=journal.whose["issuer"],
                token=self._state(held),
                expires_at=held.ends_at(now, self._wall()) if held else None,
                next_renewal_at=None
                if renewing or self._closed
                else self._wall() + max(0.0, due - now),
                renewing=renewing,
                failures=journal.failures,
                last_success=journal.success,
                last_failure=journal.failure,
                members=members,
                store=self._renewal.store_state,
                store_error=self._renewal.store_error,
                lease=self._renewal.lease_state,
                settings=None if self._following is None else self._following.status(),
                client_certificate=CertificateStatus.of(self._tls.certificate),
                closed=self._closed,
            )

    def session(self) -> requests.Session:
        """A new session for the banking API: the same mutual TLS, authenticated by `D1Auth`.

        The caller closes it. It takes nothing from the process environment (proxies, netrc, CA
        bundles), follows no redirect, and its TLS verification cannot be switched off. A call
        without a ``timeout`` of its own has the `Limits` of this fetcher.
        """
        adapter = TlsAdapter(self._tls, timeouts=self._timeouts, proxy=self._proxy)
        session = new_session(adapter, for_callers=True)
        session.auth = D1Auth(self)
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        # Also of one whose constructor failed, for it stands in that traceback.
        environment: Environment | None = getattr(self, "_environment", None)
        return f"<TokenFetcher {environment.base_url if environment else 'not configured'}>"

    def __reduce__(self) -> NoReturn:
        msg = "a TokenFetcher cannot be pickled: make one in each process"
        raise TypeError(msg)

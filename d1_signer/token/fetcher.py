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
from enum import Enum
from types import TracebackType
from typing import Literal, NoReturn, Self, final

import requests
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from d1_signer.errors import ConfigurationError
from d1_signer.events import Observer, checked
from d1_signer.frames import without_locals
from d1_signer.secret import Secret, SecretSource
from d1_signer.signing import forks
from d1_signer.signing.signer import Signer
from d1_signer.signing.signer_set import SignerSet
from d1_signer.token.auth import D1Auth
from d1_signer.token.clock import token_clock
from d1_signer.token.d1 import DEFAULT_ASSERTION_LIFETIME, AssertionProfile, Environment
from d1_signer.token.endpoint import RequestFormat, TokenEndpoint
from d1_signer.token.fleet import FleetRenewal
from d1_signer.token.keeper import TokenKeeper
from d1_signer.token.renewal import Limits, Renewal, seconds
from d1_signer.token.status import FetcherStatus
from d1_signer.token.stores import TokenStore
from d1_signer.transport.client import ClientTls
from d1_signer.transport.credentials import ClientCertificate
from d1_signer.transport.proxies import optional_proxy
from d1_signer.transport.session import TlsAdapter, new_session

_LEAST_INTERVAL = 0.01


class Audience(Enum):
    """What ``aud`` says when the caller says nothing."""

    TOKEN_ENDPOINT = "the token endpoint's URL"  # RFC 7523 section 3  # noqa: S105


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
            assertion_lifetime: Seconds from now to ``exp``, 1 to 900.
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
        if (
            self._environment.is_thales
            and client_certificate is None
            and not proxy_adds_certificate
        ):
            raise ConfigurationError(
                "D1 needs a client certificate (mutual TLS) and none is given.",
                hint="Give client_certificate, or proxy_adds_certificate=True where an outgoing "
                "proxy adds it.",
            )
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
            accept=functools.partial(_require_another_key, signers),
        )
        self._proxy = optional_proxy(proxy_url, proxy_credentials_source)
        limits = Limits() if limits is None else limits
        clock, wall = token_clock, time.time
        endpoint = TokenEndpoint(
            self._environment,
            self._tls,
            proxy=self._proxy,
            connect_timeout=limits.connect,
            read_timeout=limits.read,
            request_format=RequestFormat.of(request_format),
        )
        if audience is Audience.TOKEN_ENDPOINT:
            audience = self._environment.token_endpoint
        alone = Renewal(
            signers,
            AssertionProfile(
                issuer_id=issuer_id,
                audience=audience,
                lifetime=assertion_lifetime,
                issued_at=issued_at,
                jwt_id=jwt_id,
            ),
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
        """Take what the files of the client certificate, its key and the authorities hold now.

        They are looked at by themselves when a connection is made, and every few seconds when a
        call begins; so this is for a program that wants the error. What a proxy has refused is
        asked of it again.

        Raises:
            D1SignerError: They cannot be used; the last good ones are used on.
        """
        if self._proxy is not None:
            self._proxy.forget_refusals()
        self._tls.reload()

    def status(self) -> FetcherStatus:
        """How this fetcher is now, from memory: nothing is asked of D1, a signer or the store."""
        forks.notice()
        members = self._signers.health()
        with self._lock:
            now, held, journal = self._clock(), self._held, self._journal
            renewing = self._flight is not None
            due = max(self._not_before, held.renew_at if held else now)
            return FetcherStatus(
                environment=self._environment.base_url,
                issuer_id=journal.whose["issuer"],
                token=self._state(held),
                expires_at=held.token.expires_at if held else None,
                next_renewal_at=None
                if renewing or self._closed
                else self._wall() + max(0.0, due - now),
                renewing=renewing,
                failures=journal.failures,
                last_success=journal.success,
                last_failure=journal.failure,
                members=members,
                store=self._renewal.store_state,
                lease=self._renewal.lease_state,
                closed=self._closed,
            )

    def session(self) -> requests.Session:
        """A new session for the banking API: the same mutual TLS, authenticated by `D1Auth`.

        The caller closes it. It takes nothing from the process environment (proxies, netrc, CA
        bundles), follows no redirect, and its TLS verification cannot be switched off. A call
        without a ``timeout`` of its own has the `Limits` of this fetcher.
        """
        timeouts = (self._limits.connect, self._limits.read)
        adapter = TlsAdapter(self._tls, timeouts=timeouts, proxy=self._proxy)
        session = new_session(adapter, for_callers=True)
        session.auth = D1Auth(self)
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        # Also of one whose constructor failed, for it stands in that traceback.
        environment: Environment | None = getattr(self, "_environment", None)
        return f"<TokenFetcher {environment.base_url if environment else 'not configured'}>"

    def __reduce__(self) -> NoReturn:
        msg = "a TokenFetcher cannot be pickled: make one in each process"
        raise TypeError(msg)


def _require_another_key(signers: SignerSet, certificate: x509.Certificate) -> None:
    """Refuse a client certificate of a key that signs assertions: D1 wants two keys."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        key = certificate.public_key().public_bytes(*form)
    except (ValueError, UnsupportedAlgorithm):
        return  # no key of ES256
    if any(key == public_key.der() for public_key in signers.public_keys()):
        raise ConfigurationError(
            "The client certificate is for the key that signs assertions.",
            hint="Make another key for mutual TLS (generate-key, csr) and have Thales sign that.",
        )

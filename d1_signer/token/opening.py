# SPDX-License-Identifier: Apache-2.0
"""What settings open for one fetcher: signers, client certificate, store and audit trail."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from d1_signer.audit.trail import AuditTrail
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import ConfigurationError, D1SignerError, SecretSourceError, SignerError
from d1_signer.events import Observer
from d1_signer.logfmt import told
from d1_signer.secret import Secret, read_secret
from d1_signer.signing.key_uri import KeyUri, scheme_of, without_secrets
from d1_signer.signing.opening import open_signer
from d1_signer.signing.options import KeyOptions
from d1_signer.signing.signer import Signer
from d1_signer.token.d1 import Audience
from d1_signer.token.settings import Settings
from d1_signer.token.stores import KEY_LENGTH, TokenStore
from d1_signer.token.values import StoreSettings
from d1_signer.transport.credentials import ClientCertificate

if TYPE_CHECKING:
    import os

_log = logging.getLogger("d1_signer.settings")

_HEXADECIMAL = re.compile(rf"[0-9A-Fa-f]{{{2 * KEY_LENGTH}}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What names one key, so that it is opened anew only where something of that has changed."""

    uri: str
    kid: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    timeout: float | None = None
    policy: str | None = None

    @property
    def shown(self) -> str:
        """The key as it may be told."""
        return without_secrets(self.uri)


@dataclass(kw_only=True, slots=True)
class Keys:
    """Signers that settings name, open.

    Attributes:
        signers: Those of assertions, first the active one.
        client: That of the client certificate; None where its key is a file, or there is none.
        reasons: Why those that are away cannot be opened now.
    """

    signers: tuple[Signer, ...]
    client: Signer | None
    reasons: dict[_Place, D1SignerError]

    @property
    def away(self) -> tuple[str, ...]:
        """The keys that are away, as they may be shown."""
        return tuple(place.shown for place in self.reasons)


class Opening:
    """Opens what settings name, and keeps it open for as long as they name it."""

    def __init__(self, settings: Settings, observers: Sequence[Observer]) -> None:
        """Open the audit trail, if there is one; nothing else so far."""
        self._observers = tuple(observers)
        self._open: dict[_Place, Signer] = {}
        self._away: set[_Place] = set()
        self._left: list[tuple[float, _Place, Signer]] = []
        with ExitStack() as stack:
            self._trail: AuditTrail | None = None
            if settings.audit_trail is not None:
                sealer = settings.audit_key and stack.enter_context(_open_sealer(settings))
                self._trail = AuditTrail(
                    settings.audit_trail,
                    origin=settings.audit_origin or this_host(),
                    checkpoint_signer=sealer or None,
                )
                stack.callback(self._trail.close)
            self._stack = stack.pop_all()

    def keys(self, settings: Settings, *, first: bool = False) -> Keys:
        """The signers of settings: those that are open, and those that are opened now.

        Of several keys one at least is there. Others may be away at the first time, and later those
        that were: what is named anew must be there. Away is what another try may find, or whose
        secret cannot be read; a refusal is none of that, and a device that counts wrong PINs is not
        to be asked again and again.

        Args:
            settings: Name the keys.
            first: Whether this is the first time.

        Raises:
            D1SignerError: A key cannot be opened; those that were opened for this are closed.
        """
        places = _places(settings)
        client = _client_place(settings)
        KeyOptions(given=settings.option).require_known(settings.key)
        may_be_away = {*settings.key} if first else {place.uri for place in self._away}
        away: dict[_Place, D1SignerError] = {}
        with ExitStack() as opened:
            for place in places:
                try:
                    self._require(place, opened)
                # A PIN file that cannot be read is one device's trouble, like one that is down.
                except (SignerError, SecretSourceError) as error:
                    is_away = error.retryable or isinstance(error, SecretSourceError)
                    if not is_away or place.uri not in may_be_away:
                        raise error.fresh() from None
                    away[place] = error.fresh()
                    if len(away) == len(places):
                        raise next(iter(away.values())) from None
            if client is not None:
                self._require(client, opened)
            opened.pop_all()
        return Keys(
            signers=tuple(self._open[place] for place in places if place in self._open),
            client=None if client is None else self._open[client],
            reasons=away,
        )

    def taken(self, keys: Keys) -> None:
        """These keys serve now, and those of them that are away may stay so."""
        for place, why in keys.reasons.items():
            if place not in self._away:
                facts = {"key": place.shown, "code": why.code, "message": why}
                _log.warning("settings.key_away %s", told(facts))
        self._away = {*keys.reasons}

    def _require(self, place: _Place, opened: ExitStack) -> None:
        if place in self._open:
            return
        # One that is put back is still open for a while: a device has few sessions.
        back = next((left for left in self._left if left[1] == place), None)
        if back is not None:
            self._left.remove(back)
            self._open[place] = back[2]
            opened.callback(self._leave_again, back)
            return
        options = KeyOptions(given=dict(place.options), timeout=place.timeout)
        signer = open_signer(
            place.uri,
            kid=place.kid,
            custody_policy=_policy(place.policy),
            trail=self._trail,
            observers=self._observers,
            **options.for_opening(place.uri),
        )
        self._open[place] = signer
        opened.callback(self._drop, place)

    def _drop(self, place: _Place) -> None:
        self._open.pop(place).close()

    def _leave_again(self, back: tuple[float, _Place, Signer]) -> None:
        self._left.append(back)
        del self._open[back[1]]

    def leave(self, settings: Settings, *, until: float) -> None:
        """Close the keys that settings do not name any more, once nobody can be using them.

        Args:
            settings: Name those that stay.
            until: When renewals and handshakes that began before are over, on
                ``time.monotonic()``.
        """
        named = {*_places(settings), _client_place(settings)}
        for place in [place for place in self._open if place not in named]:
            self._left.append((until, place, self._open.pop(place)))

    def has_left(self) -> bool:
        """Whether there is something for `close_left` to do."""
        now = time.monotonic()
        return any(now >= until for until, *_ in self._left)

    def close_left(self) -> None:
        """Close those that were left long enough ago, in a thread: a device may hang in that."""
        now = time.monotonic()
        over = [signer for until, _, signer in self._left if now >= until]
        if not over:
            return
        closing = threading.Thread(
            target=_close_all, args=(over,), name="d1-signer-closing", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # the limit of threads; the next look tries again
            closing.start()
            self._left = [kept for kept in self._left if kept[2] not in over]

    def close(self) -> None:
        """Close all."""
        with self._stack, ExitStack() as stack:  # one that fails keeps none of the others open
            for signer in (*self._open.values(), *(signer for *_, signer in self._left)):
                stack.callback(signer.close)
        self._open, self._left = {}, []


class InCode(TypedDict, total=False):
    """What a fetcher takes beside its settings; see `d1_signer.TokenFetcher`."""

    assertion_lifetime: int
    issued_at: bool
    jwt_id: bool
    correlation_id: Callable[[], str] | None
    retry_interval: float


def arguments_of(settings: Settings, keys: Keys, given: TokenStore | None) -> dict[str, Any]:
    """What settings say, as arguments of a `d1_signer.TokenFetcher`.

    Args:
        settings: What the file says.
        keys: What it has opened.
        given: A store that was given in code.

    Raises:
        ConfigurationError: A store is given twice, or without a key, or a key without a store.
    """
    arguments = {
        "issuer_id": settings.issuer_id,
        "environment": settings.environment,
        "client_certificate": certificate(settings, keys.client),
        "ca_file": settings.ca_file,
        "proxy": settings.proxy,
        "proxy_credentials_source": settings.proxy_credentials_source,
        "proxy_adds_certificate": settings.proxy_adds_certificate,
        "audience": audience_in(settings),
        "request_format": settings.request_format,
        "limits": settings.limits,
    }
    if settings.store is None:
        if given is not None:
            raise ConfigurationError(
                "A store is given, and the settings have no key for it.",
                hint="Name store.key_source in them.",
            )
        return arguments
    named = store_of(settings.store)
    if (named is None) == (given is None):
        raise ConfigurationError(
            "The settings have a key for a store, and no store, or one is given twice.",
            hint="Name store.url in them, or give store=, and not both.",
        )
    key = bytes.fromhex(store_key_of(settings.store).reveal())
    return {**arguments, "store": named or given, "store_key": key}


def audience_in(settings: Settings) -> str | Audience | None:
    """``aud`` as settings have it."""
    return None if settings.no_audience else settings.audience or Audience.TOKEN_ENDPOINT


def certificate(settings: Settings, client: Signer | None) -> ClientCertificate | None:
    """The client certificate of settings; None where they have none."""
    if settings.client_cert is None or settings.client_key is None:
        return None
    limit: dict[str, Any] = {} if settings.timeout is None else {"timeout": settings.timeout}
    key: str | os.PathLike[str] | Signer = client or _path_of(settings.client_key)
    return ClientCertificate(
        settings.client_cert, key, passphrase=settings.client_key_passphrase_source, **limit
    )


def store_of(settings: StoreSettings) -> TokenStore | None:
    """The store that settings name; None where they name none.

    Raises:
        MissingExtraError: The package redis is not installed.
        SecretSourceError: Its password cannot be read.
    """
    if settings.url is None:
        return None
    # With this alone redis is needed.
    from d1_signer.token.redis_store import RedisTokenStore

    password = None
    if settings.password_source is not None:
        password = read_secret(settings.password_source, what="store's password")
    return RedisTokenStore.from_url(
        settings.url,
        username=settings.username,
        password=password,
        ca_file=settings.ca_file,
        cluster=settings.cluster,
    )


def store_key_of(settings: StoreSettings) -> Secret:
    """The key that seals the fleet's tokens, in hexadecimal.

    Raises:
        SecretSourceError: It cannot be read, or is none.
    """
    key = read_secret(settings.key_source, what="store key")
    if not _HEXADECIMAL.fullmatch(key.reveal()):
        raise SecretSourceError(
            "The store key is not 32 bytes as 64 hexadecimal digits.",
            hint="Make one with: openssl rand -hex 32; the same for all of the fleet.",
        )
    return key


def _close_all(signers: Iterable[Signer]) -> None:
    for signer in signers:
        with contextlib.suppress(Exception):  # nobody needs it any more, whatever its device says
            signer.close()


def this_host() -> str:
    """The name of this host, as the origin of an audit trail."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"


def _open_sealer(settings: Settings) -> Signer:
    uri = settings.audit_key or ""
    policy = _policy(settings.custody_policy)
    return open_signer(uri, custody_policy=policy, **KeyOptions().for_opening(uri))


def _policy(words: str | None) -> CustodyPolicy | None:
    """The policy of the settings; None where the environment has one, which wins."""
    if words is None or CustodyPolicy.from_environment() is not None:
        return None
    return CustodyPolicy.parse(words)


def _places(settings: Settings) -> list[_Place]:
    places = [
        _Place(
            uri=uri,
            kid=settings.kid,
            options=tuple(sorted(settings.option.items())),
            timeout=settings.timeout,
            policy=settings.custody_policy,
        )
        for uri in settings.key
    ]
    if len({*places}) < len(places):
        raise ConfigurationError("key names one key twice.", hint="Leave one of them out.")
    return places


def _client_place(settings: Settings) -> _Place | None:
    key = settings.client_key
    if key is None or scheme_of(key) in {"", "file"}:
        return None
    return _Place(uri=key, timeout=settings.timeout, policy=settings.custody_policy)


def _path_of(key: str) -> str:
    return KeyUri.parse(key, query_names=frozenset()).path if scheme_of(key) else key

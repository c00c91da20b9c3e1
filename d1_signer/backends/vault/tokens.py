# SPDX-License-Identifier: Apache-2.0
"""The token that a process holds: renewed ahead of its end, replaced where it is refused."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

from d1_signer.backends.vault.failures import TO_LOG_IN, TO_RENEW, Purpose
from d1_signer.backends.vault.held import Held, Source
from d1_signer.backends.vault.http import HttpClient, Told
from d1_signer.backends.vault.settings import Settings
from d1_signer.errors import AccessDeniedError, D1SignerError, LoginError
from d1_signer.secret import Secret
from d1_signer.transport.deadlines import no_time_left
from d1_signer.transport.processes import PerProcess

_log = logging.getLogger(__name__)

_TIME_TO_RENEW = 10.0  # seconds
# Seconds between two tries to renew: a quarter of the life that is left, within these.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0


class Tokens:
    """The token of a process, from one source."""

    def __init__(self, source: Source, held: Held | None = None) -> None:
        """Hold ``held``, the parent's of a forked child, or nothing yet."""
        self._source = source
        self._held = held
        self._lock = threading.Lock()
        self._failed: tuple[float, D1SignerError] | None = None
        self.changed = threading.Event()

    def for_this_process(self, vault: str) -> Tokens:
        """The same with a lock of its own: the parent's may have been held when it forked.

        Args:
            vault: Which one it is, for who is asked for a secret.
        """
        held = self._held
        if held is None:
            self._source.prepare(vault)
        # Two processes would each count the uses that are left.
        limited = held is not None and held.uses is not None
        return Tokens(self._source, None if limited else held)

    def current(self, http: HttpClient, until: float) -> Secret | None:
        """The token to send; None where an agent or a proxy adds it.

        It is what is held, renewed or obtained anew where its life is over or nothing is held.
        """
        held = self._held
        if held is not None and held.may_be_sent(time.monotonic()):
            return held.token
        asked = time.monotonic()
        with self._alone(until):
            if self._held is not held and self._held is not None:
                held = self._held
                if held.may_be_sent(time.monotonic()):
                    return held.token
            # Who waited while another one failed would fail in the same way: none of them sends
            # the same credentials once more.
            if self._failed is not None and self._failed[0] >= asked:
                raise self._failed[1].fresh()
            held = self._anew(http, held, until)
            held.may_be_sent(time.monotonic())
            return held.token

    def after_refusal(self, http: HttpClient, until: float, refused: Secret | None) -> Held | None:
        """Another token than the one that was refused; None where there is none now."""
        asked = time.monotonic()
        with self._alone(until):
            held = self._held
            if held is not None and held.token is not refused and held.may_be_sent(asked):
                return held
            if held is not None and asked - held.obtained < self._source.interval:
                return None
            if self._failed is not None and self._failed[0] >= asked:
                raise self._failed[1].fresh()
            new = self._obtained(http, until)
            if _text(new.token) == _text(refused):
                return None
            self._take(new)
            return new if new.may_be_sent(asked) else None

    def _anew(self, http: HttpClient, held: Held | None, until: float) -> Held:
        if held is not None and held.renewable and held.uses is None:
            # In a forked child, whose parent may have renewed it since.
            with contextlib.suppress(LoginError):
                return self._take(self._renewed(http, held, until))
        return self._take(self._obtained(http, until))

    def _obtained(self, http: HttpClient, until: float) -> Held:
        try:
            return self._source.obtain(http, until)
        except D1SignerError as error:
            self._failed = (time.monotonic(), error.fresh())
            raise

    def _take(self, held: Held) -> Held:
        self._held = held
        self.changed.set()
        return held

    @contextlib.contextmanager
    def _alone(self, until: float) -> Iterator[None]:
        # Threads that wait for one login would otherwise each begin their own in turn, where the
        # server hangs, and wait for all of them.
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise no_time_left()
        try:
            yield
        finally:
            self._lock.release()

    def freshen(self, http: HttpClient) -> float | None:
        """Renew or replace the token where that is due.

        Returns:
            Seconds until there is something to do again; None: nothing before it changes.
        """
        held = self._held
        if held is None or held.due == float("inf"):
            return None
        now = time.monotonic()
        if now < held.due:
            return held.due - now
        try:
            with self._alone(now + _TIME_TO_RENEW):
                if self._held is held:
                    self._freshen(http, held, now + _TIME_TO_RENEW)
                return 0.0
        except D1SignerError as error:
            left = held.ends - time.monotonic()
            _log.warning("hashivault.token_not_renewed life_left=%.0f %s", left, error)
        if left <= 0:
            return None  # a caller who needs it obtains it, or is told why not
        return min(max(left / 4, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def _freshen(self, http: HttpClient, held: Held, until: float) -> None:
        if held.renewable is None:
            self._held = self._looked_up(http, held, until)
            return
        renewed = held
        if held.renewable:
            try:
                renewed = self._take(self._renewed(http, held, until))
            except LoginError as error:
                _log.info("hashivault.token_not_renewable %s", error)
        # Less than half of the time that has gone was given back: its greatest life is near.
        if renewed.ends - held.ends < (renewed.obtained - held.obtained) / 2 or renewed is held:
            left = renewed.ends - time.monotonic()
            _log.info("hashivault.token_is_not_prolonged life_left=%.0f", left)
            self._take(self._source.obtain(http, until))

    def _renewed(self, http: HttpClient, held: Held, until: float) -> Held:
        began = time.monotonic()
        new = Held.of(self._about_itself(http, "POST", "renew", held, until), began)
        if new is None or _text(new.token) != _text(held.token):
            raise http.altered(TO_RENEW, "answered a renewal without the token.")
        return replace(new, token=held.token)

    def _looked_up(self, http: HttpClient, held: Held, until: float) -> Held:
        """A token that somebody gave, with what Vault says of its life."""
        began = time.monotonic()
        try:
            data = self._about_itself(http, "GET", "lookup", held, until).get("data")
        except LoginError as error:
            _log.info("hashivault.token_not_looked_up it is not renewed: %s", error)
            return replace(held, due=float("inf"))
        life, renewable, uses = (
            data.get(name) if isinstance(data, dict) else None
            for name in ("ttl", "renewable", "num_uses")
        )
        if renewable is not True or not isinstance(life, int) or life <= 0 or uses != 0:
            return replace(held, due=float("inf"))
        return held.with_life(began, life)

    def _about_itself(
        self, http: HttpClient, method: str, what: str, held: Held, until: float
    ) -> Told:
        path = f"auth/token/{what}-self"
        fields: dict[str, object] | None = {} if method == "POST" else None
        return http.request(TO_RENEW, method, path, until=until, token=held.token, fields=fields)


def _text(token: Secret | None) -> str:
    return "" if token is None else token.reveal()


class Client:
    """A server and the token for it; one for each process."""

    def __init__(self, http: HttpClient, tokens: Tokens) -> None:
        """Begin to look after the token, in a thread that ends with the client."""
        self.http = http
        self._tokens = tokens
        self._closed = threading.Event()
        arguments = (weakref.ref(self), self._closed, tokens.changed)
        keeper = threading.Thread(
            target=_look_after, args=arguments, name="d1-signer-vault-token", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # the limit of threads: callers log in anew then
            keeper.start()

    def ask(
        self,
        purpose: Purpose,
        method: str,
        path: str,
        *,
        until: float,
        fields: dict[str, object] | None = None,
    ) -> Told:
        """Send a request; again, once, where its token was refused and another one is there."""
        http = self.http
        with http.naming(TO_LOG_IN):
            token = self._tokens.current(http, until)
        try:
            return http.request(purpose, method, path, until=until, token=token, fields=fields)
        except (AccessDeniedError, LoginError) as error:
            refusal = error
        try:
            with http.naming(TO_LOG_IN):
                held = self._tokens.after_refusal(http, until, token)
        except LoginError as error:
            refusal.hint = f"{refusal.hint} A new login failed as well: {error}"
            held = None
        if held is None and token is None:
            raise LoginError(
                f"{refusal.message} None was sent: there is no Vault token here.",
                hint="Set VAULT_TOKEN, run vault login, or name a token source or a login.",
                details=refusal.details,
            )
        if held is None:
            raise refusal
        token = held.token
        return http.request(purpose, method, path, until=until, token=token, fields=fields)

    def freshen(self) -> float | None:
        """See `Tokens.freshen`."""
        return self._tokens.freshen(self.http)

    def close(self) -> None:
        """Close the connections that are kept."""
        self._closed.set()
        self._tokens.changed.set()
        self.http.close()


def _look_after(
    client: weakref.ref[Client], closed: threading.Event, changed: threading.Event
) -> None:
    pause = 0.0  # a forked child holds its parent's token from the beginning
    while True:
        changed.wait(pause)
        changed.clear()
        alive = client()
        if alive is None or closed.is_set():
            return
        due = alive.freshen()
        del alive
        # Not for ever, to notice that the client is gone.
        pause = _LONGEST_PAUSE if due is None else min(due, _LONGEST_PAUSE)


def clients(settings: Settings, source: Source) -> PerProcess[Client]:
    """The client of each process; a child's goes on with the token of its parent's login."""
    latest = Tokens(source)

    def make() -> Client:
        nonlocal latest
        latest = latest.for_this_process(f"Vault at {settings.endpoint}")
        return Client(HttpClient(settings), latest)

    made = PerProcess(make)
    made.get()  # before any time limit begins, since a person may type the token
    return made

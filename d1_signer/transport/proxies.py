# SPDX-License-Identifier: Apache-2.0
"""A proxy on the way: which can be used, its credentials, and what it refused.

What it refused is not asked again at each call: directories lock an account whose password is wrong
three times, and who lets no host pass will not let it pass a second later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from email.message import Message
from urllib.parse import quote, unquote, urlsplit

from urllib3.exceptions import ProxyError

from d1_signer.errors import ConfigurationError, SecretSourceError
from d1_signer.frames import without_locals
from d1_signer.secret import Secret, SecretSource, read_secret
from d1_signer.signing import forks
from d1_signer.transport.hosts import shown_address

_AUTHENTICATE = 407  # RFC 9110 section 15.5.8
_TIMEOUT, _TOO_EARLY, _TOO_MANY, _BROKEN = 408, 425, 429, 500
_OK = range(200, 300)
# Seconds: until a host that was not let pass is asked for again, and credentials that had worked.
_REST = 60.0
_MOST_REFUSED = 15  # passwords of one proxy that are remembered, beside the last one
# Seconds after a success for which credentials are taken to be good, so that connections need not
# wait for each other.
_GOOD_FOR = 60.0
_WHAT = "proxy credentials"
_BASIC = "Basic "


class TunnelRefused(ProxyError):
    """A proxy answered CONNECT with something else than a tunnel.

    Attributes:
        proxy: Its host and port.
        status: HTTP status code of its answer.
        passes: Whether asking again may help.
        reason: Why, in a few words.
        hint: What to do.
    """

    def __init__(self, proxy: str, status: int, *, passes: bool, reason: str, hint: str) -> None:
        """Tell what the proxy answered; nothing of it is text of the proxy's own."""
        super().__init__(f"the proxy {proxy} answers HTTP {status}: {reason}. {hint}", None)  # type: ignore[arg-type]
        self.proxy, self.status, self.passes = proxy, status, passes
        self.reason, self.hint = reason, hint

    def details(self) -> dict[str, str | int | float]:
        """What a machine may want to know of it."""
        return {"proxy": self.proxy, "status": self.status}

    def again(self) -> TunnelRefused:
        """The same, for another who asks."""
        return TunnelRefused(
            self.proxy, self.status, passes=self.passes, reason=self.reason, hint=self.hint
        )


class _Memory:
    """What a proxy has answered to whomever in this process; a directory counts wrong passwords."""

    def __init__(self) -> None:
        self.good: Secret | None = None
        self.good_until = float("-inf")
        self.had_worked = False
        self.new_lock()
        self.forget_refusals()

    def new_lock(self) -> None:
        self.one_at_a_time = threading.Lock()

    def knows(self, credentials: Secret | None) -> bool:
        return time.monotonic() < self.good_until and same(self.good, credentials)

    def forget_refusals(self) -> None:
        # Credentials that were refused, and when they may be sent again.
        self.refused: list[tuple[Secret, TunnelRefused, float]] = []
        self.closed_to: dict[str, tuple[float, TunnelRefused]] = {}


_memories: dict[str, _Memory] = {}


class Proxy:
    """An HTTP proxy that takes CONNECT, for one fetcher or backend. Thread-safe.

    Attributes:
        url: Its URL, without credentials.
        address: Its host and port, for error texts.
    """

    def __init__(self, url: Secret | str, credentials_source: SecretSource | None = None) -> None:
        """Look at the settings, and read the credentials so that a wrong source shows now.

        A proxy that is itself reached by TLS would need a trust of its own.

        Args:
            url: ``http://HOST:PORT``; in a `Secret` also ``http://USER:PASSWORD@HOST:PORT``.
            credentials_source: Source of ``USER:PASSWORD``, for Basic authentication. A file and a
                variable are read for each connection; what a person types, or a function gives, is
                kept.

        Raises:
            ConfigurationError: Another form of URL, or credentials both in it and by a source.
            SecretSourceError: The credentials cannot be read, or are not ``USER:PASSWORD``.
        """
        place, given = _parts(url)
        masked = isinstance(url, Secret)
        del url  # a frame that raises holds no secret
        if place is None or (given is not None and not masked):
            raise ConfigurationError(
                "The proxy cannot be used.",
                hint="Give http://HOST:PORT, and credentials by their source.",
            )
        if given is not None and credentials_source is not None:
            raise ConfigurationError(
                "The proxy's credentials are given twice.", hint="Leave them out of its URL."
            )
        self.address = shown_address(*place)
        self.url = f"http://{self.address}"
        self._source = credentials_source
        self._kept = given
        self._memory = _memories.setdefault(self.address, _Memory())
        self.credentials()

    def revealed_url(self, credentials: Secret | None) -> str:
        """Its URL with credentials in it, for a library that speaks CONNECT itself."""
        if credentials is None:
            return self.url
        pair = b64decode(credentials.reveal().removeprefix(_BASIC)).decode()
        user, _, password = pair.partition(":")
        return f"http://{quote(user, safe='')}:{quote(password, safe='')}@{self.address}"

    def forget_refusals(self) -> None:
        """Ask again whatever was refused."""
        self._memory.forget_refusals()

    @contextlib.contextmanager
    def asking(self, target: str, until: float) -> Iterator[Secret | None]:
        """Ask for a tunnel; gives the value of ``Proxy-Authorization``, or None.

        Credentials of which it is not known that they are good are sent by one thread at a time.

        Args:
            target: Host and port.
            until: Moment on ``time.monotonic()``.

        Raises:
            TunnelRefused: It was refused before, and is not asked for again yet.
            TimeoutError: Other threads were being answered until then.
        """
        credentials, memory = self.credentials(), self._memory
        with contextlib.ExitStack() as alone:
            if credentials is not None and not memory.knows(credentials):
                lock = memory.one_at_a_time
                if not lock.acquire(timeout=max(until - time.monotonic(), 0.0)):
                    raise TimeoutError
                alone.callback(lock.release)
            if memory.knows(credentials):
                alone.close()
            self._require_not_refused(target, credentials)
            yield credentials

    def answered(
        self, target: str, credentials: Secret | None, status: int, headers: Message
    ) -> None:
        """Take note of an answer to CONNECT.

        Raises:
            TunnelRefused: It is no tunnel.
        """
        now, memory = time.monotonic(), self._memory
        if status in _OK:
            memory.good_until, memory.had_worked = now + _GOOD_FOR, credentials is not None
            memory.good = credentials
            memory.refused = [kept for kept in memory.refused if not same(kept[0], credentials)]
            return
        refused = self._refusal(target, status, headers, known=credentials is not None)
        if status == _AUTHENTICATE and credentials is not None:
            # A proxy whose directory is away for a moment refuses good ones too.
            if any(same(kept[0], credentials) and now < kept[2] for kept in memory.refused):
                raise refused  # it was under way when another one was refused
            had_worked = memory.had_worked and same(memory.good, credentials)
            again_at = now + _REST if had_worked else float("inf")
            others = [kept for kept in memory.refused if not same(kept[0], credentials)]
            memory.refused = [*others[-_MOST_REFUSED:], (credentials, refused, again_at)]
            if same(memory.good, credentials):
                memory.good_until = float("-inf")
            memory.had_worked = memory.had_worked and not had_worked
        elif not refused.passes:
            resting = {host: kept for host, kept in memory.closed_to.items() if now < kept[0]}
            memory.closed_to = {**resting, target: (now + _REST, refused)}
        raise refused

    def _require_not_refused(self, target: str, credentials: Secret | None) -> None:
        now = time.monotonic()
        for sent, refused, again_at in self._memory.refused:
            if now < again_at and same(sent, credentials):
                raise refused.again()
        until, closed = self._memory.closed_to.get(target, (0.0, None))
        if closed is not None and now < until:
            raise closed.again()

    def credentials(self) -> Secret | None:
        """The value of ``Proxy-Authorization`` that its source gives now, or None.

        Raises:
            SecretSourceError: It cannot be read, or is not ``USER:PASSWORD``.
        """
        if self._kept is not None or self._source is None:
            return self._kept
        text = read_secret(self._source, what=_WHAT)
        credentials = _basic(text)
        if credentials is None:
            raise SecretSourceError(
                "The proxy credentials are not of the form USER:PASSWORD.",
                hint="One line of text, with a colon after the user's name.",
            )
        if callable(self._source) or self._source == "prompt":
            self._kept = credentials
        return credentials

    def _refusal(self, target: str, status: int, headers: Message, *, known: bool) -> TunnelRefused:
        passes = False
        if status == _AUTHENTICATE and known:
            reason = "it refuses the credentials"
            hint = (
                "Correct them at their source (proxy_credentials_source), which is read for each "
                "connection; until then they are not sent again."
            )
        elif status == _AUTHENTICATE:
            reason = "it asks for credentials, and none are given"
            hint = "Give --proxy-credentials-source (proxy_credentials_source)."
            offered = headers.get_all("Proxy-Authenticate", ["basic"])
            if not any(scheme.lower().startswith("basic") for scheme in offered):
                reason = "it asks for credentials, and not by Basic authentication"
                hint = "Basic is what is spoken here; let this machine pass without, or by Basic."
        elif may_pass(status):
            passes, reason = True, "it does not reach the host now"
            hint = f"It is tried again; if it stays, ask who runs it whether it reaches {target}."
        else:
            reason = "it does not let this host pass"
            hint = f"Have {target} allowed there, and check that this is the proxy's address."
        return TunnelRefused(self.address, status, passes=passes, reason=reason, hint=hint)


def request_for(target: str, credentials: Secret | None) -> bytes:
    """The request for a tunnel (RFC 9110 section 9.3.6)."""
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if credentials is None:
        return f"{head}\r\n".encode()
    return f"{head}Proxy-Authorization: {credentials.reveal()}\r\n\r\n".encode()


def may_pass(status: int) -> bool:
    """Whether a proxy that answers CONNECT with this status may answer otherwise in a while."""
    return status >= _BROKEN or status in {_TIMEOUT, _TOO_EARLY, _TOO_MANY}


@without_locals
def optional_proxy(
    url: Secret | str | None, credentials_source: SecretSource | None
) -> Proxy | None:
    """The proxy of these settings; None where none is named.

    Raises:
        ConfigurationError: As for `Proxy`; or credentials for no proxy.
        SecretSourceError: As for `Proxy`.
    """
    if url is not None:
        return Proxy(url, credentials_source)
    if credentials_source is not None:
        raise ConfigurationError(
            "Credentials for a proxy are given, and no proxy.", hint="Give its URL as well."
        )
    return None


def _after_fork_in_child() -> None:
    # The parent's lock may have been held at the moment of the fork. What was refused stays so.
    for memory in list(_memories.values()):
        memory.new_lock()


forks.in_child(_after_fork_in_child)


def _parts(url: object) -> tuple[tuple[str, int] | None, Secret | None]:
    """Host and port, and credentials, of a URL; None for a URL that cannot be used."""
    try:
        parts = urlsplit(url.reveal() if isinstance(url, Secret) else url)  # type: ignore[call-overload]  # whatever a caller gives
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        return None, None
    if parts.scheme != "http" or not host or not port:
        return None, None
    if "@" not in parts.netloc:
        return (host, port), None
    pair = Secret(f"{unquote(parts.username or '')}:{unquote(parts.password or '')}")
    credentials = _basic(pair)
    return (None if credentials is None else (host, port)), credentials


def _basic(text: Secret) -> Secret | None:
    """The value of ``Proxy-Authorization`` (RFC 7617); None for what is not ``USER:PASSWORD``."""
    pair = text.reveal()
    if not pair.partition(":")[1] or not pair.isprintable():
        return None
    return Secret(f"{_BASIC}{b64encode(pair.encode()).decode()}")


def same(one: Secret | None, other: Secret | None) -> bool:
    """Whether two are the same credentials, or both none."""
    if one is None or other is None:
        return one is other
    return one.reveal() == other.reveal()

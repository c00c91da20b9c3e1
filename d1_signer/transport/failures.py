# SPDX-License-Identifier: Apache-2.0
"""What an error of requests, urllib3 or an SDK came from, and at which stage. Pure."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from enum import Enum
from http.client import BadStatusLine, HTTPException, RemoteDisconnected, UnknownProtocol

from urllib3.exceptions import (
    ConnectTimeoutError,
    NewConnectionError,
    ProxyError,
    TimeoutError as HttpTimeout,
)
from urllib3.util.ssl_match_hostname import CertificateError

from d1_signer.frames import causes
from d1_signer.transport.chunks import FramingError
from d1_signer.transport.proxies import TunnelRefused

# What OpenSSL says where bytes that come are no TLS; the words differ among its releases.
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|PACKET_LENGTH|RECORD_LAYER_FAILURE")
_TOO_OLD = re.compile(r"UNSUPPORTED_PROTOCOL|ALERT_PROTOCOL_VERSION|UNSUPPORTED_SSL_VERSION")
# Alerts of RFC 8446 section 6.2 and RFC 5246 section 7.2, in OpenSSL's words.
_NOTHING_IN_COMMON = re.compile(
    r"INSUFFICIENT_SECURITY|EXPORT_RESTRICTION|NO_CIPHERS_AVAILABLE|NO_SHARED_CIPHER"
)
_HANDSHAKE_FAILURE = re.compile(r"ALERT_HANDSHAKE_FAILURE")
_UNKNOWN_NAME = re.compile(r"TLSV1_(ALERT_)?UNRECOGNIZED_NAME")
_PASSING = re.compile(r"ALERT_(INTERNAL_ERROR|USER_CANCELL?ED)")
# A server of TLS 1.2 says of a missing one that the handshake failed.
_ABOUT_CERTIFICATE = re.compile(
    r"(ALERT|TLSV1)_(.*CERTIFICATE.*|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE_FAILURE|DECRYPT_ERROR)"
)
_ALERT = re.compile(r"ALERT|^TLSV1_")
# What Python has no name for has OpenSSL's words at least.
_WORDS = re.compile(r"\] ([^(:]+)")


NOT_HTTP = "what it answers is not HTTP"
"""The reason of a failure that says nothing against a client certificate."""


class Stage(Enum):
    """Where an exchange failed; the value is the word for it in an error's details."""

    NAME = "name"
    CONNECTION = "connection"
    PROXY = "proxy"
    TLS = "tls"
    ANSWER = "answer"


_PARTS = {
    Stage.NAME: "its name",
    Stage.CONNECTION: "the connection",
    Stage.PROXY: "the proxy",
    Stage.TLS: "TLS",
    Stage.ANSWER: "the answer",
}


class TlsFailure(Enum):
    """What a failed handshake came to, as far as the two sides say."""

    UNTRUSTED = "we refuse the server's certificate"
    REFUSED_CERTIFICATE = "an alert about ours"
    ALERT = "another alert"
    NO_TLS = "what answers speaks something else"
    TOO_OLD = "no version in common"
    NOTHING_IN_COMMON = "no cipher suite, group or signature algorithm in common"
    UNKNOWN_NAME = "an alert about the host name"
    PASSING = "an alert about what may pass"
    CUT = "the connection ended"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer.

    Attributes:
        stage: Where it failed.
        reason: Why, in a few words; nothing secret in them.
        tls: For the stage of that name, what the handshake came to.
        refused: What a proxy answered, where it answered.
    """

    stage: Stage
    reason: str
    tls: TlsFailure | None = None
    refused: TunnelRefused | None = None

    def told(self, proxy: str | None = None) -> str:
        """What failed and why, in the same words whoever was asked.

        Args:
            proxy: The one on the way.
        """
        part = _PARTS[self.stage]
        if self.stage is Stage.PROXY and proxy:
            part = f"{part} {proxy}"
        return f"{part} failed: {self.reason}"


def is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused, which stays so; anything else about TLS may pass."""
    refusals = (ssl.SSLCertVerificationError, CertificateError)
    return any(isinstance(cause, refusals) for cause in causes(error))


def failure_of(
    error: Exception, *, connect: float | None = None, read: float | None = None
) -> Failure:
    """Tell where an exchange failed, and why.

    Args:
        error: Of requests or urllib3, or what it was raised from.
        connect: Seconds that the connection was given, where they are known.
        read: Seconds that each wait for bytes was given, where they are known.
    """
    links = list(causes(error))
    in_tls = next((found for link in links if (found := _tls_failure(link))), None)
    if in_tls is not None:
        return in_tls
    refused = next((link for link in links if isinstance(link, TunnelRefused)), None)
    if refused is not None:
        told = f"it answers HTTP {refused.status}, {refused.reason}"
        return Failure(Stage.PROXY, told, refused=refused)
    # The order matters: to urllib3 a refused connection is a kind of connect timeout.
    by_proxy = any(isinstance(link, ProxyError) for link in links)
    unknown = next((link for link in links if isinstance(link, socket.gaierror)), None)
    if unknown is not None:
        again = unknown.errno == socket.EAI_AGAIN
        told = "the name servers gave no answer" if again else "the host name is not known here"
        return Failure(Stage.PROXY if by_proxy else Stage.NAME, told)
    if by_proxy:
        foreign = any(isinstance(link, HTTPException) for link in links)
        reason = NOT_HTTP if foreign else _system_reason(links)
        return Failure(Stage.PROXY, reason or f"no tunnel {_within(connect)}")
    unreadable = _unreadable(links)
    if unreadable is not None:
        return Failure(Stage.ANSWER, unreadable)
    connecting = any(isinstance(link, NewConnectionError | ConnectTimeoutError) for link in links)
    reason = _system_reason(links)
    if reason is None and connecting:
        reason = f"no connection {_within(connect)}"
    elif reason is None and any(isinstance(link, HttpTimeout | TimeoutError) for link in links):
        reason = f"no answer {_within(read)}"
    return Failure(
        Stage.CONNECTION if connecting else Stage.ANSWER,
        reason or "the connection was closed before a whole answer came",
    )


def _unreadable(links: list[BaseException]) -> str | None:
    """Why what came is no answer; None where nothing came."""
    unframed = next((link for link in links if isinstance(link, FramingError)), None)
    if unframed is not None:
        return f"it cannot be read: {unframed}"
    # No answer at all is a kind of bad status line to Python.
    ended = any(isinstance(link, RemoteDisconnected) for link in links)
    foreign = any(isinstance(link, BadStatusLine | UnknownProtocol) for link in links)
    return NOT_HTTP if foreign and not ended else None


def _within(seconds: float | None) -> str:
    return "in time" if seconds is None else f"within {seconds:.3g} seconds"


def _tls_failure(link: BaseException) -> Failure | None:
    if isinstance(link, ssl.SSLCertVerificationError):
        # Absent from one that OpenSSL did not raise.
        why = getattr(link, "verify_message", "") or "its certificate is not trusted"
        return Failure(Stage.TLS, why.rstrip("."), TlsFailure.UNTRUSTED)
    if isinstance(link, CertificateError):
        return Failure(Stage.TLS, "it is for another host", TlsFailure.UNTRUSTED)
    if isinstance(link, TimeoutError) and "handshake" in str(link):
        return Failure(Stage.TLS, "the handshake did not end in time", TlsFailure.CUT)
    if not isinstance(link, ssl.SSLError):
        return None
    said = getattr(link, "reason", None)  # absent from one that OpenSSL did not raise
    if not said:
        found = _WORDS.search(str(link))
        said = found[1].strip().upper().replace(" ", "_") if found else ""
    closed = isinstance(link, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    if closed or "UNEXPECTED_EOF" in said:
        return Failure(Stage.TLS, "the connection was closed amid the handshake", TlsFailure.CUT)
    words = re.sub(r"[^a-z0-9.]+", " ", (said or "no reason").lower())
    return Failure(Stage.TLS, words, _kind(said, agreed=not hasattr(link, _NO_AGREEMENT)))


_NO_AGREEMENT = "no_agreement"


def note_no_agreement(error: ssl.SSLError) -> None:
    """Note in an error of a handshake that it came before a version and a suite were agreed on."""
    setattr(error, _NO_AGREEMENT, True)


def _kind(said: str, *, agreed: bool) -> TlsFailure:
    kinds = {
        _TOO_OLD: TlsFailure.TOO_OLD,
        _NOTHING_IN_COMMON: TlsFailure.NOTHING_IN_COMMON,
        _NO_TLS: TlsFailure.NO_TLS,
        _UNKNOWN_NAME: TlsFailure.UNKNOWN_NAME,
        _PASSING: TlsFailure.PASSING,
        # No certificate was asked for before.
        _HANDSHAKE_FAILURE: None if agreed else TlsFailure.NOTHING_IN_COMMON,
        _ABOUT_CERTIFICATE: TlsFailure.REFUSED_CERTIFICATE if agreed else TlsFailure.ALERT,
        _ALERT: TlsFailure.ALERT,
    }
    found = (kind for words, kind in kinds.items() if kind is not None and words.search(said))
    return next(found, TlsFailure.CUT)


def _system_reason(links: list[BaseException]) -> str | None:
    for link in links:
        if isinstance(link, OSError) and link.errno and link.strerror:
            return link.strerror.lower()
    return None

# SPDX-License-Identifier: Apache-2.0
"""Whom the token endpoint's exchanges are with, and how their failures are told.

What stands between us and D1 (a gateway, a proxy, a load balancer) answers in D1's place; nobody
should look for the fault in an assertion that D1 never saw.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from d1_signer.errors import (
    TlsError,
    TokenError,
    TokenRefusedError,
    TokenResponseError,
    TokenUnavailable,
)
from d1_signer.token.d1 import Environment, origin
from d1_signer.token.response import TRANSIENT, read_object
from d1_signer.transport.certificates import dates_at_fault
from d1_signer.transport.client import ClientTls
from d1_signer.transport.failures import NOT_HTTP, Failure, Stage, TlsFailure
from d1_signer.transport.hosts import shown_address
from d1_signer.transport.proxies import Proxy

# nginx, when it hands its own refusal of a client certificate to a page.
_ABOUT_CERTIFICATE = frozenset({495, 496})
_REFUSALS = frozenset({400, 401, 403})
_NAMES_CERTIFICATE = re.compile(rb"\b(ssl|tls|client)[ -]certificate\b", re.IGNORECASE)

# What each failure of TLS is told as; without a hint it is one about the client certificate.
_TOLD = {
    TlsFailure.UNTRUSTED: (
        "The server certificate of {at} is not trusted: {reason}.",
        (
            "Check the environment's URL and the CA file, and the clock where dates are named; "
            "a TLS-inspecting proxy must let this host pass."
        ),
    ),
    TlsFailure.TOO_OLD: (
        "{at} offers no TLS 1.2 or newer ({reason}).",
        "Check the environment's URL; D1 speaks TLS 1.2, so something else answers.",
    ),
    TlsFailure.NOTHING_IN_COMMON: (
        "{at} has no version or cipher suite of TLS in common with this machine ({reason}).",
        "Check the environment's URL, and this machine's configuration of OpenSSL.",
    ),
    TlsFailure.NO_TLS: (
        "{at} does not speak TLS but plain HTTP or another protocol ({reason}).",
        "Check the port in the environment's URL, and what stands between.",
    ),
    TlsFailure.UNKNOWN_NAME: (
        "{at} does not serve this host name ({reason}).",
        "Check the host in the environment's URL.",
    ),
    TlsFailure.PASSING: (
        "D1's token endpoint {at} cannot be reached; TLS failed over there: {reason}.",
        "It is tried again by itself; if it stays, ask who runs the server.",
    ),
    TlsFailure.REFUSED_CERTIFICATE: (
        "{at} refuses the TLS handshake for the client certificate ({reason}).",
        None,
    ),
    TlsFailure.ALERT: (
        "{at} refuses the TLS handshake ({reason}).",
        "Ask who runs the server, with these words.",
    ),
    TlsFailure.CUT: (
        "D1's token endpoint {at} cannot be reached; TLS failed: {reason}.",
        None,
    ),
}
# Where the dates of the client certificate have nothing to do with it.
_NOT_ABOUT_OURS = frozenset(
    {
        TlsFailure.TOO_OLD,
        TlsFailure.NOTHING_IN_COMMON,
        TlsFailure.NO_TLS,
        TlsFailure.UNKNOWN_NAME,
    }
)
# What this process or machine has none left of, in the system's words.
_USED_UP = frozenset(
    os.strerror(code).lower()
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
)
_ABOUT_LIMITS = (
    "Look at what this process or machine has none left of: open files (LimitNOFILE, ulimit -n), "
    "memory or local ports."
)
_ABOUT_FOREIGN = (
    "Check the port in the environment's URL, and what stands before D1 (a proxy or gateway)."
)
_ABOUT_PROXY = "Check the proxy's URL, and that it runs."

Details = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """The other side of the exchanges.

    Attributes:
        environment: Which D1.
        proxy: On the way, or None.
        tls: What is shown to it.
    """

    environment: Environment
    proxy: Proxy | None
    tls: ClientTls

    @property
    def address(self) -> str:
        """Host and port."""
        _, host, port = origin(self.environment.token_endpoint)
        return shown_address(host, port)

    def unreached(self, failure: Failure) -> TokenError:
        """The error for an exchange without an answer."""
        details: Details = {"host": self.address, "failed": failure.stage.value}
        if failure.stage is Stage.TLS:
            return self._without_tls(failure, details)
        foreign = failure.reason == NOT_HTTP
        at_fault = None if foreign else self._dates()
        if failure.stage is Stage.ANSWER and at_fault:
            # A server of TLS 1.3 that refuses a certificate may only close the connection.
            return TlsError(
                f"{self.address} gave no answer: {failure.reason}. {at_fault}",
                hint=self._about_certificate(),
                details=details,
            )
        proxy = self.proxy.address if self.proxy else ""
        refused = failure.refused
        if failure.stage is Stage.PROXY:
            details["proxy"] = proxy
        if refused is not None:
            details |= refused.details()
        hint = {
            Stage.NAME: "Check the environment's URL and this machine's DNS.",
            Stage.CONNECTION: "Check network and firewall, and the port.",
            Stage.PROXY: refused.hint if refused else _ABOUT_PROXY,
            Stage.ANSWER: _ABOUT_FOREIGN if foreign else self._where_it_stays(),
        }[failure.stage]
        if failure.reason in _USED_UP:
            hint = _ABOUT_LIMITS
        return TokenUnavailable(
            f"D1's token endpoint {self.address} cannot be reached; {failure.told(proxy)}.",
            hint=hint,
            retryable=refused is None or refused.passes,
            details=details,
        )

    def broken_off(self, status: int, *, late: bool) -> TokenError:
        """The error for an answer that began: who gives one has nothing against our certificate.

        Args:
            status: HTTP status code.
            late: Whether its time ran out.
        """
        why = "the rest did not come in time" if late else "the connection was closed amid it"
        return TokenUnavailable(
            f"The answer of D1's token endpoint {self.address} (HTTP {status}) broke off: {why}.",
            hint="It is tried again by itself; if it stays, look at what stands before D1 (a proxy "
            "or gateway), or ask Thales with the correlation id.",
            details={"host": self.address, "failed": Stage.ANSWER.value, "status": status},
        )

    def _without_tls(self, failure: Failure, details: Details) -> TokenError:
        kind = failure.tls or TlsFailure.CUT
        told, hint = _TOLD[kind]
        none_given = self._none_given() if kind is TlsFailure.REFUSED_CERTIFICATE else None
        at_fault = None if kind in _NOT_ABOUT_OURS else self._dates()
        told = told.format(at=self.address, reason=failure.reason)
        text = " ".join(part for part in (told, none_given, at_fault) if part)
        if kind is TlsFailure.PASSING or (kind is TlsFailure.CUT and not at_fault):
            return TokenUnavailable(text, hint=hint or self._where_it_stays(), details=details)
        return TlsError(text, hint=hint or self._about_certificate(), details=details)

    def answered_by_another(
        self, status: int, content_type: str, body: bytes, *, retry_after: float | None
    ) -> TokenError | None:
        """The error for an answer other than 200 that is not D1's; None where it may be D1's.

        Args:
            status: HTTP status code.
            content_type: The header, may be empty.
            body: The body; nothing of it is told.
            retry_after: Seconds that the answer asks to wait, where it does.
        """
        details: Details = {"status": status, "host": self.address}
        if retry_after is not None:
            details["retry_after"] = retry_after
        if 300 <= status < 400:  # noqa: PLR2004 (RFC 9110 section 15.4)
            return TokenResponseError(
                f"{self.address} answers with a redirect (HTTP {status}), which is not followed.",
                hint="Check the environment's URL: D1 does not redirect, something else answers.",
                details=details,
            )
        told = read_object(body)
        if told is not None and told.get("error"):  # which D1 gives (RFC 6749 section 5.2)
            return None
        page = "html" in content_type.lower() or body.lstrip().startswith(b"<")
        refused = status in _ABOUT_CERTIFICATE or (
            status in _REFUSALS and _NAMES_CERTIFICATE.search(body)
        )
        at_fault = self._dates()
        if refused or (page and status in _REFUSALS and at_fault):
            why = at_fault or self._none_given() or ""
            return TlsError(
                f"{self.address} refuses the client certificate with a page of its own "
                f"(HTTP {status}), which is not D1's answer. {why}".rstrip(),
                hint=self._about_certificate(),
                details=details,
            )
        if page and status in _REFUSALS:
            return TokenRefusedError(
                f"{self.address} refuses the request with a page (HTTP {status}), which is not "
                f"D1's answer but that of a gateway; the likely cause is: {self._likely_cause()}",
                status=status,
                hint="Check the client certificate; else ask who runs what stands before D1.",
                details=details,
            )
        if page and (status in TRANSIENT or status >= 500):  # noqa: PLR2004 (section 15.6)
            return TokenUnavailable(
                f"{self.address} cannot give a token now: it answers with a page (HTTP {status}), "
                "which is not D1's answer but that of a gateway.",
                hint="It is tried again by itself; if it stays, ask who runs the gateway.",
                details=details,
            )
        return None

    def _dates(self) -> str | None:
        certificate = self.tls.shown_certificate()
        wrong = certificate and dates_at_fault(certificate)
        return f"The client certificate {wrong} by this machine's clock." if wrong else None

    def _none_given(self) -> str | None:
        return "No client certificate was given." if self.tls.shows_none() else None

    def _about_certificate(self) -> str:
        certificate = self.tls.shown_certificate()
        if certificate and dates_at_fault(certificate):
            return (
                "Look at this machine's clock; where it is right, have Thales sign a new "
                f"certificate for {self.environment.base_url} (d1-signer csr)."
            )
        give = f"give the one that Thales signed for {self.environment.base_url}."
        if certificate is None:
            return f"Look at the client certificate: {give}"
        issuer = certificate.issuer.rfc4514_string()
        return f"The client certificate in use was issued by {issuer!r}: {give}"

    def _likely_cause(self) -> str:
        if self.tls.shows_none():
            return f"no client certificate was given for {self.environment.base_url}."
        return (
            "the client certificate, where it is not the one that Thales signed for "
            f"{self.environment.base_url}."
        )

    def _where_it_stays(self) -> str:
        return f"Try again; where it stays, the likely cause is: {self._likely_cause()}"

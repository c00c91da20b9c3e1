# SPDX-License-Identifier: Apache-2.0
"""A client of Cloud KMS in one process, and calls that end by a moment."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from email.message import Message
from functools import partial
from typing import TypeVar

from d1_signer.backends.gcp_kms.channel import Sdk, sdk_for
from d1_signer.backends.gcp_kms.credentials import GcpCredentials
from d1_signer.backends.gcp_kms.failures import CLOUD_KMS, this_call
from d1_signer.backends.gcp_kms.place import Place
from d1_signer.backends.remote import clients_of
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    LoginError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.secret import Secret
from d1_signer.transport.deadlines import no_time_left, within
from d1_signer.transport.processes import PerProcess, fork_gate
from d1_signer.transport.proxies import TunnelRefused, same

R = TypeVar("R")

Method = Callable[[Sdk], Callable[..., R]]

# Seconds before the second and the third attempt, at most; then the failure is the caller's.
_PAUSES = (0.1, 0.4)

_FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
# As gRPC reads it, once.
_FORKS_BREAK_IT = os.environ.get(_FORK_VARIABLE, "").lower() in {"0", "f", "false", "n", "no"}


class _Used:
    """The process in which gRPC was first used by this module."""

    pid: int | None = None


class Client:
    """A client of google-cloud-kms; with its credentials, where it is one of ours."""

    def __init__(
        self,
        sdk: Sdk | None = None,
        *,
        place: Place | None = None,
        credentials: GcpCredentials | None = None,
    ) -> None:
        """Take a client that stays the caller's; or make one where a key is.

        Args:
            sdk: The caller's.
            place: The key, for one of ours.
            credentials: For one of ours.
        """
        self._place = place
        self._proxy = None if place is None else place.proxy
        self.credentials = credentials
        # The SDK's client, and what its channel shows the proxy, in one attribute: read as one.
        self._made: tuple[Sdk, Secret | None] | None = None if sdk is None else (sdk, None)

    def through(self, shown: Secret | None) -> Sdk:
        """The SDK's client, whose channel shows the proxy this; another one where that was changed.

        Calls that are under way go on with the one before.
        """
        made = self._made
        if made is None or not same(made[1], shown):
            if self._place is None or self.credentials is None:
                raise ConfigurationError("The Cloud KMS client that was given is none.")
            made = self._made = (sdk_for(self._place, self.credentials, shown), shown)
        return made[0]

    def call(
        self,
        until: float,
        doing: str,
        phase: str,
        method: Method[R],
        request: object,
        *,
        attempts: int = 3,
    ) -> R:
        """Call a method of the SDK; the moment holds for all attempts together.

        Where Cloud KMS refuses the access token, it is asked once more with another, if there is
        one.

        Args:
            until: The moment, on ``time.monotonic()``.
            doing: What is asked for, such as ``"to sign"``.
            phase: The word for it in an error's details.
            method: Gives the method of an SDK's client.
            request: The request's message.
            attempts: How often an unavailable service is asked.
        """

        def attempt(sdk: Sdk) -> R:
            return _attempts(until, doing, method(sdk), request, attempts)

        ask = partial(CLOUD_KMS.ask, doing, self._through_proxy, until, attempt)
        try:
            _check_fork()
            if self.credentials is None:
                return self._ask(until, ask)
            token = self.credentials.get(until)
            this_call.sent = token.secrets()
            this_call.proxy = self._proxy.url if self._proxy else None
            try:
                return ask()
            except LoginError:
                if not self.credentials.replaced(token, until):
                    raise
            this_call.sent = self.credentials.get(until).secrets()
            return ask()
        except D1SignerError as error:
            if error.details.setdefault("phase", phase) == phase:  # else the source has its own
                error.details["endpoint"] = self._endpoint()
            raise

    def _endpoint(self) -> str:
        if self._place is not None:
            return self._place.target
        return str(self.through(None).transport.host)

    def _through_proxy(self, until: float, ask: Callable[[Sdk], R]) -> R:
        if self._proxy is None or self._place is None:
            return ask(self.through(None))
        target = self._place.target
        try:
            with self._proxy.asking(target, until) as shown:
                try:
                    answer = ask(self.through(shown))
                except D1SignerError as error:
                    status = error.details.get("proxy_status")
                    if isinstance(status, int):
                        self._proxy.answered(target, shown, status, Message())
                    raise
                self._proxy.answered(target, shown, 200, Message())
                return answer
        except TunnelRefused as refused:
            if not refused.passes:
                self._let_go()
            raise

    def _let_go(self) -> None:
        """Close the channel, which would ask a proxy that has refused again and again by itself."""
        made, self._made = self._made, None
        if made is not None:
            made[0].transport.close()  # type: ignore[no-untyped-call]

    def _ask(self, until: float, ask: Callable[[], R]) -> R:
        this_call.sent, this_call.proxy = (), None
        # Over REST a time limit bounds each wait for bytes and not the call.
        transport = self.through(None).transport
        return ask() if getattr(transport, "kind", "") == "grpc" else within(until, ask)

    def close(self) -> None:
        """Close the channel; that of a client that was given stays open."""
        if self.credentials is not None and self._made is not None:
            self._made[0].transport.close()  # type: ignore[no-untyped-call]


def _check_fork() -> None:
    if not _FORKS_BREAK_IT:
        return
    if _Used.pid is None:
        _Used.pid = os.getpid()
    elif _Used.pid != os.getpid():
        raise ConfigurationError(
            f"{_FORK_VARIABLE} is off, and this process was forked from one that used gRPC: here "
            "gRPC would hang for ever, or crash.",
            hint=f"Unset {_FORK_VARIABLE}, or open the key after the fork only.",
        )


def _attempts(
    until: float, doing: str, method: Callable[..., R], request: object, attempts: int
) -> R:
    for pause in (*_PAUSES[: attempts - 1], None):
        try:
            with fork_gate.call(until):
                remaining = until - time.monotonic()
                if remaining <= 0:
                    break
                # The SDK's own retry ignores `timeout`: it runs for a minute.
                return CLOUD_KMS.ask(doing, method, request=request, retry=None, timeout=remaining)
        except TimeoutError:
            break
        except (SignerTimeout, SignerThrottled):
            raise
        except SignerUnavailable as error:
            if not error.retryable or pause is None or time.monotonic() + pause >= until:
                raise
        time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 (spreads load, no secret)
    raise no_time_left()


def clients(place: Place, given: Sdk | Callable[[], Sdk] | None) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own.

    Our own have their credentials in common: a child of a fork goes on with what its parent held.
    """
    make = partial(_client, place, GcpCredentials(place.universe, place.target))
    return clients_of(
        given, "Cloud KMS client", Client, lambda: CLOUD_KMS.ask("to be set up", make)
    )


def _client(place: Place, credentials: GcpCredentials | None = None) -> Client:
    _check_fork()
    if os.environ.get("GOOGLE_API_USE_CLIENT_CERTIFICATE", "").lower() == "true":
        raise ConfigurationError(
            "GOOGLE_API_USE_CLIENT_CERTIFICATE is set, and the calls would show no certificate.",
            hint="Unset it; or give a function that makes a client which shows one.",
        )
    credentials = credentials or GcpCredentials(place.universe, place.target)
    client = Client(place=place, credentials=credentials)
    client.through(None if place.proxy is None else place.proxy.credentials())  # shows a wrong one
    return client

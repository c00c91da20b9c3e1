# SPDX-License-Identifier: Apache-2.0
"""Which key of Cloud KMS, the client of each process, and calls within a time limit."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from google.api_core.client_options import ClientOptions
from google.cloud import kms_v1 as kms

from d1_signer.backends.gcp_kms.failures import ask
from d1_signer.errors import (
    ConfigurationError,
    KeyUriError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.key_uri import KeyUri
from d1_signer.remote import PerProcess, no_time_left, only_in_this_process, within

R = TypeVar("R")

Client = kms.KeyManagementServiceClient

_NAME = re.compile(
    r"(projects/[a-z0-9.:-]+/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]+)"
    r"/cryptoKeys/([A-Za-z0-9_-]+)(?:/cryptoKeyVersions/([1-9][0-9]*))?"
)
_FORM = "gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V"
_ENDPOINT = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?")

# Seconds before the second and the third attempt, at most; then the failure is the caller's.
_PAUSES = (0.1, 0.4)

_LONGEST_WAIT_TO_FORK = 15.0  # seconds


class _ForkGate:
    """Lets no process be forked while one of our calls is inside gRPC.

    gRPC survives a fork only between calls: its own fork handlers give up while another thread
    calls, and then one child in ten waits for ever on a channel that it made itself.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: a forked child has none of the threads that were in calls."""
        self._changed = threading.Condition()
        self._calls = 0
        self._forking = False

    def __enter__(self) -> None:
        with self._changed:
            while self._forking:
                self._changed.wait()
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._calls -= 1
            if self._forking and not self._calls:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Hold new calls back and wait for those under way, each of which has its time limit."""
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: not self._calls, _LONGEST_WAIT_TO_FORK)

    def after_fork_in_parent(self) -> None:
        """Let calls go on."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


_gate = _ForkGate()
os.register_at_fork(
    before=_gate.before_fork,
    after_in_parent=_gate.after_fork_in_parent,
    after_in_child=_gate.reset,
)


class Caller:
    """Calls Cloud KMS within a time limit that holds for all attempts together."""

    def __init__(self, clients: PerProcess[Client], timeout: float) -> None:
        self.clients = clients
        self._timeout = timeout

    def call(
        self,
        doing: str,
        method: Callable[[Client], Callable[..., R]],
        request: object,
        deadline: float | None = None,
    ) -> R:
        """Call one method.

        Args:
            doing: What is asked for, such as ``"to sign"``.
            method: Picks the method of the client.
            request: The request's message.
            deadline: Moment on ``time.monotonic()``; None: the time limit alone.
        """
        until = time.monotonic() + self._timeout
        until = until if deadline is None else min(until, deadline)
        # Making the client looks for credentials, for which nobody has a time limit.
        client = self.clients.made_here() or within(until, self.clients.get)
        function = method(client)
        if getattr(client.transport, "kind", "") == "grpc":
            return self._attempts(doing, function, request, until)
        # Over REST a time limit bounds each wait for bytes and not the call.
        return within(until, lambda: self._attempts(doing, function, request, until))

    def _attempts(self, doing: str, function: Callable[..., R], request: object, until: float) -> R:
        for pause in (*_PAUSES, None):
            remaining = until - time.monotonic()
            if remaining <= 0:
                break
            try:
                # The SDK's own retry ignores `timeout`: it runs for a minute.
                with _gate:
                    return ask(doing, function, request=request, retry=None, timeout=remaining)
            except (SignerTimeout, SignerThrottled):
                raise
            except SignerUnavailable:
                if pause is None or time.monotonic() + pause >= until:
                    raise
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 (spreads load, no secret)
        raise no_time_left()


def read_uri(uri: str, endpoint: str | None) -> tuple[str, str, str | None, str | None]:
    """Read a key URI; ``endpoint`` wins over the URI's query.

    Returns:
        Resource name of the key ring, key, number of the version (or None), endpoint (or None).

    Raises:
        KeyUriError: Not the resource name of a key or a key version.
        ConfigurationError: The endpoint is not ``HOST[:PORT]``.
    """
    parsed = KeyUri.parse(uri, query_names=frozenset({"endpoint"}))
    name = _NAME.fullmatch(parsed.authority + parsed.path)
    if name is None:
        raise KeyUriError("The gcpkms: URI names no key.", hint=f"Write {_FORM}.")
    endpoint = endpoint or parsed.query.get("endpoint")
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigurationError("The Cloud KMS endpoint is not of the form HOST[:PORT].")
    return name.group(1), name.group(2), name.group(3), endpoint


def clients(
    endpoint: str | None, client: Client | Callable[[], Client] | None
) -> PerProcess[Client]:
    """The client of each process: the caller's, the caller's function's, or one of our own."""
    if isinstance(client, Client):
        return PerProcess(only_in_this_process(client, "Cloud KMS client"))
    if client is not None:
        return PerProcess(client)
    options = ClientOptions(api_endpoint=endpoint)
    return PerProcess(lambda: ask("to be set up", Client, client_options=options))

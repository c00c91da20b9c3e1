# SPDX-License-Identifier: Apache-2.0
"""Starting the children of `isolated`: one at a time for a token, never with a refused PIN.

A token counts wrong PINs and locks itself after a few. Children know nothing of each other, so here
is where the second one waits for what the first one's login comes to. One that ends or hangs in the
login leaves that open: the PIN may have been right, so it is sent once more, and then no further.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from d1_signer.backends.pkcs11.isolation.child import Host
from d1_signer.backends.pkcs11.isolation.wire import (
    ACCEPTED,
    DONE,
    GENERATE,
    LOGIN,
    OPEN,
    Gone,
    decoded_error,
    receive,
    send,
)
from d1_signer.backends.pkcs11.session.pin import read_pin, refused
from d1_signer.errors import (
    D1SignerError,
    LoginError,
    SecretSourceError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret, SecretSource
from d1_signer.signing import forks
from d1_signer.signing.backend import GeneratedKey
from d1_signer.signing.key_uri import without_secrets

T = TypeVar("T")

_SECONDS_TO_START = 10.0  # Python, the module and its login; then the child is taken as hung
_SECONDS_FOR_TURN = 60.0  # behind other signers on the token that are being opened
_UNANSWERED_RESENDS = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """What each child opens, and how many there are."""

    uri: str = field(repr=False)  # may hold a PIN
    location: str
    options: dict[str, Any]
    pin_source: SecretSource | None
    processes: int
    connections: int
    patience: float
    timeout: float | None
    kept_variables: tuple[str, ...]
    core_dumps: bool


@dataclass(frozen=True, slots=True)
class _Order(Generic[T]):
    """What a child is to do, how its answer is read, and how many seconds it has."""

    kind: bytes
    read: Callable[[dict[str, str]], T]
    limit: float


def _public_key(answer: dict[str, str]) -> PublicKey:
    return PublicKey.from_pem(answer["public_key"])


def _made(answer: dict[str, str]) -> GeneratedKey:
    return GeneratedKey(uri=answer["uri"], public_key=_public_key(answer))


class Opener:
    """Starts children that open, or make, one key."""

    def __init__(self, settings: HostSettings) -> None:
        """Read a prompt's PIN, once for all children.

        Raises:
            SecretSourceError: There is nobody to ask.
        """
        self._settings = settings
        self._prompted: Secret | None = None
        if settings.pin_source == "prompt":
            self._prompted = self._read("prompt")

    def open(self, timeout: float | None = None) -> tuple[Host, PublicKey]:
        """Start a child and have it open the key.

        Args:
            timeout: Seconds for it; None: a limit of our own.

        Raises:
            LoginError: The PIN was refused, now or before; then no child is started with it.
            D1SignerError: It cannot be opened; ``details["step"]`` names the step that failed.
        """
        return self._done(_Order(OPEN, _public_key, timeout or _SECONDS_TO_START))

    def generate(self, timeout: float) -> GeneratedKey:
        """Start a child, have it make the key, and let it end.

        Raises:
            D1SignerError: As of `d1_signer.backends.pkcs11.generate_key`.
        """
        forks.notice()
        try:
            host, made = self._done(_Order(GENERATE, _made, _SECONDS_TO_START + timeout))
        except SignerUnavailable as error:
            if "pkcs11" not in error.details:  # it is not the module that says why
                error.hint = "Look whether the key is there before you try again: it may be made."
            raise
        host.end()
        return made

    def _done(self, order: _Order[T]) -> tuple[Host, T]:
        # Errors are returned to here: what is raised below would have the PIN in its frames.
        done = self._ordered(order)
        if isinstance(done, D1SignerError):
            raise done
        return done

    def _ordered(self, order: _Order[T]) -> tuple[Host, T] | D1SignerError:
        pin = self._pin()
        mark = self._mark(pin)
        turn = _turns.setdefault(self._settings.location, threading.Lock())
        if not turn.acquire(timeout=_SECONDS_FOR_TURN):
            return _hung("module")
        try:
            if mark in refused:
                return LoginError(
                    "The token refused this PIN before; it is not tried again.",
                    hint="Correct it. Do not restart before: each start costs a try of this PIN.",
                    details={"step": "login"},
                )
            if _unanswered.get(mark, 0) > _UNANSWERED_RESENDS:
                return LoginError(
                    "The token gave no answer to the last logins with this PIN; it is not sent "
                    "again.",
                    hint="They may have counted as wrong tries. Check the token with the vendor's "
                    "tool, then restart the process.",
                    details={"step": "login"},
                )
            return self._started(order, pin, mark)
        finally:
            turn.release()

    def _pin(self) -> Secret | None:
        """The PIN; None where the URI holds it or there is none."""
        source = self._settings.pin_source
        if source is None:
            source = self._settings.options.get("pin_source")
        if source == "prompt":
            return self._prompted
        return None if source is None else self._read(source)

    def _read(self, source: SecretSource) -> Secret:
        try:
            return read_pin(source, without_secrets(self._settings.uri))
        except SecretSourceError as error:
            error.details["step"] = "login"
            raise

    def _mark(self, pin: Secret | None) -> bytes:
        """What stands for this PIN on this token, before anybody has asked for the token's name."""
        options = self._settings.options
        place = (options["module_path"], self._settings.location, str(options["user_type"]))
        return refused.digest("\0".join(place), pin or Secret(self._settings.uri))

    def _started(
        self, order: _Order[T], pin: Secret | None, mark: bytes
    ) -> tuple[Host, T] | D1SignerError:
        try:
            host = Host(
                self._settings.connections,
                kept_variables=self._settings.kept_variables,
                core_dumps=self._settings.core_dumps,
            )
        except OSError as failure:
            return not_started(str(failure))
        answer: T | D1SignerError | None = None
        try:
            answer = self._told(order, host, pin, mark)
        finally:
            if answer is None or isinstance(answer, D1SignerError):
                host.kill()
        return answer if isinstance(answer, D1SignerError) else (host, answer)

    def _told(
        self, order: _Order[T], host: Host, pin: Secret | None, mark: bytes
    ) -> T | D1SignerError:
        known = refused.export()
        limit = time.monotonic() + order.limit
        unanswered = _unanswered.get(mark, 0)
        try:
            host.control.settimeout(order.limit)
            send(host.control, order.kind, self._request(pin, known))
            answered, answer = self._answer(host, mark, limit)
            if answered == DONE:
                told = json.loads(answer)
                refused.merge(told["refused"])
                return order.read(told)
            error, more = decoded_error(answer)
            refused.merge(more["refused"])
        except TimeoutError:
            # All that was heard of it is whether it began to log in.
            return _hung("login" if _unanswered.get(mark, 0) > unanswered else "module")
        except Gone:
            return not_started("it has ended")
        except D1SignerError as failure:
            return failure
        except (ValueError, KeyError):
            return not_started("its answer is none")
        if isinstance(error, LoginError) and more["refused"]["digests"] != known["digests"]:
            refused.add(mark)
        return error

    def _answer(self, host: Host, mark: bytes, limit: float) -> tuple[bytes, bytes]:
        before = _unanswered.get(mark, 0)
        while True:
            host.control.settimeout(max(0.001, limit - time.monotonic()))
            answered, answer = receive(host.control, limit)
            if answered == LOGIN:
                _unanswered[mark] = before + 1
            else:
                before = 0
                _unanswered.pop(mark, None)
            if answered not in {LOGIN, ACCEPTED}:
                return answered, answer
            send(host.control, answered, b"")

    def _request(self, pin: Secret | None, known: dict[str, object]) -> bytes:
        """A file or a variable is read by the child itself, again where it has to log in anew."""
        request = {"uri": self._settings.uri, "options": self._settings.options, "refused": known}
        if pin is not None and self._settings.pin_source is not None:
            request["pin"] = pin.reveal()
        return json.dumps(request).encode()


# How many children in a row ended in the login with a PIN.
_unanswered: dict[bytes, int] = {}
_turns: dict[str, threading.Lock] = {}


def renew_turns_after_fork() -> None:
    """In the child of a fork: whoever has a turn is not here."""
    _turns.clear()


def not_started(reason: str) -> SignerUnavailable:
    """The error for a child that could not be started."""
    return SignerUnavailable(
        f"The process that hosts the PKCS#11 module does not start: {reason}.",
        hint="Check this user's process limits, and what it writes to standard error.",
        details={"step": "module"},
    )


def _hung(step: str) -> SignerTimeout:
    return SignerTimeout(
        "The PKCS#11 module did not open the key in time.",
        hint="Check the HSM and its connection.",
        details={"step": step},
    )

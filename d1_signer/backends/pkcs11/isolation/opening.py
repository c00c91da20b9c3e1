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
from dataclasses import dataclass, field
from typing import Any

from d1_signer.backends.pkcs11.isolation.child import Host
from d1_signer.backends.pkcs11.isolation.wire import (
    ACCEPTED,
    DONE,
    LOGIN,
    OPEN,
    Gone,
    decoded_error,
    receive,
    send,
)
from d1_signer.backends.pkcs11.session.pin import refused
from d1_signer.errors import (
    D1SignerError,
    LoginError,
    SecretSourceError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret, SecretSource, read_secret

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


class Opener:
    """Starts children that open one key."""

    def __init__(self, settings: HostSettings) -> None:
        """Read a prompt's PIN, once for all children.

        Raises:
            SecretSourceError: There is nobody to ask.
        """
        self._settings = settings
        self._prompted: Secret | None = None
        if settings.pin_source == "prompt":
            self._prompted = _read("prompt")

    def open(self) -> tuple[Host, PublicKey]:
        """Start a child and have it open the key.

        Raises:
            LoginError: The PIN was refused, now or before; then no child is started with it.
            D1SignerError: It cannot be opened; ``details["step"]`` names the step that failed.
        """
        # Errors are returned to here: what is raised below would have the PIN in its frames.
        opened = self._opened()
        if isinstance(opened, D1SignerError):
            raise opened
        return opened

    def _opened(self) -> tuple[Host, PublicKey] | D1SignerError:
        pin = self._pin()
        mark = self._mark(pin)
        turn = _turns.setdefault(self._settings.location, threading.Lock())
        if not turn.acquire(timeout=_SECONDS_FOR_TURN):
            return _hung()
        try:
            if mark in refused:
                return LoginError(
                    "The token refused this PIN before; it is not tried again.",
                    hint="Correct it; the same PIN is refused until the process is restarted.",
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
            return self._started(pin, mark)
        finally:
            turn.release()

    def _pin(self) -> Secret | None:
        """The PIN; None where the URI holds it or there is none."""
        source = self._settings.pin_source
        if source is None:
            source = self._settings.options.get("pin_source")
        if source == "prompt":
            return self._prompted
        return None if source is None else _read(source)

    def _mark(self, pin: Secret | None) -> bytes:
        """What stands for this PIN on this token, before anybody has asked for the token's name."""
        options = self._settings.options
        place = (options["module_path"], self._settings.location, str(options["user_type"]))
        return refused.digest("\0".join(place), pin or Secret(self._settings.uri))

    def _started(self, pin: Secret | None, mark: bytes) -> tuple[Host, PublicKey] | D1SignerError:
        try:
            host = Host(self._settings.connections)
        except OSError as failure:
            return not_started(str(failure))
        opened: PublicKey | D1SignerError | None = None
        try:
            opened = self._told_to_open(host, pin, mark)
        finally:
            if not isinstance(opened, PublicKey):
                host.kill()
        return (host, opened) if isinstance(opened, PublicKey) else opened

    def _told_to_open(
        self, host: Host, pin: Secret | None, mark: bytes
    ) -> PublicKey | D1SignerError:
        known = refused.export()
        limit = time.monotonic() + _SECONDS_TO_START
        try:
            host.control.settimeout(_SECONDS_TO_START)
            send(host.control, OPEN, self._request(pin, known))
            answered, answer = self._answer(host, mark, limit)
            if answered == DONE:
                opened = json.loads(answer)
                refused.merge(opened["refused"])
                return PublicKey.from_pem(opened["public_key"])
            error, more = decoded_error(answer)
            refused.merge(more["refused"])
        except TimeoutError:
            return _hung()
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
            answered, answer = receive(host.control)
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


def _read(source: SecretSource) -> Secret:
    try:
        return read_secret(source, what="PIN")
    except SecretSourceError as error:
        error.details["step"] = "login"
        raise


def _hung() -> SignerTimeout:
    return SignerTimeout(
        "The PKCS#11 module did not open the key in time.",
        hint="Check the HSM and its connection.",
        details={"step": "token"},
    )

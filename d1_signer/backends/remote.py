# SPDX-License-Identifier: Apache-2.0
"""Keys that a service over a network holds: what is the same for every such service.

The backend for another one is calls of its SDK, a table of its failures (`Service`), a client that
can be closed (`clients_of`), and what it says of a key's custody (`RemoteBackend`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, Protocol, TypeVar

from urllib3.exceptions import HTTPError

from d1_signer import frames
from d1_signer.custody.evidence import Fact
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    IntegrityError,
    SignerClosedError,
    SignerError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import Backend
from d1_signer.transport.deadlines import within
from d1_signer.transport.failures import failure_of, is_untrusted
from d1_signer.transport.processes import PerProcess

P = ParamSpec("P")
R = TypeVar("R")
G = TypeVar("G")

Meaning = tuple[type[D1SignerError], str]
Failures = Sequence[tuple[tuple[type[Exception], ...], type[D1SignerError], str]]
Details = dict[str, str | int | float]

_LONGEST_MESSAGE = 400
_PLAIN = bool | int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What a service is called, and what the failures of its SDK mean.

    Attributes:
        name: The service, as error texts name it.
        packages: Its SDK, named where a failure that is not in the table is to be reported.
        altered_hint: The hint where an answer is not the one to what was asked.
        failures: Classes of exceptions with the error and its hint; in this order: a class before
            the classes it derives from.
        refused: The error for an exception with which the service answered; None for others.
    """

    name: str
    packages: str
    altered_hint: str
    failures: Failures
    refused: Callable[[Exception, str], D1SignerError | None] = lambda _error, _doing: None

    def ask(self, doing: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the SDK and translate its failure; ``doing`` is such as ``"to sign"``.

        The SDK's exception is left behind altogether, also as a context: it, and the frames below,
        may hold the request with its credentials.
        """
        outer = sys.exception()
        try:
            return function(*args, **kwargs)
        except D1SignerError as error:
            failure = error.with_traceback(None)
        except Exception as error:
            if frames.of_signal_handler(error):
                frames.clear(error, outer=outer)
                raise
            failure = self.refused(error, doing) or self._not_asked(error, doing)
        except BaseException as error:  # such as a signal's handler raises
            frames.clear(error, outer=outer)
            raise
        failure.__context__ = None
        raise failure

    def _not_asked(self, error: Exception, doing: str) -> D1SignerError:
        name = type(error).__name__
        kind, hint = self.meaning(error)
        if not any(isinstance(link, HTTPError | OSError) for link in frames.causes(error)):
            return kind(
                f"{self.name} could not be asked {doing}: {name}.",
                hint=hint,
                details={"sdk_error": name},
            )
        failed = failure_of(error)
        details: Details = {"sdk_error": name, "stage": failed.stage.value}
        retryable, proxy = False if is_untrusted(error) else None, None
        if refused := failed.refused:
            kind, hint, retryable, proxy = (
                SignerUnavailable,
                refused.hint,
                refused.passes,
                refused.proxy,
            )
            details |= refused.details()
        return kind(
            f"{self.name} could not be asked {doing}: {failed.told(proxy)}.",
            hint=hint,
            retryable=retryable,
            details=details,
        )

    def meaning(self, error: Exception) -> Meaning:
        """The error and the hint for an exception, by the table."""
        for kinds, kind, hint in self.failures:
            if isinstance(error, kinds):
                return kind, hint
        return SignerError, f"Report it, with the versions of {self.packages}."

    def refusal(
        self, doing: str, code: object, message: str, meaning: Meaning, details: Details
    ) -> D1SignerError:
        """The error for a refusal: the service's code, and its message if printable and short."""
        kind, hint = meaning
        told = message.isprintable() and 0 < len(message) <= _LONGEST_MESSAGE
        text = f"{self.name} refused {doing}: {code}{f' ({message})' if told else ''}."
        return kind(text, hint=hint, details=details)

    def altered(self, what: str, details: Details | None = None) -> IntegrityError:
        """The error for an answer that is altered or not complete; ``what`` follows the name."""
        return IntegrityError(f"{self.name} {what}", hint=self.altered_hint, details=details)


class Client(Protocol):
    """What calls a service from one process."""

    def close(self) -> None:
        """Close the connections, unless they are those of a client that the caller gave."""
        ...


C = TypeVar("C", bound=Client)


def clients_of(
    given: G | Callable[[], G] | None, what: str, wrap: Callable[[G], C], make: Callable[[], C]
) -> PerProcess[C]:
    """The client of each process: the caller's, the caller's function's, or one of our own.

    Args:
        given: A client of the SDK, a function that makes one, or None.
        what: What it is, for error texts.
        wrap: Takes such a client, which stays the caller's.
        make: Makes one of our own.
    """
    if given is None:
        return PerProcess(make)
    owner = os.getpid()

    def get() -> C:
        if callable(given):
            return wrap(_made_by(given, what))
        if os.getpid() != owner:
            raise ConfigurationError(
                f"The {what} was given as an object, and this process was forked after that.",
                hint="Give a function that makes it: it is called once in each process.",
            )
        return wrap(given)

    return PerProcess(get)


def _made_by(function: Callable[[], G], what: str) -> G:
    made: G | None = None
    how = "gave none"
    try:
        made = function()
    except D1SignerError:
        raise
    except Exception as error:
        if frames.of_signal_handler(error):
            raise
        how = f"failed with {type(error).__name__}"
    # Only its type is told, and it is over here: it may quote credentials.
    if made is None:
        raise ConfigurationError(
            f"The function that gives the {what} {how}.",
            hint="It is yours, and called once in each process: try it by itself.",
        )
    return made


def _ready(clients: PerProcess[C], until: float) -> C:
    # Making it looks for credentials, for which nobody has a time limit.
    return clients.made_here() or within(until, clients.get)


@contextlib.contextmanager
def client_for(clients: PerProcess[C], seconds: float) -> Iterator[tuple[C, float]]:
    """A client to make a key with, closed afterwards, and the moment by which to be done."""
    until = time.monotonic() + seconds
    with contextlib.closing(_ready(clients, until)) as client:
        yield client, until


class RemoteBackend(Backend, Generic[C]):
    """A key in a service: opened and pinned once, then used by each process's own client."""

    def __init__(self, key: str, clients: PerProcess[C], timeout: float) -> None:
        """Read the public key, and pin it.

        Args:
            key: The key, as the service names it.
            clients: Gives the client of this process.
            timeout: Seconds for one call with all its attempts, and for the opening.
        """
        self._key = key
        self._clients = clients
        self._timeout = timeout
        self._closed = False
        try:
            pinned, self._public_key = self._open(*self._begin(None))
        except BaseException:
            self.close()
            raise
        logging.getLogger(type(self).__module__).info(
            "%s.opened key=%s thumbprint=%s", self.name, pinned, self._public_key.thumbprint()
        )

    @abstractmethod
    def _open(self, client: C, until: float) -> tuple[str, PublicKey]:
        """Ask for what never changes; what is pinned, as the log names it, and the public key."""

    def public_key(self) -> PublicKey:
        """The public key as it was when the backend was opened."""
        return self._public_key

    def _begin(self, deadline: float | None) -> tuple[C, float]:
        """The client of this process, and the moment by which its call must be over.

        Raises:
            SignerClosedError: After `close`.
            SignerTimeout: The client is not made in time.
        """
        if self._closed:
            raise SignerClosedError("The key is closed.")
        limit = time.monotonic() + self._timeout
        until = limit if deadline is None else min(limit, deadline)
        return _ready(self._clients, until), until

    def close(self) -> None:
        """Close the connections of this process, unless the client was given."""
        self._closed = True
        client = self._clients.made_here()
        if client is not None:
            client.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key}>"


def facts_of(source: str, told: Mapping[str, object]) -> list[Fact]:
    """What a service says of a key; None where it does not say."""
    return [
        Fact(name=name, value=value if isinstance(value, _PLAIN) else str(value), source=source)
        for name, value in told.items()
    ]

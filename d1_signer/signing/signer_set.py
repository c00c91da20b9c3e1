# SPDX-License-Identifier: Apache-2.0
"""Ordered signers, each with its kid: rotation and failover are one mechanism.

The first member that can sign does. To rotate: add the new key's signer behind the old one and
publish both keys (`SignerSet.jwks`), `promote` the new kid once D1 knows it, `remove` the old one.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NoReturn, TypeVar, final

from d1_signer.errors import (
    ConfigurationError,
    InvalidInputError,
    SignerClosedError,
    SignerError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.events import FailoverEvent, Observer, checked, notify
from d1_signer.frames import without_locals
from d1_signer.signing import forks
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.member import Member, MemberHealth
from d1_signer.signing.signer import Signer

_log = logging.getLogger("d1_signer.signer_set")
_T = TypeVar("_T")

_sets: weakref.WeakSet[SignerSet] = weakref.WeakSet()


@final
class SignerSet:
    """Ordered signers behind one face. Safe in threads and after fork; not picklable.

    Two members may have one kid if they have the same key: an HSM and its clone.
    """

    @without_locals  # a URI with a PIN may be given for a member, or for a kid below
    def __init__(
        self,
        members: Iterable[Signer | LazySigner],
        *,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over the members, first the active one; `close` closes them.

        Args:
            members: At least one.
            observers: Told of each member that failed, see `FailoverEvent`.
            clock: Seconds, never running backwards; times the rests of failing members.

        Raises:
            ConfigurationError: No member, or two different keys under one kid.
        """
        self._clock = clock
        self._members: tuple[Member, ...] = ()  # for the repr, should a step below fail
        self._observers = checked(observers)
        self._lock = threading.Lock()
        self._closed = False
        _sets.add(self)
        self._members = _members_of(members)
        _require_members(self._members)

    @property
    def kids(self) -> tuple[str, ...]:
        """Key identifiers in order, each once."""
        return tuple(dict.fromkeys(member.kid for member in self._members))

    def public_keys(self) -> tuple[PublicKey, ...]:
        """The public keys of all members, in order."""
        return tuple(member.source.public_key for member in self._members)

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The JWK Set of all members (RFC 7517 section 5), to register at D1."""
        keys = {member.kid: member.source.public_key for member in self._members}
        return {
            "keys": [
                {**key.jwk(), "kid": kid, "use": "sig", "alg": Signer.algorithm}
                for kid, key in keys.items()
            ]
        }

    def health(self) -> tuple[MemberHealth, ...]:
        """The state of each member, in order."""
        forks.notice()
        now = self._clock()
        return tuple(member.health(now) for member in self._members)

    def attempt(
        self,
        work: Callable[[Signer], _T],
        *,
        without: frozenset[str] = frozenset(),
        patience: Callable[[bool], float] | None = None,
    ) -> _T:
        """Do work with the first member that can.

        Args:
            work: Called with one signer after the other until it raises neither `SignerError` nor
                `ConfigurationError`.
            without: Kids that are not asked this time.
            patience: Asked before each member, and told whether another could follow: seconds to
                wait at most where it has to be opened first. None: as long as it takes.

        Returns:
            What ``work`` returned.

        Raises:
            SignerError: Of the first member that was asked, when none could do it.
            ConfigurationError: As above: that member's PIN or key file cannot be read.
            SignerUnavailable: All members rest after failures.
            SignerClosedError: The set is closed.
        """
        forks.notice()
        self._require_open()
        first: SignerError | ConfigurationError | None = None
        members = self._members
        for place, member in enumerate(members):
            if member.kid in without:
                continue
            # A rest spares callers the wait for a dead device while another can sign. A sole member
            # is always asked: its own error tells more, and its backend keeps from hammering it.
            ticket = object() if len(members) == 1 else member.admit(self._clock())
            if ticket is None:
                continue
            try:
                limit = None
                if patience is not None:
                    limit = patience(self._can_follow(members[place + 1 :], without))
                result = work(member.signer(limit))
            # A PIN file that cannot be read is one device's trouble, like a device that is down.
            except (SignerError, ConfigurationError) as error:
                error.details.setdefault("kid", member.kid)
                member.failed(ticket, error, self._clock())
                notify(self._observers, FailoverEvent(kid=member.kid, error=error.code))
                first = first or error
            except BaseException:
                member.released(ticket)
                raise
            else:
                member.succeeded()
                return result
        raise first.fresh() if first else self._all_resting(without)

    def _can_follow(self, members: tuple[Member, ...], without: frozenset[str]) -> bool:
        now = self._clock()
        return any(member.kid not in without and member.ready(now) for member in members)

    def _require_open(self) -> None:
        if self._closed:
            raise SignerClosedError("The SignerSet is closed.", hint="Make a new one.")

    def _all_resting(self, without: frozenset[str]) -> SignerUnavailable:
        states = [state for state in self.health() if state.kid not in without]
        rest = min((state.rests_for for state in states), default=0.0)
        codes = ", ".join(f"{state.kid}: {state.last_error or 'busy'}" for state in states)
        return SignerUnavailable(
            f"No signer is ready ({codes or 'none is left'}).",
            hint="They are tried again by themselves; look at the device or service.",
            details={"rests_for": round(rest, 3)},
        )

    @without_locals
    def add(self, member: Signer | LazySigner) -> None:
        """Add a signer behind all others.

        Raises:
            ConfigurationError: Another key stands under its kid.
            SignerClosedError: The set is closed.
        """
        forks.notice()
        with self._lock:
            self._require_open()
            members = (*self._members, *_members_of([member]))
            _require_members(members)
            self._members = members

    @without_locals
    def promote(self, kid: str) -> None:
        """Make the members of a kid the first to sign.

        Raises:
            InvalidInputError: No member has that kid.
        """
        forks.notice()
        with self._lock:
            chosen = self._of(kid)
            self._members = (*chosen, *(m for m in self._members if m not in chosen))

    @without_locals
    def remove(self, kid: str) -> None:
        """Take the members of a kid out and close them.

        Raises:
            InvalidInputError: No member has that kid, or no other is left.
        """
        forks.notice()
        with self._lock:
            chosen = self._of(kid)
            rest = tuple(member for member in self._members if member not in chosen)
            if not rest:
                raise InvalidInputError("The last kid of a SignerSet cannot be removed.")
            self._members = rest
        for member in chosen:
            member.source.close()

    def replace(self, members: Iterable[Signer | LazySigner]) -> tuple[Signer | LazySigner, ...]:
        """Have others be the members, in their order; one that was there keeps its state.

        Returns:
            The members from before. None of them is closed: a call under way may be using it.

        Raises:
            ConfigurationError: No member, or two different keys under one kid.
            SignerClosedError: The set is closed.
        """
        forks.notice()
        with self._lock:
            self._require_open()
            before = self._members
            known = {id(member.source): member for member in before}
            fresh = _members_of(members)
            _require_members(fresh)
            self._members = tuple(known.get(id(member.source), member) for member in fresh)
        return tuple(member.source for member in before)

    def _of(self, kid: str) -> tuple[Member, ...]:
        chosen = tuple(member for member in self._members if member.kid == kid)
        if not chosen:
            raise InvalidInputError(
                "No signer of the set has that kid.", hint=f"Known: {', '.join(self.kids)}."
            )
        return chosen

    def close(self) -> None:
        """Close all members; calling it again does nothing."""
        forks.notice()
        with self._lock:
            self._closed = True
        with ExitStack() as stack:  # one that fails to close does not keep the others open
            for member in reversed(self._members):
                stack.callback(member.source.close)

    def __enter__(self) -> SignerSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<SignerSet {', '.join(self.kids)}>"

    def __reduce__(self) -> NoReturn:
        msg = "a SignerSet cannot be pickled: open it where it is used"
        raise TypeError(msg)


def _members_of(sources: Iterable[Signer | LazySigner]) -> tuple[Member, ...]:
    sources = tuple(sources) if isinstance(sources, Iterable) else (sources,)
    if not all(isinstance(source, Signer | LazySigner) for source in sources):
        raise ConfigurationError(
            "A member of a SignerSet is neither a Signer nor a LazySigner.",
            hint="Write SignerSet([open_signer(uri, kid=…), …]).",
        )
    return tuple(Member(source) for source in sources)


def _require_members(members: tuple[Member, ...]) -> None:
    if not members:
        raise ConfigurationError("A SignerSet needs at least one signer.")
    keys: dict[str, PublicKey] = {}
    for member in members:
        key = member.source.public_key
        if keys.setdefault(member.kid, key) != key:
            raise ConfigurationError(
                f"Two different keys stand under the kid {member.kid!r}.",
                hint="Give each key a kid of its own; only clones of one key share it.",
            )


def _after_fork_in_child() -> None:
    # The threads that held a lock are not here.
    for signers in list(_sets):
        signers._lock = threading.Lock()  # noqa: SLF001 (this module's own class)


forks.in_child(_after_fork_in_child)

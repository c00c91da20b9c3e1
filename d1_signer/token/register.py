# SPDX-License-Identifier: Apache-2.0
"""What the processes of a fleet tell of themselves through its store, and who reads it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from d1_signer.errors import StoreUnavailable
from d1_signer.token.bounded import BoundedStore
from d1_signer.token.d1 import MAX_TOKEN_LIFETIME, Environment
from d1_signer.token.stores import VERSION, Register, Sealer, SharedToken, TokenStore
from d1_signer.transport.processes import PerProcess

# Seconds: a process that is called renews, or takes another's token, before a token's life is over.
_LIFE = float(MAX_TOKEN_LIFETIME)
_LONGEST = 2.0
_LATEST = 2.0**33  # a moment of this calendar
_GRACE = 1.0

About = Callable[[], Mapping[str, object]]


def name_of(issuer_id: str, environment: Environment) -> str:
    """The name under which a fleet shares its token."""
    # A store is often shared with others, who need not read who our issuer is.
    whose = f"{VERSION}\0{issuer_id}\0{environment.base_url}"
    return f"d1-signer:{{{hashlib.sha256(whose.encode()).hexdigest()[:32]}}}"


class Announcer:
    """Tells the fleet's store of this process, where it keeps such things."""

    def __init__(self, store: TokenStore, sealer: Sealer, name: str, about: About) -> None:
        """Nothing is told yet.

        Args:
            store: The fleet's.
            sealer: Seals what is told.
            name: The fleet's.
            about: What there is to tell.
        """
        self._register = store if isinstance(store, Register) else None
        self._store = BoundedStore(store)
        self._sealer, self._name, self._about = sealer, name, about
        # A parent's thread is not here, and waiting for it would raise.
        self._threads: PerProcess[list[threading.Thread]] = PerProcess(list)
        # What is told last is what is true last: a renewal's thread and a reload tell at once.
        self._telling = PerProcess(threading.Lock)
        self._told_by: int | None = None  # the process that has something to take back

    def begin(self) -> None:
        """Tell it in a thread of its own, for which no renewal waits."""
        if self._register is None:
            return
        thread = threading.Thread(target=self.tell, name="d1-signer-announcing", daemon=True)
        with contextlib.suppress(RuntimeError):  # the limit of threads; the next renewal tells it
            thread.start()
            self._threads.get()[:] = [thread]

    def close(self) -> None:
        """Wait for what is being told, a second at most, and take it back."""
        for thread in self._threads.get():
            thread.join(_GRACE)
        register = self._register
        if register is not None and self._told_by == os.getpid():
            self._told_by = None
            # It is forgotten by itself, if later.
            with contextlib.suppress(StoreUnavailable):
                self._store.use(
                    lambda: register.withdraw(self._name), deadline=time.monotonic() + _LONGEST
                )

    def tell(self) -> None:
        """Tell it; a store that cannot take it now is told at the next renewal."""
        register = self._register
        if register is None:
            return
        with self._telling.get():
            facts = {
                "member": register.member,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "at": round(time.time(), 3),
                **self._about(),
            }
            sealed = self._sealer.seal_member(facts)
            self._told_by = os.getpid()
            # The renewal itself tells of a store that is away.
            with contextlib.suppress(StoreUnavailable):
                self._store.use(
                    lambda: register.announce(self._name, sealed, life=_LIFE),
                    deadline=time.monotonic() + _LONGEST,
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What a fleet's store holds, at one moment.

    Attributes:
        token: The shared token; None where there is none, or it cannot be read.
        token_life: Seconds for which the store keeps it; None where there is none.
        unreadable: How many of token and announcements were not sealed with this key, or tell what
            this release does not know.
        lease: Who holds the lease, by the name of its process, and the seconds that are left;
            ``inf`` where it does not end.
        processes: What each process has told of itself last.
    """

    token: SharedToken | None
    token_life: float | None
    unreadable: int
    lease: tuple[str, float] | None
    processes: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, store: TokenStore, sealer: Sealer, name: str) -> Fleet:
        """Ask a store.

        Raises:
            StoreUnavailable: It does not answer.
        """
        bounded, deadline = BoundedStore(store), time.monotonic() + 4 * _LONGEST
        found = bounded.load(name, deadline=deadline)
        token = None if found is None else sealer.open(found[0])
        lease, told = None, list[dict[str, Any] | None]()
        if isinstance(store, Register):
            lease = bounded.use(lambda: store.holder(name), deadline=deadline)
            sealed = bounded.use(lambda: store.members(name), deadline=deadline)
            told = [_read(sealer.open_member(each)) for each in sealed]
        read = sorted(filter(None, told), key=lambda each: each["at"])
        last = {each["member"]: each for each in read}.values()
        processes = sorted(last, key=lambda each: (each["host"], each["pid"]))
        return cls(
            token=token,
            token_life=None if found is None else found[1],
            unreadable=told.count(None) + (found is not None and token is None),
            lease=lease,
            processes=tuple(processes),
        )


def _read(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a process has told, if it is what `Announcer` tells; another release may tell more."""
    if facts is None:
        return None
    match facts:
        case {
            "member": str(),
            "host": str(),
            "pid": int(),
            "at": float(at) | int(at),
            "settings": str() | None,
            "kids": list(kids),
            "certificate": str() | None,
        } if 0 <= at <= _LATEST and _all_text(kids) and _all_text(facts.get("away", [])):
            return {"away": [], **facts}  # an earlier release does not tell of keys
    return None


def _all_text(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)

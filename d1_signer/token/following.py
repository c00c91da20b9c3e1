# SPDX-License-Identifier: Apache-2.0
"""Following a file of settings: looked at in passing, read again where it has changed.

A file that cannot be used keeps what was good last, with one warning. No thread watches: whoever
asks for a token looks, every few seconds at most, and what there is to do is done in a thread of
its own, for opening a key may take long.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    FetcherClosedError,
    TokenError,
)
from d1_signer.events import Observer, checked
from d1_signer.frames import without_locals
from d1_signer.logfmt import told
from d1_signer.secret import shown_path
from d1_signer.signing import forks
from d1_signer.token.opening import Keys, Opening
from d1_signer.token.settings import Settings
from d1_signer.token.status import SettingsStatus

_log = logging.getLogger("d1_signer.settings")

LOOK_INTERVAL = 2.0
"""Seconds between two looks at the file."""

# Seconds until what could not be taken is tried again though the file is the same: a key's device
# may be back, or the file of a certificate be there.
_TRY_AGAIN = 15.0

# Seconds for which a file has not changed, before it is read in passing. Half of one that is
# written in its place may be valid; and file systems tell two changes within a second apart as
# little as one, at worst.
_REST = 1.0
_GRACE = 1.0

# Another D1, another issuer or another store is another fetcher.
_FIXED = (
    "environment",
    "issuer_id",
    "proxy",
    "proxy_credentials_source",
    "store",
    "audit_trail",
    "audit_origin",
    "audit_key",
)

Take = Callable[[Settings, Keys], None]


class Following:
    """One file, what it said when it was taken last, and what that has opened. Thread-safe.

    Attributes:
        settings: What is used.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        opening: Opening,
        settings: Settings,
        seen: tuple[Any, ...],
    ) -> None:
        """Follow a file.

        Args:
            file: Its path.
            opening: What its settings open.
            settings: What it said.
            seen: What `state_of` said before it was read: what is written meanwhile is a change.
        """
        self._file = os.path.abspath(os.fspath(file))  # noqa: PTH100 (of text or bytes)
        self._opening = opening
        self.settings = settings
        self._seen = seen
        self._away: tuple[str, ...] = ()
        self._taken_at = time.time()
        # Kids, and names whose values the last change has changed; for the log.
        self._kids: tuple[str, ...] = ()
        self._changed: tuple[str, ...] | None = None
        self._error: D1SignerError | None = None
        # When the last of the renewals is over that began with what was used before.
        self._busy_until = time.monotonic()
        self._next_look = self._next_try = 0.0
        self._take: Take | None = None
        self._announce: Callable[[], None] = lambda: None
        self.begin_without_thread()
        _all.add(self)

    def begin_without_thread(self) -> None:
        """In a forked child: the parent's lock and thread are not ours."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, keys: Keys, take: Take, announce: Callable[[], None]) -> None:
        """Look from now on.

        Args:
            keys: What was opened first.
            announce: Tells others what is used now.
            take: Has settings serve from now on, all of them; or raises and changes nothing.
        """
        self._take, self._announce = take, announce
        self._serve(keys)
        self._told()

    def status(self) -> SettingsStatus:
        """What is used, and what is wrong with the file now."""
        error = self._error
        return SettingsStatus(
            file=shown_path(self._file),
            digest=self.settings.digest,
            taken_at=self._taken_at,
            error=None if error is None else error.code,
            message=None if error is None else error.message,
            keys_away=self._away,
        )

    def look(self) -> None:
        """Have the file read again where it has changed; every few seconds at most.

        Waits for no thread and no key, but for one ``stat``, which the caller makes.
        """
        now = time.monotonic()
        if now < self._next_look or self._take is None:
            return
        self._next_look = now + LOOK_INTERVAL
        state = state_of(self._file)
        pending = now >= self._next_try and (self._error is not None or self._away)
        # What is still being written is left alone until it rests.
        due = (pending or state != self._seen) and rests(state)
        if not due and not self._opening.has_left():
            return
        forks.notice()
        if self._lock.acquire(blocking=False):
            try:
                self._opening.close_left()
                if due and self._thread is None:
                    self._start()
            finally:
                self._lock.release()

    def _start(self) -> None:
        thread = threading.Thread(target=self._in_passing, name="d1-signer-settings", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the limit of threads; the next look tries again
            self._thread = None

    def _in_passing(self) -> None:
        try:
            with suppress(D1SignerError):  # told by the log and the status
                self.reload()
        finally:
            self._thread = None

    @without_locals
    def reload(self) -> None:
        """Read the file, and take what it says.

        Raises:
            D1SignerError: It cannot be used; what was good last is used on.
        """
        forks.notice()
        with self._lock:
            try:
                self._require_open()
                self._reload()
            finally:
                if self._take is None:  # closed meanwhile: what was opened since goes as well
                    self._opening.close()

    def _require_open(self) -> Take:
        take = self._take
        if take is None:
            raise FetcherClosedError("The token fetcher is closed.")
        return take

    def _reload(self) -> None:
        seen = state_of(self._file)
        known, self._changed = self._error, ()
        try:
            changed = self._renew()
        except FetcherClosedError:
            raise
        except D1SignerError as error:
            self._failed(error.fresh(), known)
            raise
        except Exception as error:  # noqa: BLE001 (a plug-in of a key may raise anything)
            failure = TokenError(f"The settings cannot be taken ({type(error).__name__}).")
            self._failed(failure, known)
            raise failure from None
        finally:
            # A change within the same tick of the file system's clock would not be seen.
            self._seen = seen if rests(seen) else ()
            self._next_try = time.monotonic() + _TRY_AGAIN
        self._error = None
        if changed or known is not None:
            self._taken_at = time.time()
            self._told()
            self._announce()

    def _failed(self, error: D1SignerError, known: D1SignerError | None) -> None:
        self._error = error
        if known is None or str(known) != str(error):
            message = f"{error} The last good settings are used on."
            facts = {"file": shown_path(self._file), "code": error.code, "message": message}
            _log.warning("settings.unusable %s", told(facts))

    def _renew(self) -> bool:
        settings = Settings.read(self._file, complete=True)
        if settings == self.settings and not self._away:
            return False
        for name in _FIXED:
            if getattr(settings, name) != getattr(self.settings, name):
                raise ConfigurationError(
                    f"{name} has changed in the settings, which needs a new fetcher.",
                    hint="Start the process anew for it, or put the old value back.",
                )
        before = self.settings
        keys = self._opening.keys(settings)
        if settings == before and keys.away == self._away:
            return False
        take = self._require_open()  # opening may have taken long
        try:
            take(settings, keys)
        except BaseException:
            self._opening.leave(before, until=self._busy_until)
            raise
        self.settings = settings
        self._serve(keys)
        names = (field.name for field in fields(settings) if field.compare)
        self._changed = tuple(n for n in names if getattr(settings, n) != getattr(before, n))
        self._busy_until = max(self._busy_until, time.monotonic() + before.limits.total)
        self._opening.leave(settings, until=self._busy_until)
        return True

    def _serve(self, keys: Keys) -> None:
        self._opening.taken(keys)
        self._away = keys.away
        self._kids = tuple(signer.kid for signer in keys.signers)

    def _told(self) -> None:
        facts: dict[str, object] = {
            "file": shown_path(self._file),
            "digest": self.settings.digest,
            "issuer": self.settings.issuer_id,
            "kids": ",".join(self._kids),
            "away": len(self._away),
        }
        if self._changed is not None:
            facts["changed"] = ",".join(self._changed) or "none"
        _log.info("settings.taken %s", told(facts))

    def close(self) -> None:
        """Follow no more, and close what was opened.

        A change under way, which may hang in a device, closes it when it ends.
        """
        forks.notice()
        self._take = None
        if self._lock.acquire(timeout=_GRACE):
            try:
                self._opening.close()
            finally:
                self._lock.release()


@contextmanager
def opened(
    file: str | os.PathLike[str], observers: Sequence[Observer]
) -> Iterator[tuple[Following, Keys]]:
    """Read a file of settings and open what it names; closed again where the block fails.

    Args:
        file: Its path.
        observers: Told of each signature.

    Raises:
        ConfigurationError: It cannot be used.
        SignerError: No key can be opened.
    """
    seen = state_of(file)
    settings = Settings.read(file, complete=True)
    opening = Opening(settings, checked(observers))
    try:
        keys = opening.keys(settings, first=True)
        yield Following(file, opening, settings, seen if rests(seen) else ()), keys
    except BaseException:
        opening.close()
        raise


def state_of(path: str | os.PathLike[str]) -> tuple[Any, ...]:
    """What tells whether a file has changed."""
    try:
        found = os.stat(path)  # noqa: PTH116 (a path comes as it was given)
    except (OSError, ValueError) as error:
        return (type(error).__name__,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def rests(state: tuple[Any, ...]) -> bool:
    """Whether a file has not been changed just now, by what `state_of` said of it."""
    if len(state) == 1:  # it is not there
        return True
    changed_at = state[-1] / 1e9
    return not 0 <= time.time() - changed_at < _REST


_all: weakref.WeakSet[Following] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for following in list(_all):
        following.begin_without_thread()


forks.in_child(_after_fork_in_child)

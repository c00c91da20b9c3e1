# SPDX-License-Identifier: Apache-2.0
"""The trail of a process: what it begins, ends and notes goes into an instance of its own.

A signer that is given a trail asks it before its backend is asked: no signature without a record.
Use::

    hsm = "module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/d1/pin"
    sealing = open_signer(f"pkcs11:token=bank;object=audit?{hsm}")
    trail = AuditTrail("/var/lib/d1/audit", origin="bank.example/d1", checkpoint_signer=sealing)
    signer = open_signer(f"pkcs11:token=bank;object=d1?{hsm}", trail=trail)
    print(trail.verifier_key())  # what the auditor is given
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Self, TypeVar, final

from d1_signer.audit.instance import Instance, Unusable, open_instance
from d1_signer.audit.note import is_name
from d1_signer.audit.process import Here, TrailStatus
from d1_signer.audit.sealing import CheckpointSigner, Sealer, checkpoint_key, drop_torn_checkpoint
from d1_signer.errors import AuditError, AuditUnavailable, ConfigurationError
from d1_signer.es256 import PublicKey
from d1_signer.events import Recordable
from d1_signer.frames import without_locals
from d1_signer.secret import shown_path

_log = logging.getLogger("d1_signer.audit")
_T = TypeVar("_T")

_LONGEST = 86_400.0  # seconds that anything here may wait
_MOST_NAMED = 100  # of the instances that are left alone


class _Begun(NamedTuple):
    instance: Instance
    number: int


@final
class AuditTrail:
    """Records every use of the keys whose signers it is given to. Safe in threads and after fork.

    Attributes:
        folder: Where the instance folders are.
        origin: Whose records these are; the name of the checkpoints' key.
    """

    @without_locals  # a URI with a PIN may be given for the signer
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        origin: str,
        checkpoint_signer: CheckpointSigner | None = None,
        sync: str = "group",
        on_failure: str = "refuse",
        timeout: float = 10.0,
        seal_records: int = 1024,
        seal_seconds: float = 60.0,
        segment_bytes: int = 64 << 20,
    ) -> None:
        """Make the folder where it is not; an instance is opened by the first record.

        Args:
            folder: A folder on a local disk, for this trail alone.
            origin: Whose records these are, such as ``bank.example/d1``: no blank, no plus sign.
            checkpoint_signer: Seals the records, by a key of its own; stays the caller's, who
                closes it after the trail. None: nothing is sealed.
            sync: ``"group"``: a record is on the disk before its signature is asked for, one sync
                for all threads that wait. ``"none"``: it is the system's, which a crash of this
                process does not lose and one of the machine may.
            on_failure: ``"refuse"``: no signature without a record. ``"continue"``: it is made,
                warned of, and counted in the next record that can be written.
            timeout: Seconds to wait for a record at most; the caller's own limit counts as well.
            seal_records: Records that are sealed together at most.
            seal_seconds: Seconds that a record waits for its seal at most.
            segment_bytes: Size of a file of records from which on another one is begun.

        Raises:
            ConfigurationError: A setting is none, or the signer may not seal this trail.
            AuditUnavailable: The folder cannot be made.
        """
        self.origin = origin  # for the repr in a crash report, should a step below fail
        if not isinstance(folder, str | os.PathLike):
            raise ConfigurationError("The folder of the audit trail is not a path.")
        self.folder = Path(folder).absolute()
        if not isinstance(origin, str) or not is_name(origin):
            raise ConfigurationError(
                "The origin of the audit trail is not a name: it has a blank or a plus sign, or "
                "is empty.",
                hint="Write it like an address without scheme: bank.example/d1.",
            )
        if sync not in {"group", "none"} or on_failure not in {"refuse", "continue"}:
            raise ConfigurationError(
                "sync is neither group nor none, or on_failure neither refuse nor continue."
            )
        limits: tuple[object, ...] = (timeout, seal_records, seal_seconds, segment_bytes)
        if not all(isinstance(limit, int | float) and limit > 0 for limit in limits) or not (
            timeout <= _LONGEST and seal_seconds <= _LONGEST
        ):
            raise ConfigurationError(
                "A limit of the audit trail is not a number above 0, or is more than a day."
            )
        self._signer = checkpoint_signer
        self._key = None if checkpoint_signer is None else checkpoint_key(origin, checkpoint_signer)
        self._group = sync == "group"
        self._refuse = on_failure == "refuse"
        self._timeout = timeout
        self._seal_records, self._seal_seconds = seal_records, seal_seconds
        self._segment_bytes = segment_bytes
        self._closed = False
        self._processes: dict[int, Here] = {}
        try:
            self.folder.mkdir(0o750, exist_ok=True)
        except OSError as error:
            raise self._unavailable(error) from None

    def begin(
        self, action: str, about: Mapping[str, Recordable], *, deadline: float | None = None
    ) -> object:
        """Record that something is about to be done; it may be done when this returns.

        Args:
            action: What, such as ``"sign"``.
            about: What is known of it.
            deadline: Moment on ``time.monotonic()`` until which to wait for the disk.

        Returns:
            What `end` takes.

        Raises:
            AuditUnavailable: It cannot be recorded in time, so it must not be done.
            InvalidInputError: It does not fit into a record.
        """
        return self._recorded("begin", {**about, "action": action}, deadline)

    def end(
        self, begun: object, outcome: str, about: Mapping[str, Recordable] | None = None
    ) -> None:
        """Record how it ended.

        Args:
            begun: What `begin` returned.
            outcome: ``"done"``, or the code of an error.
            about: What is known of it by now.

        Raises:
            AuditUnavailable: It cannot be recorded, so its result must not be used.
        """
        if not isinstance(begun, _Begun):
            return  # it was begun without a record
        members = {**(about or {}), "begin": begun.number, "outcome": outcome}
        self._attempt(lambda: self._append_end(begun, members))

    def note(self, event: str, about: Mapping[str, Recordable]) -> None:
        """Record something that is no use of a key.

        Raises:
            AuditUnavailable: It cannot be recorded.
        """
        self._recorded(event, about, None)

    def watch(self, public_key: PublicKey) -> None:
        """Refuse to record the uses of the key that seals.

        Raises:
            ConfigurationError: It is that key.
        """
        if self._key is not None and self._key.public_key == public_key:
            raise ConfigurationError(
                "The key that is to be recorded is the one that seals the audit trail.",
                hint="Give checkpoint_signer a key of its own; make one with generate-key.",
            )

    def verifier_key(self) -> str:
        """What verifiers are given: ``NAME+HHHHHHHH+BASE64`` (c2sp.org/signed-note, type 0x02).

        Raises:
            ConfigurationError: The trail has no checkpoint signer.
        """
        if self._key is None:
            raise ConfigurationError(
                "The audit trail has no checkpoint signer, so there is no key to verify with.",
                hint="Give AuditTrail a checkpoint_signer; on the command line, set D1_AUDIT_KEY.",
            )
        return str(self._key)

    def seal(self) -> bool:
        """Seal this process's records now; tells whether there was something to seal.

        Raises:
            AuditUnavailable: The checkpoint cannot be written.
            D1SignerError: The checkpoint signer cannot sign.
        """
        here = self._processes.get(os.getpid())
        if here is None or here.sealer is None:
            return False
        try:
            return here.sealer.seal()
        except OSError as error:
            raise self._unavailable(error) from None

    def status(self) -> TrailStatus:
        """How this process's part of the trail is; for health checks, cheap and without a wait."""
        return self._here().status()

    def close(self) -> None:
        """Seal what is not sealed and give the instance back; calling it again does nothing.

        A seal that fails is told in the log, and made up by whoever goes on with the instance.
        """
        here = self._processes.get(os.getpid())
        if here is not None and not self._closed:
            with here.lock:
                self._let_go(here)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AuditTrail {self.origin}>"

    def __reduce__(self) -> NoReturn:
        msg = "an AuditTrail cannot be pickled: make it where it is used"
        raise TypeError(msg)

    def _recorded(
        self, event: str, members: Mapping[str, Recordable], deadline: float | None
    ) -> _Begun | None:
        until = time.monotonic() + self._timeout
        return self._attempt(
            lambda: self._append(
                event, members, until if deadline is None else min(until, deadline)
            )
        )

    def _attempt(self, work: Callable[[], _T]) -> _T | None:
        """Do it, with another instance where this one has become unusable."""
        if self._closed:
            raise AuditError(
                "The audit trail is closed.", hint="Close it after the signers that it is given to."
            )
        try:
            try:
                return work()
            except Unusable:
                return work()
        except (OSError, Unusable) as error:
            failure = self._unavailable(error)
        if self._refuse:
            raise failure
        self._here().missed += 1
        _log.error("audit.without_record %s", failure.message)
        return None

    def _append(self, event: str, members: Mapping[str, Recordable], until: float) -> _Begun:
        here = self._here()
        instance = self._instance(here)
        if here.missed:
            instance.append("gap", {"missed": (missed := here.missed)})
            here.missed -= missed
        number = instance.append(event, members)
        if self._group:
            self._commit(instance, number, until)
        if here.sealer is not None:
            here.sealer.notice(number + 1)
        return _Begun(instance, number)

    def _commit(self, instance: Instance, number: int, until: float) -> None:
        try:
            instance.commit(until)
        except OSError as error:
            with contextlib.suppress(OSError, Unusable):  # a begin without an end says the same
                instance.append("end", {"begin": number, "outcome": AuditUnavailable.code})
            if isinstance(error, TimeoutError):
                raise OSError(error.errno, "the disk does not take it in time") from None
            raise

    def _append_end(self, begun: _Begun, members: dict[str, Recordable]) -> None:
        instance = self._instance(self._here())
        if instance is not begun.instance:
            members["instance"] = begun.instance.path.name
        instance.append("end", members)

    def _here(self) -> Here:
        # No lock: a child must not touch one that its parent may have held, and this is atomic.
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, Here())

    def _instance(self, here: Here) -> Instance:
        """The instance of this process; opened where there is none that can be used."""
        instance = here.instance
        if instance is not None and not instance.unusable:
            return instance
        with here.lock:
            instance = here.instance
            if instance is not None and not instance.unusable:
                return instance
            if here.opening:
                raise OSError(None, "a signal handler asks for a record while the trail is opened")
            here.opening = True
            try:
                return self._opened(here)
            finally:
                here.opening = False

    def _opened(self, here: Here) -> Instance:
        for pid, other in list(self._processes.items()):
            if other is not here and other.instance is not None:
                del self._processes[pid]
                other.instance.leave_to_parent()
        if here.instance is not None:
            self._let_go(here)
        instance, left = open_instance(self.folder, self._segment_bytes)
        try:
            about: dict[str, Recordable] = {
                "instance": instance.path.name,
                "origin": self.origin,
                "on_failure": "refuse" if self._refuse else "continue",
                "sync": "group" if self._group else "none",
            }
            if self._key is not None:
                about["sealed_by"] = self._key.key_id.hex()
            if left:
                about["left_alone"] = left[:_MOST_NAMED]
            if torn := drop_torn_checkpoint(instance.path):
                about["torn_checkpoint"] = torn
            instance.append("opened", about)
            if self._signer is not None and self._key is not None:
                here.sealer = Sealer(
                    instance,
                    self._signer,
                    self._key,
                    records=self._seal_records,
                    seconds=self._seal_seconds,
                )
        except BaseException:
            instance.close()
            raise
        here.use(instance)
        return instance

    def _let_go(self, here: Here) -> None:
        instance, here.instance = here.instance, None
        sealer, here.sealer = here.sealer, None
        if sealer is not None:
            sealer.stop()
        if instance is None:
            return
        try:
            if not instance.unusable:
                try:
                    instance.append("closed", {})
                    instance.sync()
                except (OSError, Unusable) as error:
                    _log.warning("audit.close_not_recorded %s", error)
                if sealer is not None:
                    sealer.attempt()
        finally:
            instance.close()

    def _unavailable(self, error: OSError | Unusable) -> AuditUnavailable:
        reason = (
            "its files are gone" if isinstance(error, Unusable) else error.strerror or str(error)
        )
        return AuditUnavailable(
            f"The audit trail in {shown_path(self.folder)} cannot take a record: {reason}.",
            hint="Nothing is signed without one. Look at the folder, its permissions and the free "
            "space; the next signature tries again.",
        )

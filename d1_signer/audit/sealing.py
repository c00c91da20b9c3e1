# SPDX-License-Identifier: Apache-2.0
"""Sealing: another key signs what the tree is, now and then, beside the signatures it records.

Sealing may fail and is made up; appending may not. What is not sealed yet can be altered unseen.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from d1_signer.audit import folder, stored
from d1_signer.audit.instance import Instance
from d1_signer.audit.note import Checkpoint, SignedNote, VerifierKey
from d1_signer.audit.recovery import recover
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.es256 import PublicKey
from d1_signer.frames import of_signal_handler

_log = logging.getLogger("d1_signer.audit")

_PATIENCE = 30.0  # seconds for one signature under a checkpoint


class CheckpointSigner(Protocol):
    """What signs checkpoints; a `Signer` does."""

    @property
    def public_key(self) -> PublicKey:
        """Its public key."""
        ...

    def sign(self, message: bytes, *, timeout: float | None = None) -> bytes:
        """Sign with ES256; 64 bytes, r||s."""
        ...


def instance_line(path: Path) -> str:
    """The line of a checkpoint that names the tree: each instance has one of its own."""
    return f"instance {path.name}"


def seal(instance: Instance, signer: CheckpointSigner, key: VerifierKey) -> bool:
    """Seal all records of an instance.

    Returns:
        Whether there was something to seal.

    Raises:
        D1SignerError: The checkpoint cannot be signed.
        OSError: The records or the checkpoint cannot be made durable.
    """
    size, root = instance.snapshot()
    if size == instance.sealed:
        return False
    text = Checkpoint(key.name, size, root, (instance_line(instance.path),)).text()
    raw = signer.sign(text.encode(), timeout=_PATIENCE)
    key.public_key.verify(raw, text.encode())
    note = SignedNote(text, (key.signature(raw),)).encode()
    folder.append(instance.path / folder.CHECKPOINTS, note)
    instance.sealed = size
    return True


def drop_torn_checkpoint(path: Path) -> int:
    """Cut off what stands behind the last whole checkpoint; tells how many bytes that was."""
    torn = stored.torn_checkpoint(path)
    if torn:
        folder.cut(path / folder.CHECKPOINTS, torn)
    return torn


def checkpoint_key(origin: str, signer: CheckpointSigner) -> VerifierKey:
    """The key that an origin's checkpoints are verified with.

    Raises:
        ConfigurationError: The signer is none, or its own uses are recorded.
    """
    public_key = getattr(signer, "public_key", None)
    if not isinstance(public_key, PublicKey) or not callable(getattr(signer, "sign", None)):
        raise ConfigurationError(
            "checkpoint_signer is not a Signer.", hint="Write checkpoint_signer=open_signer(uri)."
        )
    if getattr(signer, "trail", None) is not None:
        raise ConfigurationError(
            "The checkpoint signer has an audit trail itself.",
            hint="Open it without trail=: sealing a trail would be recorded, and sealed, for ever.",
        )
    return VerifierKey(origin, public_key)


class Sealer:
    """Seals an instance in a thread of its own, every so many records or seconds."""

    def __init__(
        self,
        instance: Instance,
        signer: CheckpointSigner,
        key: VerifierKey,
        *,
        records: int,
        seconds: float,
    ) -> None:
        """Start sealing; `stop` ends it."""
        self._instance = instance
        self._signer = signer
        self._key = key
        self._records = records
        self._seconds = seconds
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._asked = instance.sealed
        self._sealing = threading.Lock()
        try:
            threading.Thread(target=self._run, name="d1-signer-sealing", daemon=True).start()
        except RuntimeError:
            _log.warning("audit.seal_failed no thread can be started: sealed when it is closed")

    def notice(self, size: int) -> None:
        """Seal soon where enough records have come together."""
        if size - self._asked >= self._records:
            self._asked = size
            self._queue.put("seal")

    def seal(self) -> bool:
        """Seal now; see `seal`."""
        with self._sealing:
            return seal(self._instance, self._signer, self._key)

    def stop(self) -> None:
        """Let the thread end."""
        self._queue.put("stop")

    def _run(self) -> None:
        asked = ""
        while asked != "stop" and not self._instance.unusable:
            with contextlib.suppress(Empty):
                asked = self._queue.get(timeout=self._seconds)
            if asked != "stop":
                self.attempt()

    def attempt(self) -> bool:
        """Seal now; a failure is told in the log, and made up by the next time."""
        try:
            return self.seal()
        except D1SignerError as error:
            _log.warning("audit.seal_failed code=%s %s", error.code, error.message)
        except OSError as error:
            _log.warning("audit.seal_failed %s", error.strerror)
        except Exception as error:  # of a signer that is not ours
            if of_signal_handler(error):
                raise
            _log.warning("audit.seal_failed %s", type(error).__name__)
        return False


def seal_idle(trail: Path, signer: CheckpointSigner, key: VerifierKey) -> dict[str, int | None]:
    """Seal what is not sealed in the instances whose processes are gone.

    Returns:
        For each instance how many records were sealed now; None where a process writes it, which
        seals it itself.

    Raises:
        D1SignerError: A checkpoint cannot be signed, or an instance is not as it was sealed.
        OSError: Something cannot be read or written.
    """
    sealed: dict[str, int | None] = {}
    for path in folder.own_instances(trail):
        held = folder.lock(path)
        if held is None:
            sealed[path.name] = None
            continue
        with held:
            drop_torn_checkpoint(path)
            instance = Instance(path, held, recover(path, most_unsealed=math.inf), 0)
            before = instance.sealed
            try:
                seal(instance, signer, key)
            finally:
                instance.close()
            sealed[path.name] = instance.sealed - before
    return sealed

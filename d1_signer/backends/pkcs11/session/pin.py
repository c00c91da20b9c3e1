# SPDX-License-Identifier: Apache-2.0
"""A PIN: where it comes from, and what is remembered of what tokens answered to it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets

from d1_signer.errors import SecretSourceError
from d1_signer.frames import without_locals
from d1_signer.secret import Secret, SecretSource, read_secret

_log = logging.getLogger(__name__)


class Refused:
    """The PINs that are not tried again, as salted digests; kept for the life of the process.

    And those that a token took: one of them is believed against one refusal (ADR 21).
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._digests: set[bytes] = set()
        self._taken: set[bytes] = set()

    def digest(self, token: str, pin: Secret) -> bytes:
        """Salted digest of a PIN for a token."""
        text = f"{token}\0{pin.reveal()}".encode()
        return hmac.digest(self._salt, text, hashlib.sha256)

    def add(self, digest: bytes) -> None:
        """Remember a refusal."""
        self._digests.add(digest)

    def took(self, digest: bytes) -> None:
        """Remember that a token took it."""
        self._taken.add(digest)

    def begun_in_child(self) -> set[bytes]:
        """In the child of a fork: what the parent's logins took, which proves nothing any more.

        Many children that each send a PIN once more could lock the token.
        """
        taken, self._taken = self._taken, set()
        return taken

    def doubt(self, digest: bytes) -> bool:
        """Whether a refusal may be doubted: once after each time that the token took the PIN."""
        known = digest in self._taken
        self._taken.discard(digest)
        return known

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def export(self) -> dict[str, object]:
        """For a process of ours that goes on trying."""
        return {
            "salt": self._salt.hex(),
            "digests": sorted(digest.hex() for digest in self._digests),
            "taken": sorted(digest.hex() for digest in self._taken),
        }

    def take(self, exported: dict[str, object]) -> None:
        """Take over what another process of ours exported."""
        self._salt = bytes.fromhex(str(exported["salt"]))
        self.merge(exported)

    def merge(self, exported: dict[str, object]) -> None:
        """Add refusals that were made under the same salt."""
        digests, taken = exported["digests"], exported["taken"]
        assert isinstance(digests, list)  # noqa: S101 (our own export)
        assert isinstance(taken, list)  # noqa: S101
        self._digests.update(bytes.fromhex(digest) for digest in digests)
        self._taken = {bytes.fromhex(digest) for digest in taken}


refused = Refused()


@without_locals
def read_pin(source: SecretSource, of: str) -> Secret:
    """Read a PIN; of a file that an editor or a script left something beside it, nothing is sent.

    Args:
        source: Its source.
        of: The key's URI without secrets, for a prompt.

    Raises:
        SecretSourceError: As of `d1_signer.read_secret`, or the file holds more than a PIN.
    """
    pin = read_secret(source, what="PIN", of=of)
    if isinstance(source, str) and source.startswith("file:"):
        beside = _beside(pin.reveal())
        if beside is not None:
            raise SecretSourceError(
                f"The PIN file holds {beside}: a token would count it as a wrong PIN.",
                hint="Write the PIN alone, with one line end at most; a PIN that has blanks at an "
                "end is given by a callable or by env:NAME.",
            )
    return pin


def _beside(text: str) -> str | None:
    if text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
        return "a byte order mark"
    if text != text.strip():
        return "blanks or line ends around the PIN"
    return None if text.isprintable() else "several lines or control characters"


class Pin:
    """A PIN and where it comes from.

    It is kept after the first reading, for keys that want it with every signature and for logins
    after a recovery; those read the source again first, in case the PIN was changed meanwhile.
    """

    def __init__(self, source: SecretSource | None, value: Secret | None, *, of: str) -> None:
        """Take a source, or the PIN itself, or neither; ``of`` is the key, for a prompt."""
        self._of = of
        self._source = source
        self._value = value

    def read(self) -> Secret | None:
        """The PIN; None where there is none. Runs the caller's code: hold no lock meanwhile.

        Raises:
            SecretSourceError: The source cannot be read, and could not be before.
        """
        if self._source is None or (self._source == "prompt" and self._value is not None):
            return self._value
        try:
            self._value = read_pin(self._source, self._of)
        except SecretSourceError as error:
            if self._value is None:
                error.details["step"] = "login"
                raise
            _log.warning("pkcs11.pin_source_unreadable; the PIN read earlier is used")
        return self._value

    @property
    def kept(self) -> Secret | None:
        """What was read last."""
        return self._value

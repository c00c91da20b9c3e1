# SPDX-License-Identifier: Apache-2.0
"""What is known about the steps in which a key was opened; nothing here is a guess."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidInputError,
    LoginError,
    SecretSourceError,
)
from d1_signer.signing.key_uri import scheme_of

PKCS11_STEPS = ("module", "token", "login", "key")
_PIN = re.compile(r"[?&;]pin-(source|value)=", re.IGNORECASE)
_UNKNOWN = "not known to have run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """The opening of one key.

    Attributes:
        uri: The key's URI.
        options: What its backend was given, as text.
    """

    uri: str
    options: Mapping[str, str]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps in order; ``key`` is the last."""
        return PKCS11_STEPS if scheme_of(self.uri) == "pkcs11" else ("key",)

    def stopped_at(self, error: D1SignerError) -> str:
        """The step that failed; ``key``, for which all others are taken, where none is told."""
        return self._told_step(error) or "key"

    def not_taken(self, error: D1SignerError | None) -> dict[str, str]:
        """Of the steps before the end, those that were not taken for sure; and why.

        Args:
            error: How the opening ended; None: it succeeded.
        """
        if error is not None and not self._proves_earlier_steps(error):
            return dict.fromkeys(self.steps, _UNKNOWN)
        if isinstance(error, SecretSourceError):
            return {"token": "the PIN is read before"}
        return {} if self._has_pin() else {"login": "no PIN is given"}

    def is_wrong_option(self, error: D1SignerError) -> bool:
        """Whether an option's value was refused, before any step was taken."""
        known = type(error) is ConfigurationError or isinstance(error, InvalidInputError)
        return known and bool(self.options) and "step" not in error.details

    def _proves_earlier_steps(self, error: D1SignerError) -> bool:
        """Whether the steps before the one that failed have passed."""
        if self._told_step(error) is None:
            return False
        if self.options.get("isolation") != "process":
            return True
        # These may be told before the process that hosts the module is started.
        refused_before = isinstance(error, LoginError) and "pkcs11" not in error.details
        return not refused_before and not isinstance(error, SecretSourceError)

    def _told_step(self, error: D1SignerError) -> str | None:
        # PKCS#11 tries a signature while it opens the key.
        known = (*self.steps, "signature")
        return next((step for step in known if step == error.details.get("step")), None)

    def _has_pin(self) -> bool:
        asked_at_device = self.options.get("protected_authentication_path") == "true"
        in_uri = _PIN.search(unquote(self.uri)) is not None
        return asked_at_device or in_uri or "pin_source" in self.options

# SPDX-License-Identifier: Apache-2.0
"""A token and its life; where tokens come from, and those that somebody gives."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from d1_signer.backends.vault.http import HttpClient
from d1_signer.errors import SecretSourceError
from d1_signer.secret import Secret, SecretSource, read_secret
from d1_signer.transport.deadlines import within

# A token is renewed when this share of its life is over, as Vault's own client does.
_RENEW_SHARE = 2 / 3
# Seconds before the first look at the life of a token that somebody gave: what ends sooner, as a
# command does, asks nothing more.
_FIRST_LOOK = 2.0
# What a header may hold without blanks.
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
# Seconds before the end of its life in which a token is not sent any more; a tenth of it at most.
_MARGIN = 5.0


class Uses:
    """How often a token may still be sent (``token_num_uses``)."""

    def __init__(self, left: int) -> None:
        """A token of ``left`` uses."""
        self._left = left
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Count one; False where none is left."""
        with self._lock:
            self._left -= 1
            return self._left >= 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A token and what is known of its life; moments are of ``time.monotonic()``.

    Attributes:
        token: The token; None where an agent or a proxy adds it.
        obtained: When it was asked for.
        due: When to renew or replace it.
        ends: When it expires.
        renewable: Whether Vault renews it; None where that was not looked up.
        uses: How often it may be sent; None where that is not limited.
    """

    token: Secret | None
    obtained: float
    due: float
    ends: float = float("inf")
    renewable: bool | None = False
    uses: Uses | None = None

    @classmethod
    def of(cls, told: Mapping[str, object], began: float) -> Held | None:
        """The token of an answer to a login or a renewal; None where there is none."""
        auth = told.get("auth")
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if not isinstance(auth, dict) or not isinstance(token, str) or not token:
            return None
        life, uses = auth.get("lease_duration"), auth.get("num_uses")
        # 0 is a token that does not expire.
        seconds = float(life) if isinstance(life, int) and life > 0 else float("inf")
        limited = isinstance(uses, int) and uses > 0
        return cls(
            token=Secret(token),
            obtained=began,
            due=began + seconds * _RENEW_SHARE,
            ends=began + seconds,
            # To renew it would take one of its uses.
            renewable=auth.get("renewable") is True and not limited,
            uses=Uses(uses) if isinstance(uses, int) and limited else None,
        )

    def with_life(self, began: float, seconds: int) -> Held:
        """The same, once it is known that it is renewable and how long it lives from a moment."""
        due = began + seconds * _RENEW_SHARE
        return replace(self, due=due, ends=began + seconds, renewable=True)

    def may_be_sent(self, now: float) -> bool:
        """Whether its life is not over; counts a use."""
        margin = min(_MARGIN, (self.ends - self.obtained) / 10)
        return now < self.ends - margin and (self.uses is None or self.uses.take())


class Source(Protocol):
    """Gives tokens."""

    @property
    def interval(self) -> float:
        """Seconds between two tokens that are asked for because one was refused."""
        ...

    def prepare(self, vault: str) -> None:
        """Read what a person may have to type, before any time limit begins.

        Args:
            vault: Which one it is for, in words.
        """
        ...

    def obtain(self, http: HttpClient, until: float) -> Held:
        """A token, from the beginning."""
        ...


class GivenToken:
    """A token of somebody else's: an operator's, or a Vault Agent's that writes it to a file."""

    interval = 0.0

    def __init__(self, source: SecretSource | None, trusted_owner: int | None = None) -> None:
        """Read from ``source``; None: the variables, else ``~/.vault-token``, as Vault's CLI.

        Where that is not there either, and for ``none``, no token is sent: an agent or a proxy of
        Vault may add its own.
        """
        self._source = source
        self._owner = trusted_owner
        self._first: Secret | None = None

    def prepare(self, vault: str) -> None:
        """Read it; see `Source`."""
        self._first = self._read(vault)

    def obtain(self, http: HttpClient, until: float) -> Held:  # noqa: ARG002 (see the protocol)
        """The token as its source gives it now; see `Source`."""
        token, self._first = self._first or within(until, self._read), None
        now = time.monotonic()
        due = float("inf") if token is None else now + _FIRST_LOOK
        return Held(token=token, obtained=now, due=due, renewable=None)

    def _read(self, vault: str = "") -> Secret | None:
        source = self._source
        if source is None:
            names = (f"{prefix}_TOKEN" for prefix in ("BAO", "VAULT"))
            source = next((f"env:{name}" for name in names if os.environ.get(name)), None)
        if source is None:
            source = _token_of_the_user()
        if source == "none":
            return None
        token = read_secret(source, what="Vault token", of=vault, trusted_owner=self._owner)
        if _TOKEN.fullmatch(token.reveal()):
            return token
        raise SecretSourceError(
            "The Vault token has a blank, a line end or another character that no token has.",
            hint="Look at its source: VAULT_TOKEN, or what token_source names.",
        )


def _token_of_the_user() -> str:
    """Where Vault's own client left a token; a container's user may have no home, or not see it."""
    try:
        file = Path.home() / ".vault-token"
        return f"file:{file}" if file.exists() else "none"
    except (OSError, RuntimeError):
        return "none"

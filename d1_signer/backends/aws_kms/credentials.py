# SPDX-License-Identifier: Apache-2.0
"""Credentials for AWS KMS, from where boto3 finds them.

Each search begins anew, with a session of its own: so files that were replaced are read again, and
nothing that was made while something was missing is kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.loaders import Loader

from d1_signer.backends.aws_kms.settings import Settings
from d1_signer.backends.aws_kms.sources import AWS_CREDENTIALS, no_credentials
from d1_signer.backends.renewal import Ask, NobodyToAskError, Renewed
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    LoginError,
    SecretSourceError,
    SignerTimeout,
)
from d1_signer.secret import read_secret
from d1_signer.signing import forks

_PLUGINS = "BOTOCORE_EXPERIMENTAL__PLUGINS"

# Making sessions and clients in two threads at once is not safe, whatever the session.
making = threading.Lock()


def _new_lock() -> None:
    global making  # noqa: PLW0603 (the parent's lock may have been held at the moment of the fork)
    making = threading.Lock()


forks.in_child(_new_lock)


def new_session(settings: Settings) -> botocore.session.Session:
    """A session that takes its service models from botocore itself.

    A model says to which host a request with credentials goes. botocore would also take it from
    ``AWS_DATA_PATH`` and ``~/.aws/models``, and load code that a variable names into its clients.

    Raises:
        ConfigurationError: The environment names plugins.
    """
    if os.environ.get(_PLUGINS, "DISABLED") not in {"", "DISABLED"}:
        raise ConfigurationError(
            f"{_PLUGINS} is set: botocore would load that code into clients with credentials.",
            hint="Unset it; or give a client of your own, which is used as you made it.",
        )
    session = botocore.session.Session(profile=settings.profile)
    models = Loader([Loader.BUILTIN_DATA_PATH], include_default_search_paths=False)
    session.register_component("data_loader", models)
    # It would tell a host that a variable names of each call, with the access key's id, over UDP.
    session.set_config_variable("csm_enabled", False)  # noqa: FBT003 (positional)
    if settings.region:
        session.set_config_variable("region", settings.region)
    return session


class Keys:
    """An access key with its session token, and until when it is good; shown by none of them."""

    __slots__ = ("_source", "frozen", "method")

    def __init__(self, source: Credentials) -> None:
        """Take what ``source`` gives now; this may ask over a network."""
        self.frozen: ReadOnlyCredentials = source.get_frozen_credentials()
        self.method = str(source.method)
        self._source = source

    def ends_within(self, seconds: float | None) -> bool:
        """Whether it ends within so many seconds; None: within boto3's own time for renewals."""
        needed: Callable[[float | None], bool] | None = getattr(
            self._source, "refresh_needed", None
        )
        return needed is not None and needed(seconds)

    def secrets(self) -> tuple[str, ...]:
        """What no text may repeat."""
        frozen = self.frozen
        return tuple(filter(None, (frozen.secret_key, frozen.token)))

    def __repr__(self) -> str:
        return f"<Keys from {self.method} ****>"


class AwsCredentials(Renewed[Keys]):
    """The credentials of one key's calls."""

    what = "AWS credentials"

    def __init__(self, settings: Settings) -> None:
        """Look for nothing yet."""
        super().__init__()
        self._settings = settings

    def find(self, ask: Ask) -> Keys:
        """See `Renewed`; only the source that was found first is taken later on."""
        asked: list[str] = []
        try:
            found: Keys = AWS_CREDENTIALS.ask("for credentials", self._find, ask, asked)
        except D1SignerError as error:
            if asked:
                parts = urlsplit(asked[-1])
                error.details.setdefault("endpoint", f"{parts.scheme}://{parts.netloc}")
            raise
        held = self.held()
        if held is not None and held.method != found.method:
            raise no_credentials(
                f"The {self.what} came from {held.method}, which gives none now; "
                f"those from {found.method} are not taken instead.",
                retryable=True,
            )
        return found

    def _find(self, ask: Ask, asked: list[str]) -> Keys:
        with making:
            session = new_session(self._settings)

        def note(**event: Any) -> None:
            asked.append(str(event["request"].url))

        session.register("before-send", note)
        # botocore's own are a minute, and five attempts.
        session.set_default_client_config(
            Config(
                connect_timeout=2.0,
                read_timeout=5.0,
                retries={"mode": "standard", "total_max_attempts": 2},
            )
        )
        provider: Any = session.get_component("credential_provider").get_provider("assume-role")
        provider._prompter = _prompter(ask)  # noqa: SLF001 (there is no other way)
        source = session.get_credentials()
        if source is None:
            # An instance's metadata may be away for a moment; boto3 does not tell that.
            off = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
            raise no_credentials("boto3 finds no AWS credentials.", retryable=not off)
        return Keys(source)

    def is_ageing(self, held: Keys) -> bool:
        """See `Renewed`."""
        return held.ends_within(None)

    def is_over(self, held: Keys) -> bool:
        """See `Renewed`."""
        return held.ends_within(0)

    def are_same(self, held: Keys, other: Keys) -> bool:
        """See `Renewed`."""
        return held.frozen == other.frozen

    def not_in_time(self) -> SignerTimeout:
        """See `Renewed`."""
        return SignerTimeout(
            "The search for AWS credentials brought nothing within the deadline.",
            hint="Look at what boto3 asks for them: STS, a container's or an instance's endpoint, "
            "credential_process; where there is no instance role, set AWS_EC2_METADATA_DISABLED.",
            details={"phase": "credentials"},
        )


def ask_on_terminal(question: str) -> str:
    """Ask for an MFA code, without echo.

    Raises:
        SecretSourceError: There is no terminal.
    """
    what = question.strip().removeprefix("Enter ").removesuffix(":")
    try:
        return read_secret("prompt", what=what).reveal()
    except SecretSourceError as error:
        refused = SecretSourceError(
            error.message,
            hint="The AWS profile demands it (mfa_serial): open the key on a terminal, or use "
            "a profile or a role without it.",
            details={"phase": "credentials"},
        )
    raise refused


def _prompter(ask: Ask) -> Ask:
    def prompt(question: str) -> str:
        try:
            return ask(question)
        except NobodyToAskError:
            refused = LoginError(
                "The AWS credentials have ended, and new ones demand an MFA code.",
                hint="It is asked for at opening only: open the key anew, on a terminal; "
                "or use a profile or a role without mfa_serial.",
                details={"phase": "credentials"},
            )
        raise refused

    return prompt


class Presented(Credentials):
    """What boto3 signs requests with: the credentials in hand; it renews nothing itself."""

    def __init__(self, credentials: AwsCredentials) -> None:
        """Present ``credentials``."""
        super().__init__("", "", method="d1-signer")
        self._credentials = credentials

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """See `botocore.credentials.Credentials`."""
        held = self._credentials.held()
        if held is None:  # no call begins without
            raise no_credentials("There are no AWS credentials.", retryable=True)
        return held.frozen


class InHand:
    """A chain of credential providers that has one thing to give."""

    def __init__(self, credentials: AwsCredentials) -> None:
        """Give ``credentials``."""
        self._presented = Presented(credentials)

    def load_credentials(self) -> Presented:
        """See `botocore.credentials.CredentialResolver`."""
        return self._presented

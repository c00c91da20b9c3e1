# SPDX-License-Identifier: Apache-2.0
"""Settings that commands share: flags, the D1_* environment variables, and what comes of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from d1_signer.cli._callbacks import checked_keys
from d1_signer.cli._config import policy_in, settings_in
from d1_signer.cli._options import BackendOptions, unnamed, with_options
from d1_signer.cli._output import Command, Output, printable, setting
from d1_signer.cli._paths import KEY_URI
from d1_signer.cli._trail import current_trail, with_trail
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    KeyUriError,
    SecretSourceError,
    SignerError,
)
from d1_signer.signing.key_uri import scheme_of, without_secrets

if TYPE_CHECKING:
    from d1_signer.audit.trail import AuditTrail
    from d1_signer.custody.policy import CustodyPolicy
    from d1_signer.signing.signer import Signer
    from d1_signer.signing.signer_set import SignerSet
    from d1_signer.token.d1 import AssertionProfile, Audience, Environment

# As a `SignerSet` has it.
_AWAY = (SignerError, SecretSourceError)


def open_key(
    uri: str,
    options: BackendOptions,
    *,
    kid: str | None = None,
    policy: CustodyPolicy | None = None,
    trail: AuditTrail | None,
) -> Signer:
    """Open a key, whose uses the trail records; the caller closes it."""
    from d1_signer.signing.opening import open_signer

    return open_signer(
        uri,
        kid=kid,
        custody_policy=policy or policy_in(click.get_current_context()),
        trail=trail,
        **options.for_opening(uri),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys of a run.

    Attributes:
        uris: Key URIs, first the active one.
        kid: Key identifier for a single key.
        options: What their backends are given.
    """

    uris: tuple[str, ...]
    kid: str | None
    options: BackendOptions

    def single(self) -> str:
        """The one key URI.

        Raises:
            ConfigurationError: None, or several.
        """
        self.require()
        if len(self.uris) > 1:
            raise ConfigurationError(
                f"This takes a single key, and {len(self.uris)} are given.",
                hint="Name one with --key.",
            )
        return self.uris[0]

    def require(self) -> None:
        """Refuse settings that name no key, one kid for several, or an unknown option.

        Raises:
            ConfigurationError: Such settings.
            click.UsageError: An option that no backend of the keys knows.
        """
        if not self.uris:
            raise ConfigurationError(
                "No key is given.", hint="Give --key, or set D1_SIGNER_KEY to a key URI."
            )
        if self.kid is not None and len(self.uris) > 1:
            raise ConfigurationError(
                "One kid is given for several keys.",
                hint="Leave --kid and D1_SIGNER_KID out, and end each key URI with #KID.",
            )
        self.options.require_known(self.uris)

    def open(self, uri: str) -> Signer:
        """Open one of the keys; the caller closes it."""
        return open_key(uri, self.options, kid=self.kid, trail=current_trail())

    @contextmanager
    def opened(self) -> Iterator[tuple[Signer, ...]]:
        """All keys, open."""
        self.require()
        with ExitStack() as stack:
            yield tuple(stack.enter_context(self.open(uri)) for uri in self.uris)

    @contextmanager
    def openable(
        self, output: Output, *, but: tuple[type[D1SignerError], ...] = _AWAY
    ) -> Iterator[tuple[tuple[Signer, ...], Sequence[tuple[str, D1SignerError]]]]:
        """Those keys that can be opened, in order, at least one; and why the others cannot.

        As in a `SignerSet`, a key whose device is down, or whose PIN or key file cannot be read,
        is passed over for the next one.

        Args:
            output: Takes a note of each that is passed over.
            but: For which errors.
        """
        self.require()
        with ExitStack() as stack:
            signers: list[Signer] = []
            away: list[tuple[str, D1SignerError]] = []
            for uri in self.uris:
                try:
                    signers.append(stack.enter_context(self.open(uri)))
                except but as error:
                    # What no URI can be made of may be anything, a password even.
                    unread = isinstance(error, KeyUriError)
                    away.append((f"{scheme_of(uri)}:" if unread else without_secrets(uri), error))
            if len(self.uris) > 1:  # an error does not name the key, and there may be no other
                for shown, why in away:
                    output.note(f"Warning: a key is passed over: {printable(f'{shown}: {why}')}")
            if not signers:
                raise away[0][1].fresh()
            yield tuple(signers), away

    @contextmanager
    def signers(self, output: Output) -> Iterator[SignerSet]:
        """The keys that can be opened, as a set; see `openable`."""
        from d1_signer.signing.signer_set import SignerSet

        with self.openable(output) as (signers, _):
            yield SignerSet(signers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Issuer:
    """Who asks which D1.

    Attributes:
        issuer_id: The issuerId that D1 assigned.
        environment: Name or URL of the D1 environment.
        audience: ``aud`` of assertions; None leaves it out.
    """

    issuer_id: str | None
    environment: str | None
    audience: str | Audience | None

    @property
    def given(self) -> bool:
        """Whether any of it is given."""
        from d1_signer.token.d1 import Audience

        named = self.issuer_id is not None or self.environment is not None
        return named or self.audience is not Audience.TOKEN_ENDPOINT

    def required_id(self) -> str:
        """The issuer id.

        Raises:
            ConfigurationError: There is none.
        """
        if self.issuer_id is None:
            raise ConfigurationError(
                "No issuer id is given.",
                hint="Give --issuer-id or set D1_ISSUER_ID, as D1 assigned it at onboarding.",
            )
        return self.issuer_id

    def required_environment(self) -> Environment:
        """The environment.

        Raises:
            ConfigurationError: There is none, or it cannot be read.
        """
        environment = self.optional_environment()
        if environment is None:
            raise ConfigurationError(
                "No D1 environment is given.",
                hint="Give --environment or set D1_ENVIRONMENT: production, staging, develop, "
                "or an https URL.",
            )
        return environment

    def optional_environment(self) -> Environment | None:
        """The environment, None where there is none.

        Raises:
            ConfigurationError: It cannot be read.
        """
        from d1_signer.token.d1 import Environment

        return None if self.environment is None else Environment.of(self.environment)

    def profile(self, *, lifetime: int) -> AssertionProfile:
        """What its assertions say.

        Args:
            lifetime: Seconds from now to ``exp``.

        Raises:
            ConfigurationError: A setting is missing.
        """
        from d1_signer.token.d1 import AssertionProfile, Audience

        audience = self.audience
        if audience is Audience.TOKEN_ENDPOINT:
            audience = Audience.of(audience, self.required_environment())
        return AssertionProfile(issuer_id=self.required_id(), audience=audience, lifetime=lifetime)


def with_keys(command: Command) -> Command:
    """Give a command ``--key``, ``--kid`` and the backends' options, as its ``keys``."""

    @setting(
        "--key",
        "D1_SIGNER_KEY",
        "Key URI; repeat it for several keys, first the active one. The variable holds one or "
        "several with blanks between them.",
        multiple=True,
        metavar="URI",
        type=KEY_URI,
        callback=checked_keys,
    )
    @setting(
        "--kid", "D1_SIGNER_KID", "Key identifier of a single key. [default: RFC 7638 thumbprint]"
    )
    @with_options
    @with_trail
    @functools.wraps(command)
    def wrapper(
        *args: Any, key: tuple[str, ...], kid: str | None, options: BackendOptions, **others: Any
    ) -> Any:
        context = click.get_current_context()
        if _is_of_other_keys(context, key):
            kid = None
        return command(*args, keys=Keys(uris=key, kid=kid, options=options), **others)

    return wrapper


def _is_of_other_keys(context: click.Context, key: tuple[str, ...]) -> bool:
    """Whether the kid of a variable or of the file is not for these keys, which win over it.

    They have kids of their own, or are not those to which it belongs.
    """
    kid_of, key_of = map(context.get_parameter_source, ("kid", "key"))
    settings = settings_in(context)
    named: Sequence[str] = settings.key if settings else ()
    if kid_of is ParameterSource.ENVIRONMENT and key_of is ParameterSource.COMMANDLINE:
        named = os.environ.get("D1_SIGNER_KEY", "").split() or named
    elif kid_of is not ParameterSource.DEFAULT_MAP or key_of is ParameterSource.DEFAULT_MAP:
        return False
    others = bool(named) and [*map(unnamed, key)] != [*map(unnamed, named)]
    return others or all("#" in uri for uri in key)


def with_issuer(command: Command) -> Command:
    """Give a command the options of `Issuer`, as its ``issuer``."""

    @setting("--issuer-id", "D1_ISSUER_ID", "The issuerId that D1 assigned.")
    @setting(
        "--environment",
        "D1_ENVIRONMENT",
        "production, staging, develop, or the https URL before /oauth2/token.",
    )
    @click.option("--audience", help="The claim aud. [default: the token endpoint's URL]")
    @click.option("--no-audience", is_flag=True, help="Leave the claim aud out.")
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        issuer_id: str | None,
        environment: str | None,
        audience: str | None,
        no_audience: bool,
        **options: Any,
    ) -> Any:
        from d1_signer.token.d1 import Audience

        if no_audience and audience is not None:
            # One of them may be the file's, over which the other wins.
            source = click.get_current_context().get_parameter_source
            given = {
                n
                for n in ("audience", "no_audience")
                if source(n) is not ParameterSource.DEFAULT_MAP
            }
            if len(given) != 1:
                raise click.UsageError("--audience and --no-audience exclude each other.")
            no_audience = given == {"no_audience"}
        wanted = Audience.TOKEN_ENDPOINT if audience is None else audience
        issuer = Issuer(
            issuer_id=issuer_id,
            environment=environment,
            audience=None if no_audience else wanted,
        )
        return command(*args, issuer=issuer, **options)

    return wrapper

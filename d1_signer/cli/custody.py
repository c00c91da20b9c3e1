# SPDX-License-Identifier: Apache-2.0
"""`d1-signer custody`: where each private key lives, and who says so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import click

from d1_signer.cli._callbacks import checked_path_or_key
from d1_signer.cli._custody_text import key_text
from d1_signer.cli._files import refuse_existing, write_new
from d1_signer.cli._options import BackendOptions
from d1_signer.cli._output import OptionsOnly, Output, setting, with_output_options
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.cli.custody_files import diff, verify
from d1_signer.custody.bundle import KeyReport, make_bundle
from d1_signer.custody.page import page
from d1_signer.custody.policy import VARIABLE, CustodyPolicy
from d1_signer.custody.report import Maker, utc
from d1_signer.errors import D1SignerError
from d1_signer.signing.key_uri import scheme_of, without_secrets
from d1_signer.signing.signer import Signer

_FILES = {command.name: command for command in (verify, diff)}
_NO_DEMANDS = CustodyPolicy()


class _Custody(OptionsOnly):
    """The command, and beside it those that read files alone: no setting, no variable."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Make a context, see `click.Command`."""
        if args and args[0] in _FILES:
            name, *rest = args
            return _FILES[name].make_context(f"{info_name} {name}", rest, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Looked:
    """What was found of one key, and its signer where it could be opened."""

    told: KeyReport
    signer: Signer | None
    unmet: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        told = self.told
        if told.report is None:
            error = told.error and told.error.to_dict()
            return {"use": told.use, "location": told.location, "error": error}
        return {"use": told.use, **told.report.to_dict(), "unmet": list(self.unmet)}


@click.command(cls=_Custody)
@with_keys
@setting(
    "--client-key",
    "D1_CLIENT_KEY",
    "Key URI of the TLS client key, which is looked at as well; the path of a file is not.",
    metavar="PATH|URI",
    callback=checked_path_or_key,
)
@setting(
    "--audit-key",
    "D1_AUDIT_KEY",
    "Key URI of the audit trail's checkpoint key, which is looked at as well.",
    metavar="URI",
    callback=checked_path_or_key,
)
@setting(
    "--require",
    VARIABLE,
    "What every key must be shown to be: non-exportable, never-exportable, generated-in-place, "
    "hardware, fips; and attested: by a statement that was verified.",
    metavar="WORD,WORD…",
)
@click.option("--bundle", metavar="FILE", help="Write a file that an auditor checks without us.")
@click.option(
    "--challenge", metavar="TEXT", help="What the auditor chose, which the bundle is signed with."
)
@click.option("--html", metavar="FILE", help="Write the report as one page, to print or to file.")
@with_output_options
def custody(
    keys: Keys,
    *,
    client_key: str | None,
    audit_key: str | None,
    require: str | None,
    bundle: str | None,
    challenge: str | None,
    html: str | None,
    output: Output,
) -> int:
    """Print where each private key lives.

    Each fact stands with its source, and whether it is claimed or attested. The exit status is 1
    where a key cannot be asked, or is not shown to be what is required; then no bundle is written
    that a key that falls short would have to sign.

    Two commands read files alone, without a key, a setting or a network: custody verify BUNDLE, and
    custody diff OLD NEW.
    """
    policy = _NO_DEMANDS if require is None else CustodyPolicy.parse(require, where="--require")
    if challenge is not None and bundle is None:
        raise click.UsageError("--challenge is for --bundle.")
    refuse_existing(bundle, html)
    keys.require()
    made_by, made_at = Maker.here(), int(time.time())
    with ExitStack() as stack:
        looked = [
            _looked_at(stack, use, one, uri, policy)
            for use, one, uri in _all_keys(keys, client_key, audit_key)
        ]
        _require_one(looked)
        falls_short = any(one.unmet for one in looked)
        if bundle is not None and not falls_short:
            told = [(one.told, one.signer) for one in looked]
            content = make_bundle(told, challenge=challenge, made_by=made_by, made_at=made_at)
            write_new(bundle, content)
        if html is not None:
            shown = [(one.told, one.unmet) for one in looked]
            write_new(html, page(shown, policy=policy, made_by=made_by, made_at=made_at))
    document = {
        "time": utc(made_at),
        "made_by": asdict(made_by),
        "policy": list(policy.words),
        "keys": [one.to_dict() for one in looked],
    }
    output.result(document, "\n\n".join(key_text(one.told, one.unmet) for one in looked))
    if bundle is not None and falls_short:
        output.note("No bundle is written: a key is not shown to be what is required.")
    return int(falls_short or any(one.told.report is None for one in looked))


def _all_keys(
    keys: Keys, client_key: str | None, audit_key: str | None
) -> Iterator[tuple[str, Keys, str]]:
    """What each key is for, its settings and its URI; options are for the signing keys alone."""
    for uri in keys.uris:
        yield "assertion", keys, uri
    plain = Keys(uris=(), kid=None, options=BackendOptions())
    for use, key in (("client", client_key), ("audit", audit_key)):
        if key is not None and scheme_of(key):
            yield use, plain, key


def _looked_at(stack: ExitStack, use: str, keys: Keys, uri: str, policy: CustodyPolicy) -> _Looked:
    location = without_secrets(uri)
    try:
        # Held against the policy here, so that a key that falls short is reported as well.
        signer = stack.enter_context(keys.open(uri, _NO_DEMANDS))
        report = signer.custody()
    except D1SignerError as error:
        return _Looked(told=KeyReport(use=use, location=location, error=error), signer=None)
    told = KeyReport(use=use, location=report.evidence.location, report=report)
    return _Looked(told=told, signer=signer, unmet=policy.unmet(report.evidence))


def _require_one(looked: Sequence[_Looked]) -> None:
    """Where no key can be reported on, the first one's error is that of the command."""
    first = looked[0].told.error
    if first is not None and all(one.told.report is None for one in looked):
        raise first.fresh()

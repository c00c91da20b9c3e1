# SPDX-License-Identifier: Apache-2.0
"""`d1-signer custody`: where each private key lives, and who says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from d1_signer.cli._callbacks import checked_path_or_key
from d1_signer.cli._output import OptionsOnly, Output, setting, with_output_options
from d1_signer.cli._output_file import OutputFile
from d1_signer.cli._paths import FILE
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.cli.custody_files import diff, verify

_FILES = {command.name: command for command in (verify, diff)}


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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of an option or of those commands, see `click.Command`."""
        below = [
            CompletionItem(name, help=command.get_short_help_str())
            for name, command in _FILES.items()
            if name and name.startswith(incomplete)
        ]
        return below + super().shell_complete(ctx, incomplete)


@click.command(cls=_Custody)
@with_keys
@setting(
    "--client-key",
    "D1_CLIENT_KEY",
    "Key URI of the TLS client key, which is looked at as well; the path of a file is not.",
    metavar="PATH|URI",
    type=FILE,
    callback=checked_path_or_key,
)
@setting(
    "--require",
    "D1_CUSTODY_POLICY",
    "What every key must be shown to be: non-exportable, never-exportable, generated-in-place, "
    "hardware, fips; and attested: by a statement that was verified.",
    metavar="WORD,WORD…",
)
@click.option(
    "--bundle",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a file that an auditor checks without us.",
)
@click.option(
    "--challenge", metavar="TEXT", help="What the auditor chose, which the bundle is signed with."
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the report as one page, to print or to file.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite a FILE; never a key, nor any other file that the settings name.",
)
@with_output_options
def custody(
    keys: Keys,
    *,
    client_key: str | None,
    require: str | None,
    bundle: Path | None,
    challenge: str | None,
    html: Path | None,
    force: bool,
    output: Output,
) -> int:
    """Print where each private key lives.

    Each fact stands with its source, and whether it is claimed or attested. The key that seals the
    audit trail is looked at as well. The exit status is 1 where a key cannot be asked, or is not
    shown to be what is required; then no bundle is written that a key that falls short would have
    to sign.

    Two commands read files alone, without a key, a setting or a network: custody verify BUNDLE, and
    custody diff OLD NEW.
    """
    from d1_signer.cli._looking import look

    if challenge is not None and bundle is None:
        raise click.UsageError("--challenge is for --bundle.")
    bundle_file, page_file = _files(bundle, html, overwrite=force)
    keys.require()
    return look(
        keys,
        client_key,
        require,
        bundle=bundle_file,
        challenge=challenge,
        page_file=page_file,
        output=output,
    )


def _files(
    bundle: Path | None, html: Path | None, *, overwrite: bool
) -> tuple[OutputFile | None, OutputFile | None]:
    """What is to be written, refused before a key is asked for anything."""
    if overwrite and bundle is None and html is None:
        raise click.UsageError("--force is for --bundle and --html.")
    if bundle and html and os.path.realpath(bundle) == os.path.realpath(html):
        raise click.UsageError("--bundle and --html name the same file.")
    bundle_file = None if bundle is None else OutputFile(path=bundle, overwrite=overwrite)
    page_file = None if html is None else OutputFile(path=html, overwrite=overwrite)
    for file in filter(None, (bundle_file, page_file)):
        file.require_free()
    return bundle_file, page_file

# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit collect`: one tree over the newest checkpoints of many processes and hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from d1_signer.cli._config import with_config
from d1_signer.cli._output import Output, setting, to_stdout, with_output_options
from d1_signer.cli._output_file import OutputFile, with_output_file
from d1_signer.cli._paths import KEY_URI
from d1_signer.cli._trail import TrailSettings
from d1_signer.cli._trail_files import instances_of, notes_of, unreadable, verifier_keys
from d1_signer.errors import AuditError, ConfigurationError


@click.command()
@click.argument("place", nargs=-1, required=True, type=click.Path())
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="VKEY|file:PATH",
    help="Whose checkpoints are collected; repeat it for several.",
)
@setting(
    "--audit-origin",
    "D1_AUDIT_ORIGIN",
    "Whose collection it is. [default: this host's name]",
    metavar="NAME",
)
@setting(
    "--audit-key",
    "D1_AUDIT_KEY",
    "Key URI of the key that signs the collection.",
    metavar="URI",
    type=KEY_URI,
)
@with_output_file
@with_config
@with_output_options
def collect(
    *,
    place: tuple[str, ...],
    keys: tuple[str, ...],
    audit_origin: str | None,
    audit_key: str | None,
    output_file: OutputFile | None,
    output: Output,
) -> None:
    """Collect the newest checkpoint of every instance into one signed file.

    PLACE is a trail's folder, an instance, or a file of checkpoints that came from another host.
    What is collected is what d1-signer audit verify --since is given later.
    """
    from d1_signer.audit.collecting import collection, newest
    from d1_signer.audit.note import VerifierKey

    known = verifier_keys(keys)
    try:
        leaves = newest((note for name in place for note in _checkpoints(name)), known)
    except AuditError as error:
        raise ConfigurationError(f"A checkpoint cannot be collected: {error.message}") from None
    except OSError as error:
        raise unreadable(error) from None
    if not leaves:
        raise ConfigurationError("There is no checkpoint in these places.")
    settings = TrailSettings(folder=None, origin=audit_origin, key=audit_key)
    signer = settings.signer()
    if signer is None:
        raise ConfigurationError(
            "No key is given that signs the collection.", hint="Set D1_AUDIT_KEY to its key URI."
        )
    key = VerifierKey(settings.name(), signer.public_key)
    content = collection(leaves, signer, key)
    if output_file is not None:
        output_file.write(content, f"a collection of {len(leaves)} checkpoints", output)
    if output.json:
        document = {
            "verifier_key": str(key),
            "checkpoints": len(leaves),
            "collection": content.decode(),
        }
        output.result(document, "")
        return
    if output_file is None:
        to_stdout(content)
    output.note(f"Verifier key of the collection  {key}", verbatim=True)


def _checkpoints(name: str) -> Iterator[bytes]:
    if not Path(name).is_dir():
        yield from notes_of(name, "PLACE")
        return
    from d1_signer.audit import stored

    for instance in instances_of(name):
        last = stored.last_checkpoint(instance)
        if last is not None:
            yield last.note

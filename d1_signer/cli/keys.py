# SPDX-License-Identifier: Apache-2.0
"""`d1-signer public-key`, `generate-key` and `custody`."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from urllib.parse import quote

import click

from d1_signer.cli._output import (
    OptionsOnly,
    Output,
    facts,
    indented,
    moment,
    table,
    with_output_options,
)
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.custody import CustodyReport
from d1_signer.errors import ConfigurationError
from d1_signer.key_uri import split_fragment
from d1_signer.secret import shown_path
from d1_signer.signer import Signer, generate_key as generate
from d1_signer.signer_set import SignerSet


@click.command("public-key", cls=OptionsOnly)
@with_keys
@click.option(
    "--format",
    "form",
    type=click.Choice(["pem", "der", "jwk", "jwks"]),
    default="pem",
    show_default=True,
    help="jwks holds all given keys, the others a single one.",
)
@click.option("-o", "--output-file", metavar="FILE", help="Write it to a file instead.")
@with_output_options
def public_key(keys: Keys, *, form: str, output_file: str | None, output: Output) -> None:
    """Print the public key to register at D1.

    With --json it is the member public_key: an object for jwk and jwks, base64 text for der.
    """
    if form != "jwks":
        keys.single()
    if form == "der" and not output.json and output_file is None and sys.stdout.isatty():
        raise ConfigurationError(
            "DER is binary and is not written to a terminal.", hint="Give -o FILE, or use a pipe."
        )
    with keys.opened() as signers:
        encoded, shown = _encode(signers, form)
        named = [{"kid": s.kid, "thumbprint": s.public_key.thumbprint()} for s in signers]
    if output_file is not None:
        _write(output_file, encoded)
    if output.json:
        output.result({"format": form, "keys": named, "public_key": shown}, "")
    elif output_file is None:
        click.echo(encoded, nl=False)


def _encode(signers: tuple[Signer, ...], form: str) -> tuple[bytes, object]:
    """The form as bytes, and as a JSON value."""
    key = signers[0].public_key
    if form == "pem":
        return key.pem().encode(), key.pem()
    if form == "der":
        return key.der(), base64.b64encode(key.der()).decode()
    jwks = SignerSet(signers).jwks()
    document = jwks if form == "jwks" else jwks["keys"][0]
    return json.dumps(document, indent=2).encode() + b"\n", document


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        shown = shown_path(Path(path).absolute())
        raise ConfigurationError(f"{shown} cannot be written: {error.strerror}.") from None


@click.command("generate-key", cls=OptionsOnly)
@with_keys
@with_output_options
def generate_key(keys: Keys, *, output: Output) -> None:
    """Make a new P-256 signing key.

    The key URI says where; nothing is ever overwritten. In an HSM it is made on the device:
    sensitive, not extractable, for signing only.
    """
    uri = keys.single()
    made = generate(uri)
    thumbprint = made.public_key.thumbprint()
    kid = keys.kid or split_fragment(uri)[1]
    named = made.uri if kid is None else f"{made.uri}#{quote(kid, safe='')}"
    document = {
        "uri": named,
        "kid": kid or thumbprint,
        "thumbprint": thumbprint,
        "public_key": made.public_key.pem(),
    }
    told = facts({"Key URI": named, "kid": kid or thumbprint, "Thumbprint": thumbprint})
    output.result(document, f"{told}\n\n{made.public_key.pem().rstrip()}")


@click.command(cls=OptionsOnly)
@with_keys
@with_output_options
def custody(keys: Keys, *, output: Output) -> None:
    """Print where each private key lives.

    Each fact stands with its source, and whether it is claimed or attested.
    """
    with keys.opened() as signers:
        reports = [signer.custody() for signer in signers]
    document = {"keys": [report.to_dict() for report in reports]}
    output.result(document, "\n\n".join(map(custody_text, reports)))


def custody_text(report: CustodyReport) -> str:
    """A custody report for people."""
    evidence = report.evidence
    head = facts(
        {
            "kid": report.kid,
            "Thumbprint": report.thumbprint,
            "Backend": report.backend,
            "Location": evidence.location,
            "Exportable": evidence.exportable,
            "Generated in place": evidence.generated_in_place,
            "Hardware": evidence.hardware,
            "Collected": moment(report.collected_at),
        }
    )
    rows = [(fact.name, str(fact.assurance), fact.source, fact.value) for fact in evidence.facts]
    return f"{head}\n\n{indented(table(('FACT', 'ASSURANCE', 'SOURCE', 'VALUE'), rows))}"

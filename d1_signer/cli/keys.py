# SPDX-License-Identifier: Apache-2.0
"""`d1-signer public-key`, `csr` and `generate-key`."""

from __future__ import annotations

import base64
import json
import sys
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from d1_signer.cli._callbacks import checked_client_key, checked_subject
from d1_signer.cli._options import BackendOptions, with_options
from d1_signer.cli._output import (
    OptionsOnly,
    Output,
    StdoutError,
    facts,
    printable,
    to_stdout,
    with_output_options,
)
from d1_signer.cli._output_file import OutputFile, with_output_file
from d1_signer.cli._paths import KEY_URI
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.cli._trail import current_trail, with_trail
from d1_signer.cli._tty import is_terminal
from d1_signer.errors import ConfigurationError, D1SignerError
from d1_signer.signing.key_uri import split_fragment

if TYPE_CHECKING:
    from cryptography import x509

    from d1_signer.signing.signer import Signer


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
@with_output_file
@with_output_options
@click.pass_context
def public_key(
    context: click.Context,
    keys: Keys,
    *,
    form: str,
    output_file: OutputFile | None,
    output: Output,
) -> None:
    """Print the public key to register at D1.

    With --json it is the member public_key: an object for jwk and jwks, base64 text for der. Where
    one of several keys is away, jwks holds the others, and the exit status is 1.
    """
    if form != "jwks":
        keys.single()
    _refuse_der_on_terminal(form, output_file, output)
    with keys.openable(output, but=(D1SignerError,)) as (signers, away):
        encoded, shown = _encode(signers, form)
        named = [{"kid": s.kid, "thumbprint": s.public_key.thumbprint()} for s in signers]
    missing = [{"key": key, "error": error.to_dict()} for key, error in away]
    document = {"format": form, "keys": named, "away": missing, "public_key": shown}
    kids = ", ".join(printable(signer.kid) for signer in signers)
    _deliver(encoded, document, output_file, output, what=f"the public key of kid {kids}")
    if away:
        context.exit(1)


def _encode(signers: tuple[Signer, ...], form: str) -> tuple[bytes, object]:
    """The form as bytes, and as a JSON value."""
    key = signers[0].public_key
    if form == "pem":
        return key.pem().encode(), key.pem()
    if form == "der":
        return key.der(), base64.b64encode(key.der()).decode()
    from d1_signer.signing.signer_set import SignerSet

    jwks = SignerSet(signers).jwks()
    document = jwks if form == "jwks" else jwks["keys"][0]
    return json.dumps(document, indent=2).encode() + b"\n", document


def _refuse_der_on_terminal(form: str, output_file: OutputFile | None, output: Output) -> None:
    if form == "der" and not output.json and output_file is None and is_terminal(sys.stdout):
        raise ConfigurationError(
            "DER is binary and is not written to a terminal.", hint="Give -o FILE, or use a pipe."
        )


def _deliver(
    encoded: bytes,
    document: dict[str, object],
    output_file: OutputFile | None,
    output: Output,
    *,
    what: str,
) -> None:
    if output_file is not None:
        output_file.write(encoded, what, output)
        document = {**document, "file": output_file.shown}
    if output.json:
        output.result(document, "")
    elif output_file is None:
        to_stdout(encoded)


@click.command(cls=OptionsOnly)
@click.option(
    "--key",
    required=True,
    metavar="URI",
    type=KEY_URI,
    callback=checked_client_key,
    help="Key URI of the client key. D1_SIGNER_KEY is not read: that one signs assertions.",
)
@with_options
@with_trail
@click.option(
    "--subject",
    required=True,
    metavar="NAME",
    callback=checked_subject,
    help="Distinguished name as in RFC 4514: 'CN=NAME,O=Bank,C=FR'. D1 prescribes the common name.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["pem", "der"]),
    default="pem",
    show_default=True,
)
@with_output_file
@with_output_options
def csr(
    *,
    key: str,
    options: BackendOptions,
    subject: x509.Name,
    form: str,
    output_file: OutputFile | None,
    output: Output,
) -> None:
    """Print a certificate signing request (PKCS#10), signed by the key.

    Thales makes the client certificate of mutual TLS from one. Its key must be another than the
    one that signs assertions. With --json it is the member csr: text for pem, base64 for der.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    _refuse_der_on_terminal(form, output_file, output)
    keys = Keys(uris=(key,), kid=None, options=options)
    with keys.open(keys.single()) as signer:
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        request = builder.sign(signer.as_private_key(), SHA256())
        thumbprint = signer.public_key.thumbprint()
    encoded = request.public_bytes(Encoding.DER if form == "der" else Encoding.PEM)
    document: dict[str, object] = {
        "format": form,
        "subject": subject.rfc4514_string(),
        "thumbprint": thumbprint,
        "csr": base64.b64encode(encoded).decode() if form == "der" else encoded.decode(),
    }
    what = f"the signing request of the key {thumbprint}"
    _deliver(encoded, document, output_file, output, what=what)


@click.command("generate-key", cls=OptionsOnly)
@with_keys
@with_output_options
def generate_key(keys: Keys, *, output: Output) -> None:
    """Make a new P-256 signing key.

    The key URI says where; nothing is ever overwritten. In an HSM it is made on the device:
    sensitive, not extractable, for signing only.
    """
    from d1_signer.signing.opening import generate_key as generate
    from d1_signer.signing.signer import checked_kid

    uri = keys.single()
    kid = split_fragment(uri)[1] if keys.kid is None else keys.kid
    if kid is not None:  # before there is a key that could not be opened under it
        checked_kid(kid)
    options = keys.options.for_key(uri, "generate_key")
    made = generate(uri, trail=current_trail(), **options)
    thumbprint = made.public_key.thumbprint()
    named = made.uri if kid is None else f"{made.uri}#{quote(kid, safe='')}"
    document = {
        "uri": named,
        "kid": kid or thumbprint,
        "thumbprint": thumbprint,
        "public_key": made.public_key.pem(),
    }
    told = facts({"Key URI": named, "kid": kid or thumbprint, "Thumbprint": thumbprint})
    try:
        output.result(document, f"{told}\n\n{made.public_key.pem().rstrip()}", verbatim=True)
    except StdoutError:  # the key is there, and nobody would know of it
        output.note(f"The key was made all the same: {named}", verbatim=True)
        raise

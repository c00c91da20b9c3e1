# SPDX-License-Identifier: Apache-2.0
"""`d1-signer token` and `d1-signer assertion`: both are bearer values, masked unless asked for."""

from __future__ import annotations

import json
import time

import click

from d1_signer.cli._connection import Connection, with_connection
from d1_signer.cli._output import OptionsOnly, Output, facts, indented, moment, with_output_options
from d1_signer.cli._settings import Issuer, Keys, with_issuer, with_keys
from d1_signer.token.d1 import DEFAULT_ASSERTION_LIFETIME, MAX_ASSERTION_LIFETIME

_MASK = "****"


@click.command(cls=OptionsOnly)
@with_keys
@with_issuer
@with_connection
@click.option(
    "--show-token",
    is_flag=True,
    help="Print the token's value and nothing else; with --json as access_token. Whoever has it "
    "can call the API until it expires.",
)
@with_output_options
def token(
    keys: Keys, issuer: Issuer, connection: Connection, *, show_token: bool, output: Output
) -> None:
    """Get an access token from D1.

    Its value is masked: what is printed is what it is good for.
    """
    from d1_signer.transport.client import ClientTls

    # Before anybody is asked for a PIN: what is missing or wrong would make it a login for nothing.
    keys.require()
    issuer.profile(lifetime=DEFAULT_ASSERTION_LIFETIME)
    connection.optional_proxy()
    tls = ClientTls(connection.certificate(issuer.required_environment()), connection.ca_file)
    with keys.signers(output) as signers, connection.fetcher(signers, issuer, tls=tls) as fetcher:
        got = fetcher.token()
    document: dict[str, object] = {
        "token_type": got.token_type,
        "scope": got.scope,
        "expires_at": int(got.expires_at),
        "expires_in": max(0, int(got.expires_at - time.time())),
        "environment": fetcher.environment.base_url,
    }
    if show_token:
        output.result({**document, "access_token": got.value}, got.value, verbatim=True)
        return
    text = facts(
        {
            "Access token": f"{_MASK} (--show-token prints it)",
            "Type": got.token_type,
            "Scope": got.scope or "(none)",
            "Expires": moment(got.expires_at),
        }
    )
    output.result(document, text)


@click.command(cls=OptionsOnly)
@with_keys
@with_issuer
@click.option(
    "--lifetime",
    type=click.IntRange(1, MAX_ASSERTION_LIFETIME),
    default=DEFAULT_ASSERTION_LIFETIME,
    show_default=True,
    help="Seconds from now to the claim exp.",
)
@click.option(
    "--show-assertion",
    is_flag=True,
    help="Print the JWT itself and nothing else; with --json as assertion. Whoever has it gets an "
    "access token for it until it expires.",
)
@with_output_options
def assertion(
    keys: Keys, issuer: Issuer, *, lifetime: int, show_assertion: bool, output: Output
) -> None:
    """Sign an assertion and print what it says.

    It is what D1 would get for a token; nothing is sent.
    """
    from d1_signer import jose
    from d1_signer.token.assertion import sign_assertion

    keys.require()
    profile = issuer.profile(lifetime=lifetime)
    with keys.signers(output) as signers:
        signed = signers.attempt(lambda signer: sign_assertion(signer, profile)).reveal()
    header, claims = (json.loads(jose.b64url_decode(part)) for part in signed.split(".")[:2])
    document = {"header": header, "claims": claims}
    if show_assertion:
        if not output.json:
            output.note(
                f"It grants an access token to whoever has it until {moment(claims['exp'])}."
            )
        output.result({**document, "assertion": signed}, signed, verbatim=True)
        return
    moments = {name: f"{claims[name]}: {moment(claims[name])}" for name in ("iat", "exp")}
    text = "\n".join(
        ("Header", indented(facts(header)), "Claims", indented(facts({**claims, **moments})))
    )
    output.result(document, text)

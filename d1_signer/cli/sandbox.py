# SPDX-License-Identifier: Apache-2.0
"""`d1-signer sandbox`: a loopback D1 until Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._output import OptionsOnly, Output, printable, setting, with_output_options
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.errors import ConfigurationError, InvalidKeyError
from d1_signer.sandbox import Fault
from d1_signer.secret import shown_path

if TYPE_CHECKING:
    from d1_signer.es256 import PublicKey
    from d1_signer.sandbox import Sandbox


@click.command(cls=OptionsOnly)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port. [default: free]")
@click.option("--http", "plain", is_flag=True, help="Plain http instead of mutual TLS.")
@setting(
    "--issuer-id",
    "D1_ISSUER_ID",
    "The issuer that is known here.",
    default="sandbox-issuer",
    show_default=True,
)
@with_keys
@click.option(
    "--register",
    "registrations",
    multiple=True,
    metavar="KID=FILE",
    help="Know the public key of a file (PEM or JWK) under a kid; besides those of --key.",
)
@click.option(
    "--fault",
    type=click.Choice([fault.value for fault in Fault]),
    metavar="NAME",
    help=f"Misbehave at the token endpoint: {', '.join(Fault)}.",
)
@click.option(
    "--fault-parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the fault, such as seconds=3; times=2 for the first two requests only.",
)
@click.option(
    "--token-lifetime",
    type=float,
    default=900,
    show_default=True,
    help="Seconds that access tokens live.",
)
@with_output_options
def sandbox(
    keys: Keys,
    *,
    port: int,
    plain: bool,
    issuer_id: str,
    registrations: tuple[str, ...],
    fault: str | None,
    parameters: tuple[str, ...],
    token_lifetime: float,
    output: Output,
) -> None:
    """Run a sandbox of D1 on 127.0.0.1.

    It is for demos and tests, prints the shell's exports for the other commands, and runs until
    Ctrl-C. It is no place for production keys.
    """
    from d1_signer.sandbox import Sandbox

    known = dict(map(_read_registration, registrations)) | _public_keys(keys)
    server = Sandbox(issuer_id, port=port, tls=not plain, token_lifetime=token_lifetime)
    for kid, key in known.items():
        server.register_key(kid, key.jwk())
    order = dict(map(_read_parameter, parameters))
    if fault is not None:
        server.misbehave(fault, **order)
    elif order:
        raise click.UsageError("--fault-parameter needs --fault.")
    with _signals_held() as ending, server:
        variables = _variables(server, issuer_id, plain=plain)
        document = {
            "token_endpoint": server.token_endpoint,
            "banking_url": server.banking_url,
            "kids": list(known),
            "variables": variables,
        }
        output.result(document, _instructions(variables, list(known)))
        signal.sigwait(ending)
    if not output.json:
        counted = server.counters
        output.note(
            f"Stopped after {counted.token_requests} token requests, {counted.tokens_issued} "
            f"tokens issued, {counted.banking_requests} calls of the banking API."
        )


def _public_keys(keys: Keys) -> dict[str, PublicKey]:
    if not keys.uris:
        return {}
    with keys.opened() as signers:
        return {signer.kid: signer.public_key for signer in signers}


def _read_registration(text: str) -> tuple[str, PublicKey]:
    from d1_signer.es256 import PublicKey

    kid, equals, path = text.partition("=")
    if not kid or not equals:
        raise click.UsageError("--register takes KID=FILE.")
    shown = shown_path(Path(path).absolute())
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigurationError(f"{shown} cannot be read: {reason}.") from None
    if "-----BEGIN" in content:
        return kid, PublicKey.from_pem(content)
    try:
        return kid, PublicKey.from_jwk(json.loads(content))
    except (ValueError, AttributeError, TypeError):
        raise InvalidKeyError(
            f"{shown} holds neither a public key in PEM nor a JWK.",
            hint="Write it with: d1-signer public-key -o FILE.",
        ) from None


def _read_parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals or name == "fault":
        raise click.UsageError("--fault-parameter takes NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _variables(server: Sandbox, issuer_id: str, *, plain: bool) -> dict[str, str]:
    variables = {"D1_ENVIRONMENT": server.base_url, "D1_ISSUER_ID": issuer_id}
    if not plain:
        variables |= {
            "D1_CLIENT_CERT": str(server.client_certificate),
            "D1_CLIENT_KEY": str(server.client_key),
            "D1_CA_FILE": str(server.ca_file),
        }
    return variables


def _instructions(variables: dict[str, str], kids: list[str]) -> str:
    known = ", ".join(map(printable, kids)) or "none, see --key and --register"
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    return f"# D1 sandbox until Ctrl-C. Keys: {known}. In another shell:\n{exports}"


@contextlib.contextmanager
def _signals_held() -> Iterator[set[signal.Signals]]:
    """Hold back what ends the command, for `signal.sigwait`; threads that start here inherit it."""
    ending = {signal.SIGINT, signal.SIGTERM}
    # The terminal has gone; not so under nohup, whose ignored SIGHUP sigwait would still receive.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ending.add(signal.SIGHUP)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield ending
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

# SPDX-License-Identifier: Apache-2.0
"""`d1-signer sandbox`: a loopback D1 for a command, or until Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._command import WithCommand, exports, stdout_descriptor
from d1_signer.cli._options import SECONDS, VARIABLE
from d1_signer.cli._output import Output, printable, setting, with_output_options
from d1_signer.cli._settings import Keys, with_keys
from d1_signer.errors import ConfigurationError, InvalidKeyError
from d1_signer.sandbox import Fault
from d1_signer.sandbox.commands import PASSED_ON, signals_held, unless_ignored
from d1_signer.secret import shown_path

if TYPE_CHECKING:
    from d1_signer.es256 import PublicKey
    from d1_signer.sandbox import Sandbox

# What a command must not get from our own environment.
_TLS_SETTINGS = frozenset({"D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE"})
_ALL_SETTINGS = _TLS_SETTINGS | {"D1_SIGNER_KEY", "D1_SIGNER_KID", VARIABLE}


@click.command(cls=WithCommand)
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
    type=SECONDS,
    default=900,
    show_default=True,
    help="Seconds that access tokens live.",
)
@with_output_options
@click.pass_context
def sandbox(
    context: click.Context,
    keys: Keys,
    *,
    port: int,
    plain: bool,
    issuer_id: str,
    registrations: tuple[str, ...],
    fault: str | None,
    parameters: tuple[str, ...],
    token_lifetime: float,
    command: tuple[str, ...],
    output: Output,
) -> None:
    """Run a sandbox of D1 on 127.0.0.1.

    With COMMAND, it runs that with the sandbox's settings in its environment, and a new key of its
    own where none is given, and ends with its exit status; signals are passed on. Without COMMAND,
    it prints the shell's exports for the other commands, and runs until Ctrl-C. It is for demos and
    tests, and no place for production keys.
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
    if command:
        context.exit(_run(command, server, keys, registered=bool(known)))
    _serve(server, list(known), output)


def _run(command: Sequence[str], server: Sandbox, keys: Keys, *, registered: bool) -> int:
    """Run a command with what it needs to get a token; its exit status."""
    import tempfile

    with signals_held(*unless_ignored(*PASSED_ON)) as held, server, ExitStack() as stack:
        if keys.uris:
            replaced, settings = _ALL_SETTINGS, _settings_of(keys)
        elif registered:  # the command has the key
            replaced, settings = _TLS_SETTINGS, {}
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="d1-signer-key-"))
            replaced, settings = _ALL_SETTINGS, _new_key(Path(folder), server, keys.kid)
        inherited = {name: value for name, value in os.environ.items() if name not in replaced}
        environment = {**inherited, **server.variables, **settings}
        return held.run(command, environment, stdout=stdout_descriptor())


def _serve(server: Sandbox, kids: list[str], output: Output) -> None:
    # Where the terminal has gone; not so under nohup.
    ending = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, *unless_ignored(signal.SIGHUP))
    with signals_held(*ending) as held, server:
        variables = server.variables
        document = {
            "token_endpoint": server.token_endpoint,
            "banking_url": server.banking_url,
            "kids": kids,
            "variables": variables,
        }
        output.result(document, _instructions(variables, kids), verbatim=True)
        held.wait()
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


def _settings_of(keys: Keys) -> dict[str, str]:
    """The keys of this run as variables, since they may have been flags."""
    variables = {"D1_SIGNER_KEY": " ".join(keys.uris)}
    if keys.kid is not None:
        variables["D1_SIGNER_KID"] = keys.kid
    first, *others = map(keys.options.of, keys.uris)
    # The variable is for every key: what is not for all of them would reach a stranger's HSM.
    shared = {n: value for n, value in first.items() if all(o.get(n) == value for o in others)}
    if shared:
        variables[VARIABLE] = shlex.join(f"{name}={value}" for name, value in shared.items())
    return variables


def _new_key(folder: Path, server: Sandbox, kid: str | None) -> dict[str, str]:
    """Make a key in a file, and have it known; the settings of its user."""
    from d1_signer.signing.opening import generate_key

    made = generate_key((folder / "key.pem").as_uri())
    kid = kid or made.public_key.thumbprint()
    server.register_key(kid, made.public_key.jwk())
    return {"D1_SIGNER_KEY": made.uri, "D1_SIGNER_KID": kid}


def _instructions(variables: Mapping[str, str], kids: list[str]) -> str:
    known = ", ".join(map(printable, kids)) or "none, see --key and --register"
    return f"# D1 sandbox until Ctrl-C. Keys: {known}. In another shell:\n{exports(variables)}"

# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit stamp`: a time-stamp of RFC 3161 over a checkpoint, asked for or verified."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import click

from d1_signer.cli._output import Output, facts, with_output_options
from d1_signer.cli._output_file import OutputFile, with_output_file
from d1_signer.cli._paths import FILE
from d1_signer.cli._trail_files import notes_of, read_file
from d1_signer.errors import AuditError, ConfigurationError
from d1_signer.secret import shown_path

_PATIENCE = 30.0  # seconds for the whole exchange
_CONNECT = 10.0
_CLOCKS_APART = 300.0  # seconds
_OK = 200


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--tsa", metavar="URL", help="The time-stamp authority; https, or http on loopback.")
@click.option(
    "--stamp", "kept", metavar="FILE", type=FILE, help="Verify this stamp instead of asking."
)
@click.option(
    "--ca-file",
    required=True,
    metavar="FILE",
    type=FILE,
    help="PEM certificates of those who vouch for the time-stamp authority's signatures.",
)
@click.option(
    "--tls-ca-file",
    metavar="FILE",
    type=FILE,
    help="PEM certificates for https. [default: the system's]",
)
@with_output_file
@with_output_options
def stamp(
    *,
    checkpoint: str,
    tsa: str | None,
    kept: str | None,
    ca_file: str,
    tls_ca_file: str | None,
    output_file: OutputFile | None,
    output: Output,
) -> None:
    """Get a time-stamp (RFC 3161) over a file of checkpoints or a collection, and verify it.

    The authority sees a hash alone. Its response is written to -o FILE once it is verified.
    """
    import secrets

    from d1_signer.audit.stamp import request, verify
    from d1_signer.transport.tls import read_authorities

    if (tsa is None) is (kept is None) or (tsa is None) is not (output_file is None):
        raise click.UsageError("Give --tsa URL with -o FILE, or --stamp FILE.")
    notes_of(checkpoint, "CHECKPOINT")  # nothing else is stamped by mistake
    content = read_file(checkpoint)
    try:
        authorities = read_authorities(ca_file)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"{shown_path(ca_file)} of --ca-file cannot be read, or holds no certificates in PEM."
        ) from None
    if tsa is None:
        found = verify(read_file(str(kept)), content, authorities)
    else:
        nonce = secrets.randbits(63)
        response = _asked(tsa, request(content, nonce), tls_ca_file)
        found = verify(response, content, authorities, nonce=nonce)
        if abs(found.time.timestamp() - time.time()) > _CLOCKS_APART:
            raise AuditError(
                f"The time-stamp tells {found.time.isoformat()}, and this machine's clock "
                f"{datetime.now(UTC).isoformat(timespec='seconds')}.",
                hint="Set the clock, or ask another authority.",
            )
        if output_file is not None:
            output_file.write(response, "the time-stamp", output)
    document = {
        "time": found.time.isoformat(),
        "authority": found.authority,
        "serial": str(found.serial),
    }
    output.result(document, facts(document))


def _asked(url: str, body: bytes, tls_ca_file: str | None) -> bytes:
    """What the authority answers."""
    from urllib3.exceptions import HTTPError

    from d1_signer.transport.exchange import Http
    from d1_signer.transport.failures import failure_of
    from d1_signer.transport.hosts import check_endpoint
    from d1_signer.transport.tls import verifying_context

    check_endpoint(url, "address of the time-stamp authority")
    try:
        context = verifying_context(tls_ca_file)
    except (OSError, ValueError):
        raise ConfigurationError("The file of --tls-ca-file holds no certificates.") from None
    http = Http(
        "The time-stamp authority", context, connect_timeout=_CONNECT, read_timeout=_PATIENCE
    )
    headers = {"Content-Type": "application/timestamp-query"}
    until = time.monotonic() + _PATIENCE
    try:
        answer = http.exchange("POST", url, headers=headers, body=body, until=until)
    except (HTTPError, OSError) as error:
        reason = failure_of(error, connect=_CONNECT, read=_PATIENCE).reason
        raise AuditError(
            f"The time-stamp authority could not be asked: {reason}.", retryable=True
        ) from None
    finally:
        http.close()
    if answer.status != _OK:
        raise AuditError(
            f"The time-stamp authority answered HTTP {answer.status}.",
            hint="Look at its address.",
            retryable=answer.status >= 500,  # noqa: PLR2004 (of the server)
        )
    return answer.body

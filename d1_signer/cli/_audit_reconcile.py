# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit reconcile`: the trail against the device's own log."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import click

from d1_signer.cli._output import Output, printable, with_output_options
from d1_signer.cli._paths import FILE
from d1_signer.cli._trail_files import instances_of, moment_of, unreadable

_PATIENCE = 30.0  # seconds for each question


@click.command()
@click.argument("folder", nargs=-1, required=True, type=click.Path())
@click.option(
    "--openbao",
    multiple=True,
    metavar="FILE",
    type=FILE,
    help="Audit file of OpenBao or Vault; repeat it.",
)
@click.option(
    "--cloudtrail",
    multiple=True,
    metavar="FILE",
    type=FILE,
    help="File of AWS CloudTrail; repeat it.",
)
@click.option("--device-key", required=True, metavar="NAME", help="The key's name in that log.")
@click.option("--kid", metavar="KID", help="The key identifier in the trail. [default: any]")
@click.option("--mount", default="transit", show_default=True, help="Mount of OpenBao's key.")
@click.option(
    "--audit-device", default="file", show_default=True, help="Name of OpenBao's audit device."
)
@click.option(
    "--tolerance",
    type=click.IntRange(0, 86_400),
    default=60,
    show_default=True,
    help="Seconds between the log's time and the trail's, by CloudTrail and at --from and --until.",
)
@click.option("--from", "earliest", metavar="TIME", callback=moment_of, help="From then on (UTC).")
@click.option("--until", "latest", metavar="TIME", callback=moment_of, help="Before then (UTC).")
@with_output_options
@click.pass_context
def reconcile(
    context: click.Context,
    *,
    folder: tuple[str, ...],
    openbao: tuple[str, ...],
    cloudtrail: tuple[str, ...],
    device_key: str,
    kid: str | None,
    mount: str,
    audit_device: str,
    tolerance: int,
    earliest: str | None,
    latest: str | None,
    output: Output,
) -> None:
    """Find what the device signed and the trail does not have.

    OpenBao is asked for the HMAC of each digest (sys/audit-hash; address and token as for a key
    there, in BAO_ADDR and BAO_TOKEN), so that signatures are matched one by one; CloudTrail does
    not tell what was signed, so that they are matched by time and count. The exit status is 1
    where something is found.
    """
    from d1_signer.audit import reconciling

    if bool(openbao) is bool(cloudtrail):
        raise click.UsageError("Give files of --openbao, or of --cloudtrail.")
    instances = [instance for name in folder for instance in instances_of(name)]
    period = reconciling.Period.of(earliest, latest)
    try:
        uses = period.near(reconciling.recorded(instances, kid), tolerance)
        if openbao:
            device = [
                use
                for name in openbao
                for use in reconciling.vault_uses(Path(name), device_key, mount.strip("/"))
            ]
            with _Hashes(audit_device) as hashes:
                found = reconciling.by_mark(uses, period.within(device), hashes.mark)
        else:
            device = [
                use
                for name in cloudtrail
                for use in reconciling.cloudtrail_uses(Path(name), device_key)
            ]
            found = reconciling.by_time(uses, period.within(device), tolerance)
    except OSError as error:
        raise unreadable(error) from None
    found = found._replace(unsigned=period.within(found.unsigned))
    _tell(found, output)
    if found.unrecorded or found.unsigned:
        context.exit(1)


def _tell(found: Any, output: Output) -> None:
    document = {
        "reconciled": not (found.unrecorded or found.unsigned),
        "matched": found.matched,
        "unrecorded": [
            {"place": use.place, "time": use.time.isoformat(), "key": use.key}
            for use in found.unrecorded
        ],
        "unsigned": [{"record": use.place, "time": use.time.isoformat()} for use in found.unsigned],
    }
    lines = [f"{found.matched} signatures are in both."]
    lines += [
        f"FINDING  {use.place}: the device signed with {use.key} at {use.time.isoformat()}, and "
        "the trail has no record of it."
        for use in found.unrecorded
    ]
    lines += [
        f"FINDING  Record {use.place} tells of a signature at {use.time.isoformat()} that the "
        "device's log does not have."
        for use in found.unsigned
    ]
    output.result(document, "\n".join(printable(line) for line in lines))


class _Hashes:
    """Asks OpenBao for what its audit device writes in place of a text."""

    def __init__(self, device: str) -> None:
        from d1_signer.backends.vault.failures import Phase, Purpose
        from d1_signer.backends.vault.held import GivenToken
        from d1_signer.backends.vault.http import HttpClient
        from d1_signer.backends.vault.settings import read_settings

        self._purpose = Purpose("to hash for its audit log", Phase.LOOK_UP)
        self._path = f"sys/audit-hash/{quote(device)}"
        self._http = HttpClient(read_settings())
        self._token = GivenToken(None).obtain(self._http, time.monotonic() + _PATIENCE).token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def mark(self, digest: bytes) -> str:
        """What stands in the log where a digest was signed."""
        told = self._http.request(
            self._purpose,
            "POST",
            self._path,
            until=time.monotonic() + _PATIENCE,
            token=self._token,
            fields={"input": base64.b64encode(digest).decode()},
        )
        data = told.get("data")
        found = data.get("hash") if isinstance(data, dict) else None
        if not isinstance(found, str) or not found.startswith("hmac-sha256:"):
            raise self._http.altered(self._purpose, "answered without a hash.")
        return found

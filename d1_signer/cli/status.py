# SPDX-License-Identifier: Apache-2.0
"""`d1-signer status`: what the fleet's store holds, and what each process tells of itself."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import click

from d1_signer.cli._config import settings_in, with_config
from d1_signer.cli._output import (
    OptionsOnly,
    Output,
    facts,
    moment,
    table,
    with_output_options,
)
from d1_signer.cli._settings import Issuer, with_issuer
from d1_signer.errors import ConfigurationError

if TYPE_CHECKING:
    from d1_signer.token.register import Fleet
    from d1_signer.token.settings import Settings


@click.command(cls=OptionsOnly)
@with_config
@with_issuer
@with_output_options
@click.pass_context
def status(context: click.Context, issuer: Issuer, *, output: Output) -> None:
    """Ask the fleet's store how the fleet is.

    It tells the life that is left of the shared token, who holds the lease, what cannot be read
    with this store key, and which settings, keys and certificate each process has that has renewed
    or reloaded within a quarter of an hour. No key is opened, and D1 is not asked. The exit status
    is 0 where all can be read, there is such a process, and each has the settings of the file, all
    keys and the same client certificate.
    """
    from d1_signer.token.opening import store_key_of, store_of
    from d1_signer.token.register import Fleet, name_of
    from d1_signer.token.stores import Sealer

    settings = settings_in(context)
    named = None if settings is None else settings.store
    if settings is None or named is None or named.url is None:
        raise ConfigurationError(
            "No token store is configured.",
            hint="Give --config FILE, whose table [store] names it; processes without one share "
            "no token, and there is nothing to ask.",
        )
    # Before the store's secrets are read, for which a person may be asked.
    issuer_id, environment = issuer.required_id(), issuer.required_environment()
    store, key = store_of(named), store_key_of(named)
    assert store is not None  # noqa: S101 (tells the type checker: it has a URL)
    sealer = Sealer(key, issuer_id=issuer_id, base_url=environment.base_url)
    fleet = Fleet.read(store, sealer, name_of(issuer_id, environment))
    document = {
        "environment": environment.base_url,
        "issuer_id": issuer_id,
        **_document(fleet, settings),
    }
    output.result(document, _text(document))
    if not document["rotated"] or document["unreadable"]:
        context.exit(1)


def _document(fleet: Fleet, settings: Settings) -> dict[str, Any]:
    names = {each["member"]: each for each in fleet.processes}
    token, lease = fleet.token, fleet.lease
    return {
        "token": token
        and {
            "expires_at": token.expires_at,
            "expires_in": max(0, int(token.expires_at - time.time())),
            "scope": token.scope,
        },
        "lease": lease
        and {
            "holder": names.get(lease[0]) and _who(names[lease[0]]),
            "member": lease[0],
            "expires_in": round(lease[1], 1) if math.isfinite(lease[1]) else None,
        },
        "unreadable": fleet.unreadable,
        "settings": settings.digest,
        # Of a fleet of which nobody has told anything nothing is known.
        "rotated": {each["settings"] for each in fleet.processes} == {settings.digest}
        and len({each["certificate"] for each in fleet.processes}) == 1
        and not any(each["away"] for each in fleet.processes),
        "processes": list(fleet.processes),
    }


def _who(process: dict[str, Any]) -> str:
    return f"{process['host']}:{process['pid']}"


def _text(document: dict[str, Any]) -> str:
    token, lease = document["token"], document["lease"]
    told = facts(
        {
            "Environment": document["environment"],
            "Issuer": document["issuer_id"],
            "Token": f"expires {moment(token['expires_at'])}" if token else "none that can be read",
            "Lease": _lease_text(lease),
            "Unreadable": _unreadable_text(document["unreadable"]),
            "Settings": document["settings"],
        }
    )
    rows = [
        (
            _who(each),
            each["settings"] or "(in code)",
            "yes" if each["settings"] == document["settings"] else "no",
            ", ".join(each["kids"]),
            (each["certificate"] or "none")[:16],
            f"{max(0, round(time.time() - each['at']))} s ago",
        )
        for each in document["processes"]
    ]
    head = ("PROCESS", "SETTINGS", "AS THE FILE", "KIDS", "CERTIFICATE", "TOLD")
    return "\n\n".join([told, *([table(head, rows)] if rows else []), _conclusion(document)])


def _conclusion(document: dict[str, Any]) -> str:
    """What the exit status says, in words."""
    others = [
        f"{_who(each)} (settings {each['settings'] or 'in code'})"
        for each in document["processes"]
        if each["settings"] != document["settings"]
    ]
    found = []
    if document["unreadable"]:
        found.append(
            f"Not all can be read: {document['unreadable']} sealed with another store key. Compare "
            "key_source of the table [store] on every host."
        )
    if others:
        found.append(f"Not as the file: {', '.join(others)}. Reload or restart there.")
    found += [
        f"A key is away at {_who(each)}: {', '.join(each['away'])}. Look at its device there."
        for each in document["processes"]
        if each["away"]
    ]
    certificates = defaultdict[str, list[str]](list)
    for each in document["processes"]:
        certificates[(each["certificate"] or "none")[:16]].append(_who(each))
    if len(certificates) > 1:
        where = "; ".join(f"{name} at {', '.join(who)}" for name, who in certificates.items())
        found.append(f"The client certificates differ: {where}. Put the same on every host.")
    if not found and document["processes"]:
        found.append("Every process has the settings of the file.")
    return "\n".join(found) or "No process has told of itself within a quarter of an hour."


def _unreadable_text(entries: int) -> str:
    if not entries:
        return "0"
    why = "a part of the fleet has another store key, or another release"
    return f"{entries}: {why}; give all of it the same"


def _lease_text(lease: dict[str, Any] | None) -> str:
    if lease is None:
        return "nobody renews now"
    who = lease["holder"] or f"a process that has not told of itself ({lease['member']})"
    if lease["expires_in"] is None:
        return f"{who}, without an end: no renewal's; delete the key that ends in :lease"
    return f"{who}, for {lease['expires_in']:g} s at most"

# SPDX-License-Identifier: Apache-2.0
"""The step of `d1-signer check` that is about the fleet's store."""

from __future__ import annotations

import click

from d1_signer.cli._checklist import STORE, Checklist
from d1_signer.cli._config import settings_in
from d1_signer.cli._settings import Issuer
from d1_signer.errors import ConfigurationError


def check_store(checklist: Checklist, issuer: Issuer, *, not_taken: str | None = None) -> None:
    """Read what the fleet keeps in its store, where the settings name one.

    Args:
        checklist: Takes the step.
        issuer: Whose tokens the store keeps.
        not_taken: Why the store is not asked; None: it is.
    """
    settings = settings_in(click.get_current_context())
    if settings is None or settings.store is None or settings.store.url is None:
        return
    from d1_signer.token.opening import store_key_of, store_of
    from d1_signer.token.register import Fleet, name_of
    from d1_signer.token.stores import Sealer

    checklist.begin(f"Store {settings.store.url}", settings.store.url)
    if not_taken:
        checklist.skipped(STORE, not_taken, depends=True)
        return
    with checklist.step(STORE) as detail:
        issuer_id, environment = issuer.required_id(), issuer.required_environment()
        key, store = store_key_of(settings.store), store_of(settings.store)
        assert store is not None  # noqa: S101 (there is a URL)
        sealer = Sealer(key, issuer_id=issuer_id, base_url=environment.base_url)
        fleet = Fleet.read(store, sealer, name_of(issuer_id, environment))
        if fleet.unreadable:
            raise ConfigurationError(
                f"{fleet.unreadable} of its entries cannot be read with this store key: a part of "
                "the fleet has another one.",
                hint="Give all of the fleet the same key. What an earlier key has sealed is gone "
                "after a quarter of an hour.",
                details={"unreadable": fleet.unreadable},
            )
        detail(f"{len(fleet.processes)} processes of the fleet have told of themselves")
